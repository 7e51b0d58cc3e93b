"""Gradients have the same bits for any number of threads, batch, neighbours, strides, alignment and run."""

from __future__ import annotations

import threading
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from array_layouts import misaligned

import selfattn as sa

pytestmark = pytest.mark.dtypes("float32", "float64")
BFLOAT = ml_dtypes.bfloat16

SHAPES = [
    # batch, heads, kv heads, q_len, kv_len, dim
    (1, 1, 1, 200, 800, 64),
    (2, 4, 2, 100, 130, 16),
    (3, 2, 1, 97, 45, 5),
    (1, 2, 2, 3, 2000, 9),
]
NUMBERS = ("scale", "sinks", "alibi_slopes", "t5", "bias")


def problem(rng: Any, shape: Any, dtype: Any = np.float32) -> dict[str, Any]:
    batch, heads, kv_heads, q_len, kv_len, dim = shape

    def normal(*shape: int) -> Any:
        return rng.standard_normal(shape).astype(dtype)

    return {
        "q": normal(batch, heads, q_len, dim),
        "k": normal(batch, kv_heads, kv_len, dim),
        "v": normal(batch, kv_heads, kv_len, dim + 1),
        "grad_out": normal(batch, heads, q_len, dim + 1),
        "grad_lse": normal(batch, heads, q_len).astype(np.float64 if dtype == np.float64 else np.float32),
        "mask": rng.random((batch, 1, q_len, kv_len)) < 0.9,
        "alibi_slopes": rng.random((batch, heads)) / 50,
    }


def gradients(given: dict[str, Any], wrt: Any = ("q", "k", "v"), **options: Any) -> list[Any]:
    given = {**given, **options}
    upstream = {name: given.pop(name, None) for name in ("grad_out", "grad_lse", "grad_weights")}
    _, vjp = sa.attention_vjp(given.pop("q"), given.pop("k"), given.pop("v"), wrt=wrt, **given)
    return [x for x in vjp(**upstream) if x is not None]


def same(found: Any, expected: Any) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("bias_shape", "dtype"),
    [
        ("pairs", np.float32),
        ("shared", np.float32),
        ("keys", np.float32),
        ("rows", np.float32),
        ("shared", np.float64),
        ("shared", BFLOAT),
        ("pairs", BFLOAT),
    ],
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_threads_and_runs_do_not_matter(isa: str, rng: Any, shape: Any, bias_shape: str, dtype: Any) -> None:
    batch, heads, _, q_len, kv_len, _ = shape
    given = problem(rng, shape, dtype)
    biases = {"pairs": (batch, heads, q_len, kv_len), "shared": (q_len, kv_len), "keys": (kv_len,), "rows": (q_len, 1)}
    given.update(bias=rng.standard_normal(biases[bias_shape]).astype(dtype), sinks=rng.standard_normal(heads))
    given.update(t5=sa.T5Bias(rng.standard_normal((8, heads))), causal=bias_shape == "shared")
    expected = gradients(given, ("q", "k", "v", *NUMBERS), num_threads=1)
    assert all(np.isfinite(x.astype(np.float64)).all() for x in expected)
    for threads in (1, 2, 3, 7):
        assert same(gradients(given, ("q", "k", "v", *NUMBERS), num_threads=threads), expected)


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT])
@pytest.mark.parametrize("options", [{}, {"causal": True, "window": (90, None)}, {"softcap": 4.0}], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_entry_alone_gives_the_same_bits(isa: str, rng: Any, shape: Any, options: Any, dtype: Any) -> None:
    batch, heads, kv_heads, _, kv_len, _ = shape
    given = problem(rng, shape, dtype)
    given["kv_lens"] = rng.integers(kv_len // 2, kv_len + 1, batch)
    given["q_lens"] = np.minimum(given["kv_lens"], shape[3])
    asked = ("q", "k", "v", "alibi_slopes")
    together, group = gradients(given, asked, **options), heads // kv_heads
    for b in range(batch):
        for h in range(kv_heads):
            one, members = slice(b, b + 1), slice(h * group, (h + 1) * group)
            own = {
                name: x[one]
                if x.ndim == 1 or name == "mask"
                else x[one, h : h + 1]
                if name in "kv"
                else x[one, members]
                for name, x in given.items()
            }
            of_heads = [x[one, h : h + 1] if x.shape[1] == kv_heads else x[one, members] for x in together]
            assert same(gradients(own, asked, **options), of_heads)


def placed(x: Any, form: str) -> Any:
    """Return an equal array with other strides or alignment."""
    if form == "backwards":
        return x[..., ::-1].copy()[..., ::-1]
    if form == "heads last":
        return x.swapaxes(0, 1).copy().swapaxes(0, 1) if x.ndim < 3 else x.swapaxes(1, 2).copy().swapaxes(1, 2)
    if form == "columns first":
        return np.asfortranarray(x)
    if form == "rows apart":
        wide = np.full((*x.shape[:-1], x.shape[-1] + 3), np.nan, x.dtype)
        wide[..., : x.shape[-1]] = x
        return wide[..., : x.shape[-1]]
    return misaligned(x)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, BFLOAT])
@pytest.mark.parametrize("form", ["backwards", "heads last", "columns first", "rows apart", "misaligned"])
@pytest.mark.parametrize("dim", [32, 16, 5])
def test_strides_and_alignment_do_not_matter(isa: str, rng: Any, form: str, dtype: Any, dim: int) -> None:
    given = problem(rng, (2, 4, 2, 100, 130, dim), dtype)
    given["grad_weights"] = rng.standard_normal((2, 4, 100, 130)).astype(given["grad_lse"].dtype)
    expected = gradients(given)
    assert same(gradients({name: placed(x, form) for name, x in given.items()}), expected)
    for name in ("q", "k", "v", "grad_out"):
        assert same(gradients({**given, name: placed(given[name], form)}), expected), name


def test_both_layouts_give_the_same_bits(isa: str, rng: Any) -> None:
    given = problem(rng, (2, 4, 2, 100, 130, 16))
    expected = gradients(given)
    heads_last = {**given, **{name: given[name].swapaxes(1, 2) for name in ("q", "k", "v", "grad_out")}}
    found = gradients(heads_last, layout="bshd")
    assert same([x.swapaxes(1, 2) for x in found], expected)


def test_a_single_pair_of_residuals_may_be_used_often(isa: str, rng: Any) -> None:
    given = problem(rng, (2, 4, 2, 60, 70, 16))
    out, vjp = sa.attention_vjp(given["q"], given["k"], given["v"], wrt=("v", "q"))
    expected = vjp(given["grad_out"])
    out[...] = np.nan  # the caller's own
    assert expected.k is None
    again = vjp(given["grad_out"])
    assert same([again.q, again.v], [expected.q, expected.v])


def test_many_python_threads_get_right_answers(rng: Any) -> None:
    problems = []
    for shape in ((1, 2, 1, 40, 60, 8), (1, 1, 1, 150, 700, 16), (2, 2, 2, 100, 100, 33)):
        given = problem(rng, shape)
        problems.append((given, gradients(given, ("q", "k", "v", "scale"), num_threads=1)))
    barrier, wrong = threading.Barrier(6), []

    def work(seed: int) -> None:
        order = np.random.default_rng(seed)
        barrier.wait()
        for _ in range(12):
            given, expected = problems[order.integers(len(problems))]
            if not same(gradients(given, ("q", "k", "v", "scale"), num_threads=seed % 3 + 1), expected):
                wrong.append(seed)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []
