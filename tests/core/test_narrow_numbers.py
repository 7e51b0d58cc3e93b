"""float16 and bfloat16 numbers out of the ordinary: huge, subnormal, between two numbers, NaN and infinite."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from narrow_cases import backwards, columns_apart, every_second, everything, operands, same, shapes, types

import selfattn as sa
from selfattn import reference

pytestmark = pytest.mark.matrix


@types
@pytest.mark.parametrize("sigma", [30, 300])
def test_large_logits(isa: str, check: Any, normal: Any, dtype: Any, sigma: int) -> None:
    for q_len in (2, 60):
        q, k, v = (normal(2, n, 64, dtype=dtype) for n in (q_len, 700, 700))
        check(q, k, v, scale=float(sigma / reference.attention(q, k, v, scale=1.0).sigma))


@types
@pytest.mark.parametrize("q_len", [2, 40])
def test_heads_of_many_numbers(isa: str, check: Any, normal: Any, dtype: Any, q_len: int) -> None:
    # Strided numbers are gathered a few hundred at a time.
    q, k, v = normal(q_len, 600, dtype=dtype), normal(30, 600, dtype=dtype), normal(30, 700, dtype=dtype)
    expected = check(q, k, v)
    for layout in (columns_apart, every_second, backwards):
        assert same((sa.attention(layout(q), layout(k), layout(v)),), (expected,))
        out = layout(np.zeros_like(expected))
        assert same((sa.attention(q, k, v, out=out),), (expected,))


@types
@pytest.mark.parametrize("q_len", [2, 40])
def test_halves_are_rounded_to_even(isa: str, dtype: Any, q_len: int) -> None:
    ulp = float(ml_dtypes.finfo(dtype).eps)
    first = np.array([1 + k * ulp for k in range(8)] + [-1 - k * ulp for k in range(8)])
    v = np.stack([first, first + np.sign(first) * ulp])
    q = np.zeros((q_len, 4), dtype)
    out = sa.attention(q, q[:2], v.astype(dtype)).astype(np.float64)
    steps = (abs(out) - 1) / ulp
    assert np.array_equal(steps % 2, np.zeros_like(steps))
    assert np.all(abs(out - v.mean(axis=0)) == ulp / 2)


@types
@shapes
@pytest.mark.parametrize("garbage", [np.nan, np.inf, 6e4])
def test_hidden_values_are_inert(isa: str, normal: Any, rng: Any, shape: Any, dtype: Any, garbage: float) -> None:
    kv_len = shape[4]
    for wide in (dtype, np.float32):
        q, k, v = operands(normal, shape, wide, dtype)
        hidden = rng.random(kv_len) < 0.4
        bias = np.where(hidden, -np.inf, 0.5).astype(dtype)
        spoilt = k.copy(), v.copy()
        for x in spoilt:
            x[..., hidden, :] = garbage
        for options in ({"mask": ~hidden}, {"bias": bias}):
            assert same(everything(q, *spoilt, **options), everything(q, k, v, **options))
        tail = k.copy(), v.copy()
        for x in tail:
            x[..., kv_len - 5 :, :] = garbage
        assert same(everything(q, *tail, kv_lens=kv_len - 5), everything(q, k, v, kv_lens=kv_len - 5))


@types
@shapes
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_visible_values_propagate(isa: str, check: Any, normal: Any, shape: Any, dtype: Any, value: float) -> None:
    for wide in (dtype, np.float32):
        q, k, v = operands(normal, shape, wide, dtype)
        v[..., shape[4] // 2, 3] = value
        out = check(q, k, v)
        assert np.array_equal(np.isfinite(out), np.broadcast_to(np.arange(shape[6]) != 3, out.shape))


@pytest.mark.parametrize("q_len", [2, 50])
def test_the_largest_float16(isa: str, normal: Any, q_len: int) -> None:
    largest = np.finfo(np.float16).max
    q, k = normal(q_len, 8, dtype=np.float16), normal(90, 8, dtype=np.float16)
    v = np.full((90, 8), largest)
    # The mean of equal numbers is that number. Their sum, 90 times as large, exceeds float16 but not float32.
    assert np.all(sa.attention(q, k, v) == largest)
    large = np.full((q_len, 8), largest)
    out, lse = sa.attention(large, np.full((90, 8), largest), v, return_lse=True)
    assert np.all(out == largest)
    assert np.allclose(lse, float(largest) ** 2 * np.sqrt(8) + np.log(90), rtol=1e-6)


@pytest.mark.parametrize("q_len", [2, 50])
@types
def test_subnormal_numbers(isa: str, normal: Any, dtype: Any, q_len: int) -> None:
    tiny = ml_dtypes.finfo(dtype).smallest_subnormal
    v = np.full((90, 8), 7 * float(tiny)).astype(dtype)
    out = sa.attention(np.zeros((q_len, 8), dtype), np.zeros((90, 8), dtype), v)
    error = abs(out.astype(np.float64) - 7 * float(tiny)) / float(tiny)
    assert np.max(error) <= 1
    assert np.all(out != 0)
