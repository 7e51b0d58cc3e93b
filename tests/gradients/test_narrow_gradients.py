"""Gradients of 16-bit operands: those of float32, rounded once. Products of bfloat16 pairs round before as well."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from gradient_bounds import Comparison, check, multiplies_pairs

import selfattn as sa

pytestmark = pytest.mark.matrix

NARROW = pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])


@NARROW
@pytest.mark.parametrize(("q_len", "kv_len", "dim"), [(1, 40, 17), (49, 97, 64), (100, 450, 33), (12, 8, 1)])
def test_accuracy(isa: str, normal: Any, dtype: Any, q_len: int, kv_len: int, dim: int) -> None:
    q, k, v = (normal(2, n, d, dtype=dtype) for n, d in ((q_len, dim), (kv_len, dim), (kv_len, dim + 1)))
    check(q, k, v, causal=True, q_offset=kv_len // 2, sinks=np.ones(2), all_results=q_len > 20)


@NARROW
def test_options(isa: str, rng: Any, normal: Any, dtype: Any) -> None:
    q, k, v = (normal(2, heads, n, 9, dtype=dtype) for heads, n in ((4, 50), (2, 70), (2, 70)))
    bias = np.where(rng.random((4, 50, 70)) < 0.2, -np.inf, rng.standard_normal((4, 50, 70))).astype(dtype)
    slopes, table = rng.random((2, 4)) / 50, normal(8, 4, dtype=dtype)
    check(q, k, v, bias=bias, t5=sa.T5Bias(table, max_distance=20), softcap=4.0)
    check(q, k, v, bias=bias[0], alibi_slopes=slopes.astype(dtype), kv_lens=[60, 70], q_lens=[50, 9])
    check(q, k[:1], v, mask=rng.random((2, 1, 50, 70)) < 0.3, scale=-0.3)


@pytest.mark.parametrize(("queries", "keys"), [("f4", "f2"), ("f4", ml_dtypes.bfloat16), ("f8", "f2"), ("f8", "f4")])
def test_narrower_keys(isa: str, normal: Any, queries: Any, keys: Any) -> None:
    q, k, v = normal(1, 4, 50, 17, dtype=queries), normal(2, 2, 99, 17, dtype=keys), normal(2, 2, 99, 8, dtype=keys)
    check(q, k, v, causal=True, bias=np.zeros((50, 99), np.float16))


@NARROW
def test_grad_out_may_be_float32(isa: str, normal: Any, dtype: Any) -> None:
    q, k, v = (normal(2, n, 9, dtype=dtype) for n in (50, 70, 70))
    _, vjp = sa.attention_vjp(q, k, v)
    grad_out = normal(2, 50, 9, dtype=dtype)
    for narrow, wide in zip(vjp(grad_out)[:3], vjp(grad_out.astype(np.float32))[:3], strict=True):
        assert narrow is not None
        assert wide is not None
        assert narrow.dtype == dtype
        difference = np.max(abs(narrow.astype(np.float64) - wide.astype(np.float64)))
        # Only bfloat16 is multiplied in pairs, not a float32 grad_out.
        assert difference <= (2.0**-6 if multiplies_pairs(q, k, v) else 0) * np.max(abs(wide))


@NARROW
def test_a_float32_grad_out_is_not_rounded(isa: str, normal: Any, dtype: Any) -> None:
    q, k, v = (normal(2, n, 9, dtype=dtype) for n in (50, 70, 70))
    _, vjp = sa.attention_vjp(q, k, v, wrt=("bias",), bias=np.zeros((50, 70), np.float32))
    grad_out, factor = normal(2, 50, 9, dtype=dtype).astype(np.float32), np.float32(1 + 2.0**-12)
    one, more = vjp(grad_out).bias, vjp(grad_out * factor).bias
    assert one is not None
    assert more is not None
    assert np.max(abs(more - one * factor)) <= 1e-5 * np.max(abs(one))


@NARROW
def test_an_exact_out_makes_gradients_more_accurate(isa: str, normal: Any, dtype: Any) -> None:
    # Values are nearly alike: gradients cancel.
    q, k, v = (
        normal(1, 60, 16) * np.float32(0.1),
        normal(1, 90, 16),
        normal(1, 90, 16) * np.float32(0.1) + np.float32(3),
    )
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    grad_out = np.ones((1, 60, 16), np.float32)
    exact = sa.attention_vjp(*(x.astype(np.float64) for x in (q, k, v)))[1](grad_out.astype(np.float64)).q
    out, lse = sa.attention(*(x.astype(np.float32) for x in (q, k, v)), return_lse=True)
    errors = []
    for given in (out, out.astype(dtype)):
        found = sa.attention_backward(grad_out, q, k, v, given, lse).q
        assert found is not None
        errors.append(float(np.max(abs(found.astype(np.float64) - exact))))
    assert errors[0] * 2 < errors[1]


def is_rounded_once(found: Any, start: Any, exact: Any) -> bool:
    """Whether start + exact is at most half a unit in the last place from `found`, apart from rounding in float32."""
    total, unit = start.astype(np.float64) + exact, np.spacing(abs(found)).astype(np.float64)
    return bool(np.all(abs(found.astype(np.float64) - total) <= unit / 2 + 5e-6))


def test_sums_in_the_callers_arrays_are_rounded_once(normal: Any) -> None:
    q, k, v = (normal(*shape, dtype=np.float16) for shape in ((2, 2, 50, 9), (2, 2, 70, 9), (1, 2, 70, 9)))
    bias, grad_out = normal(50, 70, dtype=np.float16), normal(2, 2, 50, 9, dtype=np.float16)
    wide = [x.astype(np.float64) for x in (grad_out, q, k, v)]
    out, lse = sa.attention(q.astype(np.float32), k, v, bias=bias, return_lse=True)
    exact_results = sa.attention(*wide[1:], bias=bias.astype(np.float64), return_lse=True)
    wrt = ("q", "k", "v", "bias")  # v and bias are broadcast
    exact = sa.attention_backward(*wide, *exact_results, wrt=wrt, bias=bias.astype(np.float64))
    start = {name: normal(*x.shape, dtype=np.float16) for name, x in zip(wrt, (q, k, v, bias), strict=True)}
    into = {name: x.copy() for name, x in start.items()}
    sa.attention_backward(grad_out, q, k, v, out, lse, wrt=wrt, bias=bias, into=into, accumulate=True)
    rounded = sa.attention_backward(grad_out, q, k, v, out, lse, wrt=wrt, bias=bias)
    for name in wrt:
        assert is_rounded_once(into[name], start[name], getattr(exact, name)), name
        assert not is_rounded_once(start[name] + getattr(rounded, name), start[name], getattr(exact, name))


def test_sums_in_the_callers_arrays_of_packed_sequences_are_rounded_once(normal: Any) -> None:
    q, k, v, grad_out = (normal(60, 2, 9, dtype=np.float16) for _ in range(4))
    starts, wide = [0, 25, 60], [x.astype(np.float64) for x in (grad_out, q, k, v)]
    out, lse = sa.attention_varlen(q.astype(np.float32), k, v, starts, return_lse=True)
    exact_results = sa.attention_varlen(*wide[1:], starts, return_lse=True)
    exact = sa.attention_varlen_backward(*wide, *exact_results, starts)
    start = {name: normal(60, 2, 9, dtype=np.float16) for name in "qkv"}
    into = {name: x.copy() for name, x in start.items()}
    sa.attention_varlen_backward(grad_out, q, k, v, out, lse, starts, into=into, accumulate=True)
    for name in "qkv":
        assert is_rounded_once(into[name], start[name], getattr(exact, name)), name


# Those of docs/numerics.md: largest error and rms of q and k relative to the sum of absolute values, then of v.
FIGURES = {
    "float32": (3.9e-8, 2.7e-9, 2.5e-7, 2.5e-8),
    "float64": (1.0e-16, 1.1e-17, 5.9e-16, 1.0e-16),
    "float16": (1.3e-5, 1.3e-6, 8.4e-5, 1.3e-5),
    "bfloat16": (9.2e-5, 1.0e-5, 8.1e-4, 1.0e-4),
    "bfloat16 in pairs": (1.2e-4, 1.5e-5, 9.6e-4, 1.5e-4),
}


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_documented_figures(isa: str, dtype: str) -> None:
    rng = np.random.default_rng(5)
    q, k, v = rng.standard_normal((3, 1, 300 if dtype == "float64" else 1024, 64)).astype(dtype)
    comparison = Comparison(q, k, v, rng, all_results=False)
    figures = FIGURES["bfloat16 in pairs" if multiplies_pairs(q, k, v) else dtype]
    for rounded in (False, True):
        found = comparison.gradients(rounded)
        measured: dict[str, list[float]] = {}
        for name in "qkv":
            expected, magnitude = comparison.exact.gradients[name], comparison.exact.magnitudes[name]
            error = abs(getattr(found, name).astype(expected.dtype) - expected) / magnitude
            measured[name] = [float(np.max(error)), float(np.sqrt(np.mean(error**2)))]
        of_both = np.maximum(measured["q"], measured["k"])
        for figure, value in zip(figures, (*of_both, *measured["v"]), strict=True):
            assert figure / 1.25 < value < figure * 1.25, measured
