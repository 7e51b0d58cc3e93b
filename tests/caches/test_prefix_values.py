"""Caches whose values are the first numbers of their keys, as in latent attention."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import selfattn as sa

BATCH, HEADS, KV_HEADS, WIDTH, PREFIX = 3, 8, 2, 96, 64
BFLOAT = np.dtype(ml_dtypes.bfloat16)


def caches(dtype: str, values: str, capacity: int = 300, **options: Any) -> Any:
    return sa.KVCache(BATCH, KV_HEADS, WIDTH, capacity, value_dim=PREFIX, dtype=dtype, values=values, **options)


def paged(dtype: str, values: str) -> Any:
    cache = sa.PagedKVCache(60, 16, KV_HEADS, WIDTH, value_dim=PREFIX, dtype=dtype, values=values)
    return cache, [cache.allocate() for _ in range(BATCH)]


def query_type(dtype: str) -> Any:
    return {"bfloat16": BFLOAT, "float16": np.float16, "float64": np.float64}.get(dtype, np.float32)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_as_with_values_of_its_own(isa: str, normal: Any, dtype: str) -> None:
    kind = query_type(dtype)
    own, shared = caches(dtype, "own"), caches(dtype, "prefix")
    (own_pages, own_ids), (shared_pages, ids) = paged(dtype, "own"), paged(dtype, "prefix")
    assert shared.nbytes < 0.61 * own.nbytes
    for tokens in (150, 1, 7):
        k = normal(BATCH, KV_HEADS, tokens, WIDTH, dtype=kind)
        q = normal(BATCH, HEADS, tokens, WIDTH, dtype=kind)
        expected = sa.attention_with_kvcache(q, own, k, k[..., :PREFIX], return_lse=True)
        found = sa.attention_with_kvcache(q, shared, k, return_lse=True)
        assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
        expected = sa.attention_with_kvcache(q, own_pages, k, k[..., :PREFIX], sequences=own_ids)
        assert np.array_equal(sa.attention_with_kvcache(q, shared_pages, k, sequences=ids), expected)
    assert np.array_equal(shared.v, shared.k[..., :PREFIX])
    assert np.array_equal(shared.k[:, :, :158], own.k[:, :, :158])
    q = normal(BATCH, HEADS, 1, WIDTH, dtype=kind)
    for change in (lambda c: c.reorder([2, 0, 0]), lambda c: c.truncate([158, 100, 3])):
        change(own)
        change(shared)
        expected = sa.attention_with_kvcache(q, own)
        for cache in (shared, copy.copy(shared), pickle.loads(pickle.dumps(shared))):
            assert np.array_equal(sa.attention_with_kvcache(q, cache), expected)
            assert cache.values == "prefix"
    for cache, sequences in ((own_pages, own_ids), (shared_pages, ids)):
        sequences[1] = cache.fork(sequences[0])
        k = normal(1, KV_HEADS, 20, WIDTH, dtype=kind)[0] * 0 + 0.5
        cache.append(sequences[1], k, *([k[..., :PREFIX]] if cache.values == "own" else []))
    expected = sa.attention_with_kvcache(q, own_pages, sequences=own_ids)
    again = pickle.loads(pickle.dumps(shared_pages))
    for cache in (shared_pages, again):
        assert np.array_equal(sa.attention_with_kvcache(q, cache, sequences=ids), expected)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_codes(isa: str, normal: Any, dtype: str) -> None:
    shared = caches(dtype, "prefix")
    k, q = normal(BATCH, KV_HEADS, 200, WIDTH), normal(BATCH, HEADS, 1, WIDTH)
    shared.append(k)
    stored = shared.k if dtype == "int4" else shared.k * shared.k_scales[..., None]
    if dtype == "int8":
        plain = sa.attention(q, stored[:, :, :200], stored[:, :, :200, :PREFIX])
        assert np.allclose(sa.attention_with_kvcache(q, shared), plain, atol=2e-5)
    exact = sa.attention(q, k, k[..., :PREFIX])
    assert np.allclose(sa.attention_with_kvcache(q, shared), exact, atol=0.02 if dtype == "int8" else 0.3)
    assert np.shares_memory(shared.k_scales, shared.v_scales)
    assert np.array_equal(
        sa.attention_with_kvcache(q, pickle.loads(pickle.dumps(shared))), sa.attention_with_kvcache(q, shared)
    )


def test_rings_buffers_and_cascades(isa: str, normal: Any) -> None:
    own, shared = (caches("float32", values, 64, window=31) for values in ("own", "prefix"))
    for _ in range(9):
        k, q = normal(BATCH, KV_HEADS, 20, WIDTH), normal(BATCH, HEADS, 20, WIDTH)
        expected = sa.attention_with_kvcache(q, own, k, k[..., :PREFIX], window=(31, 0))
        assert np.array_equal(sa.attention_with_kvcache(q, shared, k, window=(31, 0)), expected)
    sizes = {"value_dim": PREFIX, "values": "prefix"}
    memory = bytearray(sa.KVCache.buffer_size(BATCH, KV_HEADS, WIDTH, 64, **sizes))
    cache = sa.KVCache(BATCH, KV_HEADS, WIDTH, 64, buffer=memory, **sizes)
    cache.append(normal(BATCH, KV_HEADS, 9, WIDTH))
    again = sa.KVCache(BATCH, KV_HEADS, WIDTH, 64, buffer=memory, **sizes)
    assert np.array_equal(again.k, cache.k)
    with pytest.raises(ValueError, match="buffer holds something else than a KVCache"):
        sa.KVCache(BATCH, KV_HEADS, WIDTH, 64, buffer=memory, value_dim=WIDTH, values="prefix")
    pages, ids = paged("float32", "prefix")
    pages.append(ids[0], normal(KV_HEADS, 100, WIDTH))
    ids = [ids[0], pages.fork(ids[0]), pages.fork(ids[0])]
    q, k = normal(BATCH, HEADS, 1, WIDTH), normal(BATCH, KV_HEADS, 1, WIDTH)
    plain = sa.attention_with_kvcache(q, pages, k, sequences=ids)
    for name in ids:
        pages.truncate(name, 100)
    assert np.allclose(sa.attention_with_kvcache(q, pages, k, sequences=ids, cascade=True), plain, atol=1e-5)


@pytest.mark.one_isa
def test_refusals(normal: Any) -> None:
    cache = caches("float32", "prefix")
    k = normal(BATCH, KV_HEADS, 2, WIDTH)
    q = normal(BATCH, HEADS, 2, WIDTH)
    layer = sa.SelfAttention(*[normal(WIDTH, WIDTH)] * 3, num_heads=1)
    calls: list[tuple[Any, str]] = [
        (lambda: cache.append(k, k), "append: v is given, but the cache takes it from k"),
        (lambda: sa.attention_with_kvcache(q, cache, k, k), "v is given, but the cache takes it from k"),
        (lambda: sa.attention_with_kvcache(q, cache, None, k), "v is given without k"),
        (lambda: sa.attention_with_kvcache(q, cache, k, rope=True), "rope is given, but values are a part of keys"),
        (lambda: sa.attention_with_kvcache(q, caches("float32", "own"), k), "k is given without v"),
        (lambda: layer(normal(BATCH, 1, WIDTH), cache=cache), "cache takes its values from the keys, but a layer"),
        (lambda: caches("float32", "both"), "KVCache: values is 'both'"),
        (
            lambda: sa.KVCache(1, 1, 8, 4, value_dim=9, values="prefix"),
            "value_dim is 9, but as a prefix .* head_dim = 8",
        ),
        (lambda: sa.KVCache(1, 1, 64, 4, value_dim=40, values="prefix", dtype="int4"), "a multiple of 32 for int4"),
    ]
    for call, message in calls:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="append: v"):
        caches("float32", "own").append(k)
    assert not cache.lengths.any()
    assert "values='prefix'" in repr(cache)
