"""Codes of 4 bits: what is stored, and that attention computes with the numbers that the words represent."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cache_model import packed, unpacked

import selfattn as sa
from selfattn._elements import ELEMENT_TYPES

pytestmark = pytest.mark.matrix

DIMS = [1, 2, 31, 32, 33, 64, 80, 128]


def cache_of(k: Any, v: Any, dtype: Any) -> sa.KVCache:
    made = sa.KVCache(1, k.shape[1], k.shape[3], k.shape[2], value_dim=v.shape[3], dtype=dtype)
    made.append(k, v)
    return made


def numbers(cache: sa.KVCache) -> Any:
    words = cache.k.reshape(-1, cache.k.shape[-1])
    return unpacked(words, cache.head_dim) * cache.k_scales.reshape(-1, 1).astype(np.float64)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("size", [1e-44, 1e-38, 1, 1e30])
def test_a_number_is_off_by_half_a_step(normal: Any, dim: int, size: float) -> None:
    x = (normal(1, 1, 60, dim) * np.float32(size)).astype(np.float32)
    x[0, 0, 0] = 0
    x[0, 0, 1] = abs(x[0, 0, 1])  # the zero is the lowest code
    x[0, 0, 2] = -abs(x[0, 0, 2])
    x[0, 0, 3, dim // 2 :] *= 100  # groups of unlike extents
    cache = cache_of(x, x, "int4")
    words, scales = packed(x)
    assert cache.k.tobytes() == cache.v.tobytes() == words.tobytes()
    assert cache.k_scales.tobytes() == cache.v_scales.tobytes() == scales.tobytes()
    assert cache.k.shape == (1, 1, 60, -(-dim // 32) * 17)
    multiples = np.repeat(words[..., 16::17] % 8 + 1, 32, axis=-1)[0, 0, :, :dim]
    error = abs(numbers(cache) - x[0, 0].astype(np.float64))
    assert np.all(error <= 0.500001 * multiples * scales[0, 0, :, np.newaxis])
    assert np.all(numbers(cache)[0] == 0)


def test_the_largest_numbers_stay_finite() -> None:
    largest = np.finfo(np.float32).max
    x = np.array([-largest, largest, 0, 1, largest / 2, -largest / 3], np.float32).reshape(1, 1, 1, 6)
    cache = cache_of(x, x, "int4")
    found = numbers(cache)[0].astype(np.float32)
    assert np.isfinite(found).all()
    assert np.all(abs(found.astype(np.float64) - x[0, 0, 0]) <= 2 * largest.astype(np.float64) / 15)
    assert np.isfinite(sa.attention_with_kvcache(np.zeros_like(x), cache)).all()


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite(normal: Any, odd: float) -> None:
    x = normal(1, 2, 5, 70)
    x[0, 1, 3, 69] = odd
    cache = cache_of(x, x, "int4")
    scales = cache.k_scales
    assert scales is not None
    assert np.argwhere(np.isnan(scales)).tolist() == [[0, 1, 3]]
    assert not cache.k[0, 1, 3].any()


def test_any_bytes_are_codes_of_at_most_120() -> None:
    words = np.random.default_rng(0).integers(0, 256, (1000, 34)).astype(np.uint8)
    words[:256, 16] = words[:256, 33] = np.arange(256)
    words[:16, :16], words[16:32, :16] = 0, 255
    stored = ELEMENT_TYPES["int4"]
    for dim in (33, 50, 64):
        found = stored.numbers(words.view(stored.memory), None, dim)
        assert np.array_equal(found, unpacked(words, dim))
        assert abs(found).max() == stored.codes


@pytest.mark.parametrize("q_len", [1, 3, 80])
@pytest.mark.parametrize("q_dtype", ["float32", "float16", "float64"])
@pytest.mark.parametrize("dim", [5, 33, 128])
def test_attention_is_that_of_the_same_8_bit_codes(isa: str, normal: Any, dim: int, q_dtype: str, q_len: int) -> None:
    q, k, v = normal(1, 4, q_len, dim).astype(q_dtype), normal(1, 2, 600, dim), normal(1, 2, 600, 40)
    cache = cache_of(k, v, "int4")
    twin = cache_of(k, v, "int8")
    for words, codes, width in ((cache.k, twin._store.k, dim), (cache.v, twin._store.v, 40)):
        codes[...] = unpacked(words, width)
    twin._store.k_scales[...], twin._store.v_scales[...] = cache.k_scales, cache.v_scales
    for options in ({}, {"causal": False, "kv_starts": 70}, {"window": (90, 0)}):
        found, wanted = (
            sa.attention_with_kvcache(q, x, return_lse=True, return_weights=q_len == 3, **options)
            for x in (cache, twin)
        )
        assert all(np.array_equal(x, y) for x, y in zip(found, wanted, strict=True))


def test_arrays_of_packed_codes_are_bytes() -> None:
    cache = sa.PagedKVCache(3, 4, 2, 40, dtype="int4")
    rows = 3 * 2 * 4
    assert rows * 2 * (2 * 17 + 4) <= cache.nbytes < rows * 2 * (2 * 17 + 4) + 4 * 64
    assert "dtype='int4'" in repr(cache)
    with pytest.raises(TypeError, match=r"holds float32, but q has float16"):
        sa.attention_with_kvcache(np.zeros((1, 2, 1, 40), np.float16), sa.KVCache(1, 2, 40, 3))
