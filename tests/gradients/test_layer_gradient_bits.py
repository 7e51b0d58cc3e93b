"""What a layer computes for a token has the same bits for any number of threads, neighbours in the batch, strides."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from array_layouts import misaligned

import selfattn as sa

BATCH, LENGTH, D_MODEL, D_CONTEXT, HEADS, KV_HEADS, DIM = 33, 70, 48, 40, 4, 2, 16
EVERY = pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
WEIGHTS = ("w_q", "w_k", "w_v", "w_o", "b_q", "b_o")
OPTIONS: dict[str, dict[str, Any]] = {
    "causal": {"causal": True, "rope": True},
    "norms": {"norms": True, "window": (9, 9)},
    "sinks": {"sinks": np.ones(HEADS), "softcap": 2.0},
}


def problem(rng: Any, dtype: Any, cross: bool = False) -> dict[str, Any]:
    depth, width = (D_CONTEXT if cross else D_MODEL), KV_HEADS * DIM
    shapes = {"w_q": (D_MODEL, HEADS * DIM), "w_k": (depth, width), "w_v": (depth, width), "w_o": (HEADS * DIM, 50)}
    shapes |= {"b_q": (HEADS * DIM,), "b_o": (50,), "x": (BATCH, LENGTH, D_MODEL), "grad_y": (BATCH, LENGTH, 50)}
    if cross:
        shapes["context"] = (BATCH, LENGTH + 5, depth)
    return {name: (rng.standard_normal(shape) / 4).astype(dtype) for name, shape in shapes.items()}


def results(given: dict[str, Any], *weights: str, **options: Any) -> list[Any]:
    """Return y and the gradients of x, context and the named weights."""
    given = {**given, **options}
    grad_y, wrt = given.pop("grad_y"), [name for name in ("x", "context", *weights) if name in given]
    if given.pop("norms", False):
        ones = np.ones(DIM, given["w_q"].dtype)
        given["q_norm"], given["k_norm"] = sa.RMSNorm(ones), sa.LayerNorm(ones)
    y, vjp = sa.self_attention_vjp(**given, num_heads=HEADS, num_kv_heads=KV_HEADS, wrt=wrt)
    return [y, *vjp(grad_y).values()]


def same(found: list[Any], expected: list[Any]) -> bool:
    return len(found) == len(expected) and all(map(np.array_equal, found, expected))


@EVERY
@pytest.mark.parametrize("name", OPTIONS)
def test_an_entry_alone_gives_the_same_bits(isa: str, rng: Any, dtype: Any, name: str) -> None:
    given = problem(rng, dtype, cross=name == "sinks")
    together = results(given, **OPTIONS[name])
    assert all(np.isfinite(x.astype(np.float64)).all() and x.any() for x in together)
    for entries in (slice(0, 1), slice(7, 8), slice(30, 33)):
        own = {key: x[entries] if x.ndim == 3 else x for key, x in given.items()}
        assert same(results(own, **OPTIONS[name]), [x[entries] for x in together])


@EVERY
def test_threads_do_not_matter(isa: str, rng: Any, dtype: Any) -> None:
    given = problem(rng, dtype)
    expected = results(given, *WEIGHTS, num_threads=1)
    for threads in (2, 3, 7):
        assert same(results(given, *WEIGHTS, num_threads=threads), expected)


def test_threads_of_the_blas_do_not_matter(rng: Any) -> None:
    threadpoolctl = pytest.importorskip("threadpoolctl")
    given = problem(rng, np.float32)
    found = []
    for threads in (1, 2):
        with threadpoolctl.threadpool_limits(threads, user_api="blas"):
            found.append(results(given, *WEIGHTS))
    assert same(*found)


@EVERY
@pytest.mark.parametrize("place", [np.asfortranarray, misaligned, lambda x: x[..., ::-1].copy()[..., ::-1]])
def test_strides_and_alignment_do_not_matter(isa: str, rng: Any, dtype: Any, place: Any) -> None:
    given = problem(rng, dtype, cross=True)
    assert same(results({name: place(x) for name, x in given.items()}, *WEIGHTS), results(given, *WEIGHTS))
