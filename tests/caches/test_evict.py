"""Tokens that are evicted from caches: what is left, for each head, and for which positions its keys are rotated."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import selfattn as sa
from selfattn import _evict, reference

BATCH, HEADS, KV_HEADS, DIM, LENGTH = 2, 4, 2, 64, 30
TYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float64": np.float64}
STORAGE = ["float32", "float64", "float16", "bfloat16", "int8", "int4"]
KEEP = np.array([[[0, 1, 5, 9, 29], [0, 3, 4, 7, 8]], [[2, 3, 11, -1, -1], [0, 1, 2, -1, -1]]])
ROWS = [row[row >= 0].reshape(KV_HEADS, -1) for row in KEEP]


def taken(x: Any, b: int, rows: Any) -> Any:
    """Return the rows (KV_HEADS, n) of x[b], (KV_HEADS, length, ·)."""
    return x[b][np.arange(KV_HEADS)[:, np.newaxis], rows]


class Both:
    """A KVCache and a PagedKVCache with the same tokens."""

    def __init__(self, dtype: str = "float32", values: str = "own", pages: int = 60) -> None:
        named = {"dtype": dtype, "values": values, "value_dim": 32}
        self.batch = sa.KVCache(BATCH, KV_HEADS, DIM, 40, **named)
        self.paged = sa.PagedKVCache(pages, 4, KV_HEADS, DIM, **named)
        self.ids = [self.paged.allocate() for _ in range(BATCH)]

    def append(self, k: Any, v: Any) -> None:
        own = self.batch.values == "own"
        self.batch.append(k, *([v] if own else []))
        for b, name in enumerate(self.ids):
            self.paged.append(name, k[b], *([v[b]] if own else []))

    def evict(self, rope: Any = None) -> None:
        self.batch.evict(KEEP, rope)
        for name, rows in zip(self.ids, ROWS, strict=True):
            self.paged.evict(name, rows, rope)

    def attend(self, q: Any, *tokens: Any, **options: Any) -> list[Any]:
        return [
            sa.attention_with_kvcache(q, self.batch, *tokens, **options),
            sa.attention_with_kvcache(q, self.paged, *tokens, sequences=self.ids, **options),
        ]


@pytest.mark.parametrize("values", ["own", "prefix"])
@pytest.mark.parametrize("dtype", STORAGE)
def test_attention_over_what_is_left(isa: str, normal: Any, dtype: str, values: str) -> None:
    kind = TYPES.get(dtype, np.float32)
    k, more = (normal(BATCH, KV_HEADS, n, DIM, dtype=kind) for n in (LENGTH, 3))
    v, more_v = (x[..., :32] if values == "prefix" else x[..., 32:] for x in (k, more))
    q = normal(BATCH, HEADS, 3, DIM, dtype=kind)
    found = Both(dtype, values)
    found.append(k, v)
    found.evict()
    assert found.batch.lengths.tolist() == [found.paged.length(name) for name in found.ids] == [5, 3]
    outs = found.attend(q, more, None if values == "prefix" else more_v)
    assert np.array_equal(*outs)
    bound = {"int4": 0.4, "int8": 0.03, "bfloat16": 0.03, "float16": 3e-3, "float64": 1e-12}.get(dtype, 1e-5)
    for b, rows in enumerate(ROWS):
        keys, new = (np.concatenate([taken(x, b, rows), y[b]], axis=1) for x, y in ((k, more), (v, more_v)))
        exact = reference.attention(*(x.astype(np.float64) for x in (q[b], keys, new)), causal=True)
        assert np.max(abs(outs[0][b].astype(np.float64) - exact.out)) < bound
        if dtype in ("int8", "int4"):  # codes and scales are moved, not made again
            fresh = sa.KVCache(1, KV_HEADS, DIM, 40, dtype=dtype, value_dim=32, values=values)
            fresh.append(keys[None], *([new[None]] if values == "own" else []))
            assert found.batch.k[b, :, : keys.shape[1]].tobytes() == fresh.k[0, :, : keys.shape[1]].tobytes()
            assert np.array_equal(found.batch.v_scales[b, :, : keys.shape[1]], fresh.v_scales[0, :, : keys.shape[1]])


@pytest.mark.parametrize(
    "rope",
    [
        sa.RoPE(),
        sa.RoPE(base=500.0, rotary_dim=24, interleaved=True, attention_scaling=1.5),
        sa.RoPE(inv_freq=[1.0, 0.3, 0.01], attention_scaling=0.7),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_renewed_positions(isa: str, normal: Any, dtype: str, rope: Any) -> None:
    kind = TYPES.get(dtype, np.float32)
    k = normal(BATCH, KV_HEADS, LENGTH, DIM)
    found = Both(dtype)
    found.append(sa.apply_rope(k, rope=rope).astype(kind), k[..., :32].astype(kind))
    found.evict(rope)
    bound = {"float16": 4e-3, "bfloat16": 0.03, "float64": 1e-6}.get(dtype, 1e-5)
    for b, rows in enumerate(ROWS):
        fresh = sa.apply_rope(taken(k, b, rows), rope=rope)
        error = abs(found.batch.k[b, :, : rows.shape[1]].astype(np.float64) - fresh)
        assert np.all(error <= bound * np.maximum(abs(fresh), 1))
    q, new = (normal(BATCH, n, 2, DIM).astype(kind) for n in (HEADS, KV_HEADS))
    outs = found.attend(q, new, new[..., :32], rope=rope)  # at the positions 5 and 3, the next indices
    assert np.array_equal(*outs)
    rotated, own = (sa.apply_rope(x[0].astype(np.float32), np.arange(5, 7), rope) for x in (q, new))
    keys = np.concatenate([sa.apply_rope(taken(k, 0, ROWS[0]), rope=rope), own], axis=1)
    values = np.concatenate([taken(k, 0, ROWS[0]), new[0].astype(np.float32)], axis=1)[..., :32]
    exact = sa.attention(rotated, keys, values, causal=True)
    assert np.allclose(outs[0][0].astype(np.float32), exact, rtol=0, atol=5 * bound)


def test_kept_positions(isa: str, normal: Any) -> None:
    k, q, new = normal(BATCH, KV_HEADS, LENGTH, DIM), normal(BATCH, HEADS, 1, DIM), normal(BATCH, KV_HEADS, 1, DIM)
    found = Both()
    found.append(sa.apply_rope(k), k[..., :32])
    found.evict()
    outs = found.attend(q, new, new[..., :32], rope=True, positions=[LENGTH])
    assert np.array_equal(*outs)
    for b, rows in enumerate(ROWS):
        keys = np.concatenate([taken(sa.apply_rope(k), b, rows), sa.apply_rope(new[b], [LENGTH])], axis=1)
        values = np.concatenate([taken(k, b, rows), new[b]], axis=1)[..., :32]
        exact = sa.attention(sa.apply_rope(q[b], [LENGTH]), keys, values)
        assert np.allclose(outs[0][b], exact, rtol=0, atol=1e-5)


@pytest.mark.one_isa
def test_forks_keep_their_tokens(normal: Any) -> None:
    cache, k = sa.PagedKVCache(12, 4, KV_HEADS, DIM), normal(KV_HEADS, 22, DIM)
    name = cache.allocate()
    cache.append(name, k, k)
    fork, q = cache.fork(name), normal(1, HEADS, 1, DIM)
    before = sa.attention_with_kvcache(q, cache, sequences=[fork])
    cache.evict(name, np.arange(18))  # nothing moves, so all pages remain shared
    assert cache.num_free_pages == 6
    cache.evict(name, [*range(9), 11, 17])  # the first two pages remain shared
    assert cache.num_free_pages == 5
    assert np.array_equal(sa.attention_with_kvcache(q, cache, sequences=[fork]), before)
    cache.append(name, k[:, :20], k[:, :20])
    kept = k[:, [*range(9), 11, 17, *range(20)]]
    exact = sa.attention(q[0], kept, kept)
    assert np.allclose(sa.attention_with_kvcache(q, cache, sequences=[name])[0], exact, atol=1e-5)
    assert cache.num_free_pages == 0
    twin = cache.fork(fork)  # so that all pages of both are shared
    with pytest.raises(MemoryError, match="evict: 1 pages are needed, but 0 are free"):
        cache.evict(fork, [0, 2])
    assert np.array_equal(sa.attention_with_kvcache(q, cache, sequences=[fork]), before)
    cache.free(twin)
    cache.evict(fork, [0, 2])  # in a page that only the fork has
    assert cache.num_free_pages == 3
    cache.evict(name, [30])
    cache.free(name)
    cache.free(fork)
    assert cache.num_free_pages == 12
    assert cache.allocate() == 3  # ids are never reused


@pytest.mark.one_isa
def test_a_process_that_is_killed(normal: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, k = (BATCH, KV_HEADS, DIM, 40), normal(BATCH, KV_HEADS, LENGTH, DIM)
    memory = bytearray(sa.KVCache.buffer_size(*sizes))
    cache = sa.KVCache(*sizes, buffer=memory)
    cache.append(k, k)
    apply, left = _evict.Moves.apply, []

    def observed(moves: Any) -> None:
        apply(moves)
        left.append(sa.KVCache(*sizes, buffer=bytearray(memory)))

    monkeypatch.setattr(_evict.Moves, "apply", observed)
    cache.evict([[0, 1, 2, 9], [0, 5, 6, 7]])
    assert left[0].lengths.tolist() == [3, 1]
    assert np.array_equal(left[0].k[0, :, :3], k[0, :, :3])
    assert np.array_equal(left[0].v[1, :, :1], k[1, :, :1])
    again = sa.KVCache(*sizes, buffer=memory)
    assert again.lengths.tolist() == [4, 4]
    assert np.array_equal(again.k[1, :, :4], k[1][:, [0, 5, 6, 7]])


@pytest.mark.one_isa
def test_nothing_stays(normal: Any) -> None:
    cache, pages = sa.KVCache(2, 1, 8, 9), sa.PagedKVCache(4, 4, 1, 8)
    x = normal(2, 1, 5, 8)
    cache.append(x, x)
    cache.evict([[], []])
    assert cache.lengths.tolist() == [0, 0]
    name = pages.allocate()
    pages.append(name, x[0], x[0])
    pages.evict(name, [])
    assert (pages.length(name), pages.num_free_pages) == (0, 4)


@pytest.mark.one_isa
def test_refusals(normal: Any) -> None:
    k = normal(BATCH, KV_HEADS, LENGTH, DIM)
    found = Both()
    found.append(k, k[..., :32])
    cache, name = found.batch, found.ids[1]
    cases: list[tuple[Any, str]] = [
        ([0, 1], r"keep has shape \(2,\), but \(2, n\) or \(2, 2, n\) is needed"),
        (np.zeros((2, 3, 1), int), r"keep has shape \(2, 3, 1\), but \(2, n\) or \(2, 2, n\)"),
        ([[0, 1], [3, 30]], "keep holds 30, but sequence 1 has 30 tokens"),
        ([[0, 1], [-2, 3]], "keep holds -2, but sequence 1"),
        ([[0, 1], [4, 4]], "keep holds 4 before 4, but indices ascend, and -1 only ends a row"),
        ([[0, 1], [-1, 4]], "keep holds -1 before 4, but indices ascend"),
        (
            [[[0, 1], [2, 3]], [[0, 1], [2, -1]]],
            "keep has 2 tokens for head 0 of sequence 1, but 1 for head 1: all heads must keep the same number",
        ),
    ]
    for keep, message in cases:
        with pytest.raises(ValueError, match=f"^evict: {message}"):
            cache.evict(keep)
    paged_cases: list[tuple[Any, str]] = [
        (0, r"keep has shape \(\), but \(n,\) or \(2, n\) is needed"),
        ([0, 30], "keep holds 30, but sequence 1 has 30 tokens"),
    ]
    for keep, message in paged_cases:
        with pytest.raises(ValueError, match=f"^evict: {message}"):
            found.paged.evict(name, keep)
    with pytest.raises(ValueError, match=r"^evict: sequence 7 is not live"):
        found.paged.evict(7, [0])
    for keep in (np.ones((2, 30), bool), np.zeros((2, 1)), None):
        with pytest.raises(TypeError, match=r"^evict: keep"):
            cache.evict(keep)
    ropes: list[tuple[Any, Any, str]] = [
        (Both("int8"), True, "rope is given, but the cache holds int8: codes are moved"),
        (Both("float32", "prefix"), True, "rope is given, but values are a part of keys"),
        (found, sa.RoPE(inv_freq=[1.0, 0.1], axes=[0, 1]), "rope is given, but it has axes"),
        (found, sa.RoPE(rotary_dim=66), "rope"),
    ]
    for both, rope, message in ropes:
        for call in (lambda: both.batch.evict(KEEP, rope), lambda: both.paged.evict(name, [0], rope)):  # noqa: B023
            with pytest.raises(ValueError, match=f"^evict: {message}"):
                call()
    with pytest.raises(TypeError, match=r"^evict: rope is 3"):
        cache.evict(KEEP, 3)
    ring = sa.KVCache(1, 1, 4, 8, window=3)
    with pytest.raises(ValueError, match=r"^evict: the cache has a window of 3 tokens"):
        ring.evict(np.zeros((1, 0), int))
    assert np.array_equal(cache.k[:, :, :LENGTH], k)
    assert cache.lengths.tolist() == [LENGTH] * 2
    cache.evict(np.zeros((2, 0), int))
    assert not cache.lengths.any()
