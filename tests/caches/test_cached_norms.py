"""Norms of queries and new keys in `attention_with_kvcache`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import selfattn as sa
from selfattn import reference

HEADS, KV_HEADS, DIM = 4, 2, 8
ROPE = sa.RoPE()


def norms(rng: Any, kind: str) -> dict[str, Any]:
    """Return q_norm and k_norm, for each head or for all heads of a token."""
    sizes = (DIM, DIM) if kind == "each head" else (HEADS * DIM, KV_HEADS * DIM)
    weights = [rng.standard_normal(size) for size in sizes]
    if kind == "layer norms":
        return {name: sa.LayerNorm(w, -w) for name, w in zip(("q_norm", "k_norm"), weights, strict=True)}
    return {name: sa.RMSNorm(w) for name, w in zip(("q_norm", "k_norm"), weights, strict=True)}


def normalised(norm: Any, x: Any) -> Any:
    """Return float64 heads (B, H, S, D) after a norm."""
    tokens = x.astype(np.float64).swapaxes(1, 2)
    rows = tokens.reshape(-1, len(norm.weight))
    centred = isinstance(norm, sa.LayerNorm)
    rows = rows - rows.mean(axis=1, keepdims=True) if centred else rows
    rows = rows / np.sqrt(np.mean(rows**2, axis=1, keepdims=True) + norm.eps) * norm.weight
    rows = rows + norm.bias if centred else rows
    return rows.reshape(tokens.shape).swapaxes(1, 2)


def make_cache(kind: str) -> tuple[Any, dict[str, Any]]:
    if kind == "contiguous":
        return sa.KVCache(2, KV_HEADS, DIM, 16), {}
    cache = sa.PagedKVCache(20, 3, KV_HEADS, DIM)
    return cache, {"sequences": [cache.allocate(), cache.allocate()]}


@pytest.mark.parametrize("cache_kind", ["contiguous", "paged"])
@pytest.mark.parametrize("kind", ["each head", "all heads", "layer norms"])
@pytest.mark.parametrize("rope", [None, ROPE])
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_definition(rng: Any, normal: Any, cache_kind: str, kind: str, rope: Any, layout: str) -> None:
    q, k, v = normal(2, HEADS, 9, DIM), *(normal(2, KV_HEADS, 9, DIM) for _ in range(2))
    own, (cache, options) = norms(rng, kind), make_cache(cache_kind)
    as_given = (lambda x: x.swapaxes(1, 2)) if layout == "bshd" else (lambda x: x)
    before = [x.copy() for x in (q, k)]
    parts = [
        as_given(sa.attention_with_kvcache(as_given(q[:, :, part]), cache, as_given(k[:, :, part]),
                                           as_given(v[:, :, part]), rope=rope, layout=layout, **own, **options))
        for part in (slice(0, 4), slice(4, 5), slice(5, 9))
    ]  # fmt: skip
    wide_q, wide_k = (normalised(own[name], x) for name, x in (("q_norm", q), ("k_norm", k)))
    if rope:
        wide_q, wide_k = (sa.apply_rope(x, rope=rope) for x in (wide_q, wide_k))
    expected = reference.attention(wide_q, wide_k, v.astype(np.float64), causal=True).out
    assert np.max(abs(np.concatenate(parts, axis=2) - expected)) < 1e-5
    assert all(np.array_equal(old, new) for old, new in zip(before, (q, k), strict=True))


def test_one_of_them_and_a_cascade(rng: Any, normal: Any) -> None:
    own = norms(rng, "each head")
    cache = sa.PagedKVCache(20, 4, KV_HEADS, DIM)
    prompt = cache.allocate()
    cache.append(prompt, *(normal(KV_HEADS, 8, DIM) for _ in range(2)))
    twins = [(cache.fork(prompt), cache.fork(prompt)) for _ in range(3)]
    q, k, v = normal(2, HEADS, 1, DIM), *(normal(2, KV_HEADS, 1, DIM) for _ in range(2))
    q_only = sa.attention_with_kvcache(q, cache, k, v, sequences=twins[0], q_norm=own["q_norm"])
    before = own["q_norm"](q)
    assert np.array_equal(q_only, sa.attention_with_kvcache(before, cache, k, v, sequences=twins[1]))
    whole = sa.attention_with_kvcache(q, cache, sequences=twins[0], q_norm=own["q_norm"], cascade=True)
    assert np.allclose(whole, q_only, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow(rng: Any, normal: Any, dtype: str) -> None:
    pytest.importorskip("ml_dtypes")
    cache, own = sa.KVCache(1, KV_HEADS, DIM, 8, dtype=dtype), norms(rng, "all heads")
    q, k, v = (normal(1, n, 5, DIM).astype(np.dtype(dtype)) for n in (HEADS, KV_HEADS, KV_HEADS))
    out = sa.attention_with_kvcache(q, cache, k, v, **own)
    expected = reference.attention(
        normalised(own["q_norm"], q), normalised(own["k_norm"], k), v.astype(np.float64), causal=True
    ).out
    assert out.dtype == np.dtype(dtype)
    assert np.max(abs(out.astype(np.float64) - expected)) < (1e-2 if dtype == "float16" else 6e-2)


@pytest.mark.one_isa
def test_errors(normal: Any) -> None:
    cache = sa.KVCache(1, KV_HEADS, DIM, 8)
    q, k, v = normal(1, HEADS, 1, DIM), *(normal(1, KV_HEADS, 1, DIM) for _ in range(2))
    call = sa.attention_with_kvcache
    with pytest.raises(ValueError, match=r"^attention_with_kvcache: q_norm is of 3 numbers, but 8 .* or 32 "):
        call(q, cache, k, v, q_norm=sa.RMSNorm(np.ones(3)))
    with pytest.raises(TypeError, match="k_norm is a float, but a LayerNorm or an RMSNorm is needed"):
        call(q, cache, k, v, k_norm=1.0)
    with pytest.raises(ValueError, match="k_norm is given without k"):
        call(q, cache, k_norm=sa.RMSNorm())
    with pytest.raises(ValueError, match=r"q has shape \(4, 1, 8\)"):
        call(q[0], cache, k, v, q_norm=sa.RMSNorm())
    with pytest.raises(TypeError, match="k has dtype int64"):
        call(q, cache, k.astype(np.int64), v, k_norm=sa.RMSNorm())
    latents = sa.KVCache(1, 1, DIM, 8, value_dim=4, values="prefix")
    with pytest.raises(ValueError, match="k_norm is given, but values are a part of keys"):
        call(q, latents, k[:, :1], k_norm=sa.RMSNorm())
    assert cache.lengths[0] == latents.lengths[0] == 0
