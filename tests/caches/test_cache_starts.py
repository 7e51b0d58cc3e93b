"""kv_starts: left-padded sequences in caches, and in packed sequences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import selfattn as sa

STARTS = [5, 0, 11]


def filled(k: Any, v: Any, kind: str, dtype: str = "float32") -> tuple[Any, dict[str, Any]]:
    """A cache that holds k and v, and the keywords of calls on it."""
    batch, heads, length, width = k.shape
    if kind == "pages":
        cache = sa.PagedKVCache(30, 4, heads, width, dtype=dtype)
        sequences = [cache.allocate() for _ in range(batch)]
        for b, sequence in enumerate(sequences):
            cache.append(sequence, k[b], v[b])
        return cache, {"sequences": sequences}
    window = {"window": 9} if kind == "ring" else {}
    made = sa.KVCache(batch, heads, width, capacity=length + 3 if kind == "rows" else 12, dtype=dtype, **window)
    for t in range(length):
        made.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
    return made, {"window": (9, 0)} if kind == "ring" else {}


@pytest.mark.parametrize("kind", ["rows", "ring", "pages"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "int4"])
@pytest.mark.parametrize("q_len", [1, 3])
def test_hidden_at_the_start(isa: str, normal: Any, kind: str, dtype: str, q_len: int) -> None:
    k, v, q = normal(3, 2, 20, 8), normal(3, 2, 20, 8), normal(3, 4, q_len, 8)
    cache, options = filled(k, v, kind, dtype)
    out, lse = sa.attention_with_kvcache(q, cache, kv_starts=STARTS, return_lse=True, **options)
    tolerance = {"float32": 2e-6, "float16": 5e-3, "int8": 0.1, "int4": 0.8}[dtype]
    window = options.get("window")
    expected, wanted = sa.attention(q, k, v, kv_starts=STARTS, causal=True, window=window, return_lse=True)
    assert np.max(abs(out - expected)) < tolerance
    assert np.max(abs(lse - wanted)) < tolerance
    whole = sa.attention_with_kvcache(q, cache, **options)
    assert np.array_equal(out[1], whole[1])  # nothing of this sequence is hidden
    assert np.array_equal(sa.attention_with_kvcache(q, cache, kv_starts=0, **options), whole)


@pytest.mark.parametrize("kind", ["rows", "pages"])
def test_hidden_tokens_do_not_matter(isa: str, normal: Any, kind: str) -> None:
    k, v, q = normal(3, 2, 20, 8), normal(3, 2, 20, 8), normal(3, 4, 3, 8)
    for b, start in enumerate(STARTS):
        k[b, :, :start] = v[b, :, :start] = np.nan
    cache, options = filled(k, v, kind)
    out = sa.attention_with_kvcache(q, cache, kv_starts=STARTS, **options)
    for b, start in enumerate(STARTS):
        alone = sa.attention(q[b], k[b, :, start:], v[b, :, start:], causal=True)
        assert np.max(abs(out[b] - alone)) < 2e-6


def test_new_tokens_and_rope(normal: Any) -> None:
    """Relative positions do not depend on the padding; a sequence that is all padding gives 0."""
    q, k, v = normal(2, 4, 6, 8), normal(2, 2, 6, 8), normal(2, 2, 6, 8)
    cache = sa.KVCache(2, 2, 8, capacity=10)
    out = sa.attention_with_kvcache(q, cache, k, v, rope=True, kv_starts=np.array([4, 6]))
    alone = sa.KVCache(1, 2, 8, capacity=10)
    own = sa.attention_with_kvcache(q[:1, :, 4:], alone, k[:1, :, 4:], v[:1, :, 4:], rope=True)
    assert np.max(abs(out[:1, :, 4:] - own)) < 2e-6
    assert not out[0, :, :4].any()
    assert not out[1].any()


@pytest.mark.one_isa
@pytest.mark.parametrize(
    ("starts", "message"),
    [
        ([0, 21, 0], r"kv_starts holds 21, which is outside 0\.\.20 \(sequence 1\)"),
        ([-1, 0, 0], r"kv_starts holds -1"),
        ([0, 0], r"kv_starts has shape \(2,\), but \(3,\) is needed"),
        ([[0], [0], [0]], "kv_starts has shape"),
        ([0.5, 0, 0], "kv_starts has dtype float64, but integers"),
    ],
)
def test_errors(normal: Any, starts: Any, message: str) -> None:
    cache, _ = filled(normal(3, 2, 20, 8), normal(3, 2, 20, 8), "rows")
    with pytest.raises((TypeError, ValueError), match=f"^attention_with_kvcache: {message}"):
        sa.attention_with_kvcache(normal(3, 4, 1, 8), cache, kv_starts=starts)
    assert cache.lengths.tolist() == [20, 20, 20]


def test_packed_sequences_are_each_alone(isa: str, normal: Any) -> None:
    """Also their gradients."""
    q, k, v, grad = normal(9, 4, 8), normal(16, 2, 8), normal(16, 2, 8), normal(9, 4, 8)
    bounds = np.array([0, 4, 9]), np.array([0, 7, 16])
    starts = [2, 5]
    options: dict[str, Any] = {"causal": True, "alibi_slopes": sa.alibi_slopes(4)}
    out, lse = sa.attention_varlen(q, k, v, *bounds, kv_starts=starts, return_lse=True, **options)
    grads = sa.attention_varlen_backward(grad, q, k, v, out, lse, *bounds, kv_starts=starts, **options)
    once, vjp = sa.attention_varlen_vjp(q, k, v, *bounds, kv_starts=starts, **options)
    assert np.array_equal(once, out)
    assert np.allclose(vjp(grad).k, grads.k, rtol=0, atol=1e-5)
    for i, start in enumerate(starts):
        rows, keys = (slice(*x[i : i + 2]) for x in bounds)
        own = q[rows], k[keys], v[keys]
        single = {**options, "kv_starts": start, "layout": "bshd"}
        expected, own_lse = sa.attention(*own, return_lse=True, **single)
        assert np.array_equal(out[rows], expected)
        found = sa.attention_backward(grad[rows], *own, expected, own_lse, **single)
        assert np.array_equal(grads.q[rows], found.q)
        assert np.array_equal(grads.k[keys], found.k)
        assert not grads.v[keys][:start].any()
    with pytest.raises(ValueError, match=r"attention_varlen: kv_starts holds 8, which is outside 0\.\.7 .*sequence 0"):
        sa.attention_varlen(q, k, v, *bounds, kv_starts=[8, 0])
    with pytest.raises(ValueError, match=r"kv_starts has shape \(3,\), which does not broadcast"):
        sa.attention_varlen(q, k, v, *bounds, kv_starts=[0, 0, 0])
