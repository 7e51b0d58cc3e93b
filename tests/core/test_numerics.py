"""The error bound, on every instruction set, around every boundary of vectors, tiles, strips, blocks and ranges."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import selfattn as sa
from selfattn import reference

pytestmark = pytest.mark.dtypes("float32", "float64")

EDGES = [95, 96, 97, 98, 127, 128, 129, 191, 192, 193, 255, 256, 257, 383, 384, 385, 511, 513, 769, 1023, 1024, 1025]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_small_query_length(isa: str, check: Any, normal: Any, dtype: Any) -> None:
    k, v = normal(2, 37, 12, dtype=dtype), normal(2, 37, 10, dtype=dtype)
    for q_len in range(1, 71):
        check(normal(2, q_len, 12, dtype=dtype), k, v, causal=q_len % 2 == 0, q_offset=3)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("q_len", [1, 3, 13, 30])
def test_every_small_key_length(isa: str, check: Any, normal: Any, dtype: Any, q_len: int) -> None:
    q = normal(1, q_len, 9, dtype=dtype)
    for kv_len in range(1, 71):
        check(q, normal(1, kv_len, 9, dtype=dtype), normal(1, kv_len, 17, dtype=dtype))


@pytest.mark.parametrize(
    "size", [*range(1, 21), 31, 32, 33, 47, 48, 49, 63, 64, 65, 72, 80, 96, 127, 128, 129, 160, 256]
)
def test_every_head_size(isa: str, check: Any, normal: Any, size: int) -> None:
    for dtype in (np.float32, np.float64):
        for q_len in (2, 33):
            check(*(normal(1, n, d, dtype=dtype) for n, d in ((q_len, size), (41, size), (41, size))))
            check(*(normal(1, n, d, dtype=dtype) for n, d in ((q_len, 8), (41, 8), (41, size))))


@pytest.mark.parametrize("length", EDGES)
def test_around_block_boundaries(isa: str, check: Any, normal: Any, length: int) -> None:
    # The first rows see nothing.
    check(normal(1, length, 16), normal(1, 65, 16), normal(1, 65, 16), causal=True, trivial=True)
    for q_len in (1, 5, 50):
        check(normal(1, q_len, 16), normal(1, length, 16), normal(1, length, 16), causal=True)
    check(normal(1, length, 8), normal(1, length, 8), normal(1, length, 8), causal=True)


@pytest.mark.parametrize("length", [2047, 2048, 2049, 2176, 3000, 4095, 4097, 6145])
@pytest.mark.parametrize("q_len", [1, 7, 70, 400])
def test_split_keys(isa: str, check: Any, normal: Any, length: int, q_len: int) -> None:
    for options in ({}, {"causal": True}, {"window": (300, None)}, {"sinks": np.array([0.5])}):
        check(normal(1, 1, q_len, 8), normal(1, 1, length, 8), normal(1, 1, length, 8), **options)


@pytest.mark.parametrize("q_len", [2, 16, 40])
@pytest.mark.parametrize("dim", [700, 1500])
def test_split_keys_of_wide_heads(isa: str, check: Any, normal: Any, q_len: int, dim: int) -> None:
    # Wide heads have key blocks of odd lengths, which must not straddle two ranges.
    check(normal(1, q_len, dim), normal(1, 4300, dim), normal(1, 4300, dim), scale=1 / dim)


@pytest.mark.parametrize("sigma", [30, 100, 300])
@pytest.mark.parametrize("q_len", [4, 60])
def test_large_logits(isa: str, check: Any, normal: Any, sigma: int, q_len: int) -> None:
    for dtype in (np.float32, np.float64):
        q, k, v = normal(2, q_len, 64, dtype=dtype), normal(2, 700, 64, dtype=dtype), normal(2, 700, 64, dtype=dtype)
        largest = reference.attention(q, k, v, scale=1.0).sigma
        check(q, k, v, scale=float(sigma / largest))


@pytest.mark.parametrize("case", ["constant", "positive", "normal", "zero queries"])
@pytest.mark.parametrize("q_len", [2, 16])
def test_the_longest_sums(isa: str, assert_accurate: Any, normal: Any, case: str, q_len: int) -> None:
    # With equal weights and values of one sign, rounding errors cannot cancel.
    kv_len = 65_536
    q, k, v = normal(q_len, 4), normal(kv_len, 4), normal(kv_len, 4)
    if case == "constant":
        v[...] = 1.1
    if case == "positive":
        v = abs(v)
    if case != "normal":
        q[...] = 0
    assert_accurate(sa.attention(q, k, v), reference.attention(q, k, v))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 128), (200, 128), (200, 4096), (200, 65_536)])
def test_sums_of_equal_values(isa: str, rng: Any, q_len: int, kv_len: int, dtype: Any) -> None:
    # The mean of equal values must be that value. For 1.1 rounding errors happen to cancel, for most values not.
    values = rng.uniform(1, 2, 300).astype(dtype)
    q, k = np.zeros((q_len, 1), dtype), np.zeros((kv_len, 1), dtype)
    out = sa.attention(q, k, np.broadcast_to(values, (kv_len, 300)))
    error = abs(out.astype(np.longdouble) - values) / values
    # All roundings may go one way: one per key of a block, and two per block of 64 or one per group of 32 keys.
    worst = 16 + 2 * min(kv_len, 128) + kv_len / 32
    assert np.max(error) <= worst * float(np.finfo(dtype).eps) / 2


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_magnitude_of_values_cancels_out(isa: str, check: Any, normal: Any, size: float) -> None:
    check(normal(20, 8), normal(90, 8), (normal(90, 8) * np.float32(size)).astype(np.float32))


def test_subnormal_and_huge_inputs_stay_finite(isa: str, normal: Any) -> None:
    tiny = np.full((20, 8), 1e-40, np.float32)
    out = sa.attention(tiny, tiny, normal(20, 8))
    assert np.isfinite(out).all()
    huge = np.full((20, 8), 1e37, np.float32)  # times 20 keys is still a float32
    assert np.allclose(sa.attention(normal(20, 8), normal(20, 8), huge), 1e37, rtol=1e-5)


def test_lse_of_known_scores(isa: str) -> None:
    q, k = np.ones((3, 1), np.float32), np.log(np.arange(1, 5, dtype=np.float32))[:, None]
    _, lse = sa.attention(q, k, k, scale=1.0, return_lse=True)
    assert np.allclose(lse, np.log(10), rtol=1e-6)


def test_the_mean_of_equal_scores_is_exact(isa: str) -> None:
    q, k = np.zeros((40, 4), np.float32), np.zeros((64, 4), np.float32)
    v = np.arange(64, dtype=np.float32)[:, None]
    assert np.array_equal(sa.attention(q, k, v), np.full((40, 1), 31.5, np.float32))


def test_a_draw_beyond_the_usual_bound_is_within_the_chains(isa: str) -> None:
    # The value of the dominant key is nearly 0 here, so that the error of a minor weight shows.
    rng = np.random.default_rng(665)
    q = rng.standard_normal((1, 100, 256), dtype=np.float32) * 4
    k, v = (rng.standard_normal((1, 600, 256), dtype=np.float32) for _ in range(2))
    exact = reference.attention(q, k, v, scale=0.3)
    chains = 16 + 2 * 128 + 600 / 64 + (4 + 256) * exact.sigma
    error = abs(sa.attention(q, k, v, scale=0.3) - exact.out) / (2.0**-24 * exact.magnitude)
    assert error.max() <= chains
    assert error.max() <= 1.25 * (16 + 4 * exact.sigma)


@pytest.mark.parametrize(("dtype", "steps", "documented"), [("int8", 1, 4e-3), ("int4", 8, 6e-2)])
@pytest.mark.parametrize("q_len", [1, 40])
def test_codes(isa: str, normal: Any, q_len: int, dtype: Any, steps: int, documented: float) -> None:
    q, k, v = normal(1, 4, q_len, 64), normal(1, 2, 3000, 64), normal(1, 2, 3000, 64)
    cache = sa.KVCache(1, 2, 64, 3000, dtype=dtype)
    cache.append(k, v)
    out = sa.attention_with_kvcache(q, cache)
    exact = reference.attention(q, k, v, causal=True)
    k_error, v_error = (steps * float(scales.max()) / 2 for scales in (cache.k_scales, cache.v_scales))
    moved = k_error * np.abs(q, dtype=np.float64).sum(axis=-1, keepdims=True) / 8
    error = abs(out - exact.out)
    assert np.all(error <= np.expm1(2 * moved) * exact.magnitude + v_error + 1e-6)
    # What is documented for unit normals, with room for fewer keys to average over.
    assert 1e-5 * steps < np.max(error / exact.magnitude) < documented
