"""Gradients of relative attention, against formulas in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from relative_cases import Case, draw, exact_gradients

import selfattn as sa

ALL = ("q", "k", "v", "r", "u", "w", "scale")


def hold(rng: np.random.Generator, case: Case, dtype: Any = np.float32, wrt: Any = ALL, **extra: Any) -> None:
    """Compare all gradients with float64."""
    x = draw(rng, case, dtype)
    options = {"mem_len": case.memory, **case.options}
    out, vjp = sa.relative_attention_vjp(*x, wrt=wrt, **options)
    assert np.array_equal(out, sa.relative_attention(*x, **options)) or out.dtype.itemsize == 2
    grad_out = rng.standard_normal(out.shape).astype(out.dtype)
    grads = vjp(grad_out, **extra)._asdict()
    exact = exact_gradients(x, grad_out, case, **extra)
    computed = np.float64 if dtype == np.float64 else np.float32
    for name in wrt:
        given = options["bias"] if name == "bias" else getattr(x, name, None)
        of_operand = name in ("q", "k", "v", "r", "bias")
        assert grads[name].dtype == (given.dtype if of_operand else computed), name
        wanted, size = exact.gradients[name], exact.magnitudes[name]
        assert grads[name].shape == wanted.shape, name
        dtype = grads[name].dtype
        bound = (16 + 4 * exact.sigma) * (2.0**-53 if computed == np.float64 else 2.0**-24) * size + 1e-20
        if dtype.itemsize == 2:
            bits, smallest = (8, 0) if dtype.name == "bfloat16" else (11, 2.0**-25)
            bound = bound + 2.0**-bits * abs(wanted) + smallest
        error = abs(grads[name].astype(np.float64) - wanted)
        assert np.all(error <= bound), f"{name}: error is {np.max(error / bound):.3g} times its bound"


# Rows and keys of one block and of several, ranges of keys, grouped heads, head_dim that is not a multiple of a vector.
SHAPES = {
    "one query": Case(segment=1, heads=1, kv_heads=1),
    "one query with memory": Case(segment=1, memory=70, dim=16, value_dim=7),
    "blocks": Case(segment=97, memory=130, heads=4, kv_heads=2, dim=24, value_dim=16),
    "ranges": Case(segment=150, memory=900, heads=1, kv_heads=1, dim=17),
    "many queries": Case(segment=600, heads=1, kv_heads=1, dim=5),
    "batch": Case(batch=3, segment=40, memory=9),
}


@pytest.mark.dtypes("float32")
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("shared", [False, True])
def test_against_float64(isa: str, rng: Any, name: str, shared: bool) -> None:
    hold(rng, SHAPES[name]._replace(shared=shared))


@pytest.mark.parametrize("dtype", [np.float64, np.float16, "bfloat16"])
def test_types(isa: str, rng: Any, dtype: Any) -> None:
    hold(rng, SHAPES["blocks"], dtype)


@pytest.mark.dtypes("float32")
@pytest.mark.parametrize("rows", [1, 2, 3, 50, 700])
@pytest.mark.parametrize("origin", [0, 30])
def test_tables_shorter_than_distances(isa: str, rng: Any, rows: int, origin: int) -> None:
    options = {"r_origin": min(origin, rows - 1), "causal": origin == 0}
    if rows == 1 and origin:
        options["causal"] = True
    hold(rng, Case(segment=110, memory=520, heads=1, kv_heads=1, rows=rows, options=options))


@pytest.mark.dtypes("float32")
@pytest.mark.parametrize("window", [None, (3, None), (0, 0), (None, 5), (400, 2)])
@pytest.mark.parametrize("causal", [False, True])
def test_windows_and_two_sides(isa: str, rng: Any, window: Any, causal: bool) -> None:
    options = {"window": window, "causal": causal, "r_origin": 90}
    hold(rng, Case(segment=130, memory=500, heads=2, kv_heads=1, rows=300, options=options))


@pytest.mark.dtypes("float32")
@pytest.mark.parametrize("segment", [1, 2, 15, 16, 17, 31, 47, 48, 49, 95, 96, 97, 192, 193])
def test_every_edge_of_blocks(isa: str, rng: Any, segment: int) -> None:
    for memory in (0, 1, 513 - segment):
        hold(rng, Case(segment=segment, memory=memory, heads=1, kv_heads=1))


@pytest.mark.dtypes("float32", "float64")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_options(isa: str, rng: Any, dtype: Any) -> None:
    case = Case(batch=2, segment=60, memory=450, heads=2, kv_heads=1, rows=200, shared=True)
    shape = (case.batch, case.heads, case.segment, case.length)
    mask = rng.random(shape) < 0.7
    mask[0, 1, 5] = False  # a query that sees nothing
    for options in (
        {"softcap": 3.0, "scale": 0.4},
        {"mask": mask, "bias": rng.standard_normal(shape).astype(dtype)},
        {"mask": mask, "bias": rng.standard_normal(shape).astype(dtype), "softcap": 2.0},
        {"q_lens": [60, 13], "kv_lens": [510, 300], "kv_starts": [3, 17]},
        {"mask": mask, "softcap": 2.0, "dropout": 0.3, "seed": 2**63 + 5},
    ):
        wrt = (*ALL, "bias") if "bias" in options else ALL
        hold(rng, case._replace(options=options), dtype, wrt)
    hold(rng, case, dtype, grad_lse=rng.standard_normal(shape[:-1]))
