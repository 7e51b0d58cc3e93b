"""Caches and packed sequences: each sequence's result is bit-identical to that of the sequence alone."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from cache_model import STORAGE, storage_dtype

import selfattn as sa

HEADS, KV_HEADS, DIM, VALUE_DIM = 4, 2, 16, 8
LENGTHS = [1, 15, 16, 17, 127, 128, 129, 511, 512, 513, 1023, 1024, 1025, 2051]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"causal": False},
    {"window": (40, 0)},
    {"window": (600, None), "softcap": 3.0},
    {"sinks": np.linspace(-1, 1, HEADS), "alibi_slopes": np.linspace(0.01, 0.1, HEADS), "scale": -0.4},
]


def normals(rng: Any, *shapes: tuple[int, ...], dtype: Any = np.float32) -> list[Any]:
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def tokens(rng: Any, length: int, dtype: Any = np.float32) -> tuple[Any, Any]:
    """Keys and values of one sequence, (Hkv, length, ·)."""
    k, v = normals(rng, (KV_HEADS, length, DIM), (KV_HEADS, length, VALUE_DIM), dtype=dtype)
    return k, v


def queries(rng: Any, batch: int, q_len: int) -> Any:
    return normals(rng, (batch, HEADS, q_len, DIM))[0]


def answer(q: Any, cache: Any, *arguments: Any, **options: Any) -> tuple[Any, Any]:
    out, lse = sa.attention_with_kvcache(q, cache, *arguments, return_lse=True, **options)
    return out, lse


def same(found: tuple[Any, Any], expected: tuple[Any, Any]) -> bool:
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(found, expected, strict=True))


def alone(q: Any, k: Any, v: Any, dtype: str, **options: Any) -> tuple[Any, Any]:
    """Return the answer of a contiguous cache that holds nothing else."""
    cache = sa.KVCache(1, KV_HEADS, DIM, k.shape[1], value_dim=VALUE_DIM, dtype=dtype)
    cache.append(k[np.newaxis], v[np.newaxis])
    return answer(q[np.newaxis], cache, **options)


def contiguous(rows: list[tuple[Any, Any]], dtype: str, spare: int = 7) -> sa.KVCache:
    """Put sequences of different lengths into one cache: append all at the longest length, then truncate."""
    lengths = [k.shape[1] for k, _ in rows]
    cache = sa.KVCache(
        len(rows), KV_HEADS, DIM, max(lengths) + spare, value_dim=VALUE_DIM, dtype=dtype
    )  # truncated tokens stay in memory as garbage
    k, v = (np.full((len(rows), KV_HEADS, max(lengths), dim), np.float32(3)) for dim in (DIM, VALUE_DIM))
    for b, (row_k, row_v) in enumerate(rows):
        k[b, :, : lengths[b]], v[b, :, : lengths[b]] = row_k, row_v
    cache.append(k, v)
    cache.truncate(lengths)
    return cache


def paged(rows: list[tuple[Any, Any]], page_size: int, dtype: str) -> tuple[sa.PagedKVCache, list[int]]:
    """Append to the sequences in turn, so that the pages of one sequence are not adjacent."""
    pages = sum(-(-k.shape[1] // page_size) for k, _ in rows)
    cache = sa.PagedKVCache(pages, page_size, KV_HEADS, DIM, value_dim=VALUE_DIM, dtype=dtype)
    names = [cache.allocate() for _ in rows]
    step = max(page_size - 1, 1)
    for start in range(0, max(k.shape[1] for k, _ in rows), step):
        for name, (k, v) in zip(names, rows, strict=True):
            cache.append(name, k[:, start : start + step], v[:, start : start + step])
    return cache, names


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("q_len", [1, 3, 40])
def test_a_sequence_among_others_is_the_sequence_alone(isa: str, rng: Any, q_len: int, dtype: str) -> None:
    rows = [tokens(rng, length) for length in LENGTHS]
    q = queries(rng, len(rows), q_len)
    cache = contiguous(rows, dtype)
    for options in OPTIONS:
        together = answer(q, cache, **options)
        for threads in (1, 2, 5):
            assert same(answer(q, cache, num_threads=threads, **options), together)
        for b, (k, v) in enumerate(rows):
            assert same(alone(q[b], k, v, dtype, **options), (together[0][b : b + 1], together[1][b : b + 1]))


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("page_size", [1, 3, 16, 64])
def test_pages_do_not_matter(isa: str, rng: Any, page_size: int, dtype: str) -> None:
    rows = [tokens(rng, length) for length in LENGTHS]
    cache, names = paged(rows, page_size, dtype)
    single = contiguous(rows, dtype)
    for q_len in (1, 4, 33):
        q = queries(rng, len(rows), q_len)
        for options in OPTIONS if q_len == 4 else OPTIONS[:1]:
            expected = answer(q, single, **options)
            for threads in (None, 1, 7):
                assert same(answer(q, cache, sequences=names, num_threads=threads, **options), expected)
            order = rng.permutation(len(names))
            shuffled = answer(q[order], cache, sequences=[names[i] for i in order], **options)
            assert same(shuffled, (expected[0][order], expected[1][order]))


@pytest.mark.parametrize("length", LENGTHS)
def test_float32_is_plain_attention(isa: str, rng: Any, length: int) -> None:
    k, v = tokens(rng, length)
    for q_len in (1, 2, 5, 16, 70):
        q = queries(rng, 1, min(q_len, length))
        expected = sa.attention(q, k[np.newaxis], v[np.newaxis], causal=True, return_lse=True)
        assert same(alone(q[0], k, v, "float32"), expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("length", LENGTHS[::3])
def test_16_bits_are_plain_attention(isa: str, rng: Any, length: int, dtype: str) -> None:
    kind = storage_dtype(dtype)
    k, v = tokens(rng, length, kind)
    for q_dtype in (np.dtype(np.float32), kind):
        q = queries(rng, 1, min(3, length)).astype(q_dtype)
        expected = sa.attention(q, k[np.newaxis], v[np.newaxis], causal=True, return_lse=True)
        assert same(alone(q[0], k, v, dtype), expected)


@pytest.mark.parametrize("dtype", STORAGE)
def test_capacity_and_buffer_do_not_matter(isa: str, rng: Any, dtype: str) -> None:
    rows = [tokens(rng, length) for length in (1, 130, 1030)]
    q = queries(rng, len(rows), 3)
    expected = answer(q, contiguous(rows, dtype))
    for spare in (0, 1, 500, 3000):
        assert same(answer(q, contiguous(rows, dtype, spare)), expected)
    for shift in (0, 16, 48):  # where the buffer begins
        named: dict[str, Any] = {"value_dim": VALUE_DIM, "dtype": dtype}
        size = sa.KVCache.buffer_size(1, KV_HEADS, DIM, 1030, **named)
        buffer = np.zeros(size + 64, np.uint8)[shift:][:size]
        cache = sa.KVCache(1, KV_HEADS, DIM, 1030, buffer=buffer, **named)
        cache.append(*(x[np.newaxis] for x in rows[2]))
        assert same(answer(q[2:], cache), (expected[0][2:], expected[1][2:]))


@pytest.mark.parametrize("dtype", STORAGE)
def test_pieces_are_the_whole(isa: str, rng: Any, dtype: str) -> None:
    k, v = (x[np.newaxis] for x in tokens(rng, 1025))
    q = queries(rng, 1, 2)
    whole, pieces, called = (sa.KVCache(1, KV_HEADS, DIM, 1025, value_dim=VALUE_DIM, dtype=dtype) for _ in range(3))
    whole.append(k, v)
    at = 0
    for count in (0, 1, 1, 14, 1, 495, 0, 1, 511, 1):
        pieces.append(k[:, :, at : at + count], v[:, :, at : at + count])
        new = queries(rng, 1, count)
        if count:
            sa.attention_with_kvcache(new, called, k[:, :, at : at + count], v[:, :, at : at + count])
        at += count
    assert at == 1025
    for cache in (pieces, called):
        assert cache.k.tobytes() == whole.k.tobytes()
        assert cache.v.tobytes() == whole.v.tobytes()
        assert same(answer(q, cache), answer(q, whole))


def test_a_prompt_in_chunks_is_plain_attention_chunk_by_chunk(isa: str, rng: Any) -> None:
    k, v = (x[np.newaxis] for x in tokens(rng, 1030))
    q = queries(rng, 1, 1030)
    cache = sa.KVCache(1, KV_HEADS, DIM, 1030, value_dim=VALUE_DIM)
    for a, b in ((0, 512), (512, 513), (513, 1030)):
        out = sa.attention_with_kvcache(q[:, :, a:b], cache, k[:, :, a:b], v[:, :, a:b])
        assert np.array_equal(out, sa.attention(q[:, :, a:b], k[:, :, :b], v[:, :, :b], causal=True))


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_ring_is_a_long_cache(isa: str, rng: Any, dtype: str) -> None:
    window, total = 130, 1100
    k, v = (x[np.newaxis] for x in tokens(rng, total))
    long = sa.KVCache(1, KV_HEADS, DIM, total, value_dim=VALUE_DIM, dtype=dtype)
    ring = sa.KVCache(1, KV_HEADS, DIM, window + 37, value_dim=VALUE_DIM, dtype=dtype, window=window)
    pages = sa.PagedKVCache(16, 16, KV_HEADS, DIM, value_dim=VALUE_DIM, dtype=dtype, window=window)
    names = [pages.allocate()]
    at = 0
    while at < total:
        count = min(int(rng.integers(1, 38)), total - at)
        new = (queries(rng, 1, count), k[:, :, at : at + count], v[:, :, at : at + count])
        for left in (window, 3):
            arguments = new if left == window else new[:1]
            expected = answer(arguments[0], long, *arguments[1:], window=(left, 0))
            assert same(answer(arguments[0], ring, *arguments[1:], window=(left, 0)), expected)
            assert same(answer(arguments[0], pages, *arguments[1:], window=(left, 0), sequences=names), expected)
        at += count


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_codes_of_what_is_not_finite_are_nan(odd: float) -> None:
    k = np.ones((1, KV_HEADS, 3, DIM), np.float32)
    v = np.ones((1, KV_HEADS, 3, VALUE_DIM), np.float32)
    v[0, 1, 2, 4] = odd
    cache = sa.KVCache(1, KV_HEADS, DIM, 3, value_dim=VALUE_DIM, dtype="int8")
    cache.append(k, v)
    out = sa.attention_with_kvcache(np.ones((1, KV_HEADS, 3, DIM), np.float32), cache)
    assert np.isnan(cache.v_scales[0, 1, 2])
    assert np.isnan(out[0, 1, 2]).all()  # the token's whole row, if it is visible
    assert np.isfinite(np.delete(out.reshape(-1, VALUE_DIM), 5, axis=0)).all()


@pytest.mark.parametrize("q_len", [1, 3, 40])
def test_a_mask_of_the_newest_is_one_of_all(isa: str, rng: Any, q_len: int) -> None:
    rows = [tokens(rng, length) for length in (127, 600, 1100)]  # the newest are in one block, or in two
    q, mask = queries(rng, len(rows), q_len), rng.random((len(rows), 1, q_len, q_len)) < 0.7
    found = answer(q, contiguous(rows, "float32"), mask=mask, causal=False)
    for b, (k, v) in enumerate(rows):
        whole = np.concatenate([np.ones((1, q_len, k.shape[1] - q_len), bool), mask[b]], axis=2)
        assert same((found[0][b], found[1][b]), sa.attention(q[b], k, v, mask=whole, return_lse=True))


def test_tokens_may_be_views_of_the_cache(rng: Any) -> None:
    k, v = (x[np.newaxis] for x in tokens(rng, 4))
    cache = sa.KVCache(1, KV_HEADS, DIM, 8, value_dim=VALUE_DIM)
    cache.append(k, v)
    moved = cache.k[:, :, 1:4], cache.v[:, :, 1:4]
    cache.truncate(3)
    cache.append(*moved)  # the last of these tokens comes from the slot that the first is written to
    for held, x in ((cache.k, k), (cache.v, v)):
        assert np.array_equal(held[:, :, :6], x[:, :, [0, 1, 2, 1, 2, 3]])


def packed(rng: Any, q_lens: list[int], kv_lens: list[int], dtype: Any) -> list[Any]:
    totals = (sum(q_lens), HEADS, DIM), (sum(kv_lens), KV_HEADS, DIM), (sum(kv_lens), KV_HEADS, VALUE_DIM)
    return normals(rng, *totals, dtype=dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16], ids=lambda x: x.__name__)
@pytest.mark.parametrize("kind", ["few", "many", "both"])
def test_packed_sequences_are_each_alone(isa: str, rng: Any, kind: str, dtype: Any) -> None:
    kv_lens = [*LENGTHS, 0, 1]
    # The first sequence has no queries. The longest ones, whose keys are split, have some.
    few, many = [0, *(int(n) for n in rng.integers(1, 9, len(kv_lens) - 1))], [min(n, 300) for n in kv_lens]
    q_lens = {"few": few, "many": many, "both": [*few[:8], *many[8:]]}[kind]
    q, k, v = packed(rng, q_lens, kv_lens, dtype)
    ends = [np.cumsum([0, *lens]) for lens in (q_lens, kv_lens)]
    for options in ({}, {"causal": True}, {"causal": True, "window": (200, 0), "softcap": 5.0}):
        together = sa.attention_varlen(q, k, v, *ends, return_lse=True, **options)
        assert same(sa.attention_varlen(q, k, v, *ends, return_lse=True, num_threads=1, **options), together)
        for n in range(len(kv_lens)):
            own, keys = (slice(end[n], end[n + 1]) for end in ends)
            expected = sa.attention(q[own], k[keys], v[keys], layout="bshd", return_lse=True, **options)
            assert same((together[0][own], together[1][:, own]), expected)


def test_a_bias_with_a_mask_has_its_own_columns(isa: str, normal: Any) -> None:
    cache = sa.KVCache(1, 2, 8, 700)  # more than one block; the mask covers only the last
    cache.append(normal(1, 2, 700, 8), normal(1, 2, 700, 8))
    q, bias, everything = normal(1, 2, 5, 8), normal(1, 2, 5, 700), np.ones((5, 5), bool)
    plain = sa.attention_with_kvcache(q, cache, bias=bias)
    assert np.array_equal(sa.attention_with_kvcache(q, cache, bias=bias, mask=everything), plain)
    with pytest.raises(ValueError, match="bias has shape"):
        sa.attention_with_kvcache(q, cache, bias=bias[..., :5], mask=everything)


@pytest.mark.one_isa(reason="selects each set itself")
def test_nothing_is_read_where_a_released_page_would_be(run_python: Any) -> None:
    # An inaccessible page precedes the pool: a block of keys that starts before the first one held must
    # not read it.
    code = """
        import ctypes, mmap
        import numpy as np
        import selfattn as sa
        guard, need = mmap.PAGESIZE, sa.PagedKVCache.buffer_size(16, 16, 2, 16)
        memory = mmap.mmap(-1, guard + need)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start), guard, 0) == 0
        pool = np.frombuffer(memory, np.uint8)[guard:]
        for isa in sa.isas():
            pool[:] = 0
            rng = np.random.default_rng(0)
            cache = sa.PagedKVCache(16, 16, 2, 16, window=20, buffer=pool)
            sequence = cache.allocate()
            with sa.use_isa(isa):
                for tokens in (1, 30) * 20:
                    q, k, v = rng.standard_normal((3, 1, 2, tokens, 16), dtype=np.float32)
                    out = sa.attention_with_kvcache(q, cache, k, v, sequences=[sequence], window=(20, 0))
            assert np.isfinite(out).all()
        print(cache.length(sequence), cache.num_free_pages < 16)
    """
    assert run_python(code).split() == ["620", "True"]
