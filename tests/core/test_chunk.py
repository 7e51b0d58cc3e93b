"""Chunks: queries see only keys of their own chunk of positions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import selfattn as sa
from selfattn import _core, reference


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("chunk", [1, 2, 15, 16, 17, 48, 64, 65, 200, 1 << 60])
@pytest.mark.parametrize("offset", [None, 0, 7, -3, -150, 10_000, [5, -20]])
@pytest.mark.parametrize("causal", [False, True])
def test_against_the_reference(check: Any, normal: Any, dtype: Any, chunk: int, offset: Any, causal: bool) -> None:
    q, k, v = normal(2, 4, 70, 24, dtype=dtype), normal(2, 2, 130, 24, dtype=dtype), normal(2, 2, 130, 9, dtype=dtype)
    options = {"causal": causal, "q_offset": offset, "chunk": chunk}
    check(q, k, v, **options, trivial=True)
    check(q[:, :, :3], k, v, **options, window=(40, 3), kv_starts=[0, 50], trivial=True)


@pytest.mark.one_isa
def test_what_is_seen() -> None:
    seen = reference.visibility(5, 5, chunk=2, causal=True).astype(int).tolist()
    assert seen == [[[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]]
    assert reference.visibility(2, 5, chunk=3).astype(int).tolist() == [[[0, 0, 0, 1, 1], [0, 0, 0, 1, 1]]]


@pytest.mark.dtypes("float32")
def test_chunks_are_separate_calls(normal: Any) -> None:
    q, k, v = (normal(2, 128, 16) for _ in range(3))
    out = sa.attention(q, k, v, causal=True, chunk=32)
    for start in range(0, 128, 32):
        part = slice(start, start + 32)
        alone = sa.attention(q[:, part], k[:, part], v[:, part], causal=True)
        assert np.allclose(out[:, part], alone, rtol=0, atol=1e-6)


@pytest.mark.dtypes("float32")
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_keys_of_other_chunks_are_inert(normal: Any, value: float) -> None:
    q, k, v, grad_out = (normal(2, 96, 16) for _ in range(4))
    options: dict[str, Any] = {"causal": True, "chunk": 32}
    clean, vjp = sa.attention_vjp(q, k, v, **options)
    grads = vjp(grad_out)
    k[:, 32:64] = v[:, 32:64] = value
    out, vjp = sa.attention_vjp(q, k, v, **options)
    spoiled = vjp(grad_out)
    others = np.r_[0:32, 64:96]
    assert np.array_equal(out[:, others], clean[:, others])
    assert all(np.array_equal(a[:, others], b[:, others]) for a, b in zip(grads[:3], spoiled[:3], strict=True))


@pytest.mark.dtypes("float64")
def test_other_functions(normal: Any) -> None:
    q, k, v = (normal(1, 2, 50, 8, dtype=np.float64) for _ in range(3))
    exact = reference.attention(q, k, v, causal=True, chunk=12).out
    twice = [np.concatenate([x[0].swapaxes(0, 1)] * 2) for x in (q, k, v)]
    packed = sa.attention_varlen(*twice, [0, 50, 100], causal=True, chunk=12)
    assert np.array_equal(packed[:50], packed[50:])
    assert np.allclose(packed[:50].swapaxes(0, 1)[None], exact, rtol=0, atol=1e-12)
    for cache, sequences in (
        (sa.KVCache(1, 2, 8, 64, dtype="float64"), {}),
        (sa.PagedKVCache(9, 8, 2, 8, dtype="float64"), None),
    ):
        if sequences is None:
            sequences = {"sequences": [cache.allocate()]}
        rows = []
        for first, last in ((0, 20), (20, 21), (21, 50)):
            new = (x[:, :, first:last] for x in (q, k, v))
            query, key, value = new
            rows.append(sa.attention_with_kvcache(query, cache, key, value, chunk=12, **sequences))
        assert np.allclose(np.concatenate(rows, axis=2), exact, rtol=0, atol=1e-12)
    state = sa.AttentionState(q, kv_len=50, causal=True, chunk=12)
    for first in range(0, 50, 10):
        state.absorb(k[:, :, first : first + 10], v[:, :, first : first + 10])
    assert np.allclose(state.result()[0], exact, rtol=0, atol=1e-12)


@pytest.mark.one_isa
@pytest.mark.parametrize(
    ("chunk", "error", "message"),
    [
        (0, ValueError, "attention: chunk is 0, but it must be at least 1"),
        (-4, ValueError, "attention: chunk is -4, but it must be at least 1"),
        (1 << 61, ValueError, f"attention: chunk is {1 << 61}, but it must be at most {1 << 60}"),
        (2.0, TypeError, "attention: chunk is 2.0, but an integer is needed"),
        (True, TypeError, "attention: chunk is True, but an integer is needed"),
    ],
)
def test_errors(normal: Any, chunk: Any, error: type[Exception], message: str) -> None:
    q = normal(2, 5, 8)
    with pytest.raises(error, match=message):
        sa.attention(q, q, q, chunk=chunk)
    with pytest.raises(ValueError, match="kv_lens holds 3, which is less than the 5 queries"):
        sa.attention(q[None], q[None], q[None], chunk=2, kv_lens=[3])


@pytest.mark.one_isa
@pytest.mark.parametrize("chunk", [-1, (1 << 60) + 1])
def test_the_core_checks_what_other_callers_pass(normal: Any, chunk: int) -> None:
    """XLA's handlers, for example, pass numbers that no Python function has checked."""
    q = normal(2, 5, 8)
    options = _core.Options()
    options.chunk = chunk
    with pytest.raises(ValueError, match=f"attention: chunk is {chunk}, but it must be in 1..{1 << 60}"):
        _core.attention(q, q, q, None, options)
