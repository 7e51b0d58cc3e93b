"""Prefixes: every query sees the first keys."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import selfattn as sa
from selfattn import reference


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("prefix", [0, 1, 16, 65, 130, [0, 130], [70, 3]])
@pytest.mark.parametrize("offset", [None, 0, -200, 10_000])
@pytest.mark.parametrize(
    "options", [{"causal": True}, {"window": (None, 4)}, {"causal": True, "kv_starts": [0, 50]}, {}]
)
def test_against_the_reference(check: Any, normal: Any, dtype: Any, prefix: Any, offset: Any, options: Any) -> None:
    q, k, v = normal(2, 4, 70, 24, dtype=dtype), normal(2, 2, 130, 24, dtype=dtype), normal(2, 2, 130, 9, dtype=dtype)
    check(q, k, v, q_offset=offset, prefix_lens=prefix, **options, trivial=True)
    lengths = {"q_lens": [50, 70], "kv_lens": [60, 130]}
    check(q, k, v, q_offset=offset, prefix_lens=prefix, **options, **lengths, trivial=True)


@pytest.mark.one_isa
def test_what_is_seen() -> None:
    seen = reference.visibility(4, 4, causal=True, prefix_lens=2).astype(int).tolist()
    assert seen == [[[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]]


@pytest.mark.dtypes("float32")
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_hidden_keys_are_inert(normal: Any, value: float) -> None:
    q, k, v, grad_out = (normal(2, 96, 16) for _ in range(4))
    options: dict[str, Any] = {"causal": True, "prefix_lens": 30}
    clean, vjp = sa.attention_vjp(q, k, v, **options)
    grads = vjp(grad_out)
    k[:, 60:] = v[:, 60:] = value
    out, vjp = sa.attention_vjp(q, k, v, **options)
    assert np.array_equal(out[:, :60], clean[:, :60])
    assert np.array_equal(vjp(grad_out).q[:, :60], grads.q[:, :60])


@pytest.mark.dtypes("float64")
def test_with_terms_by_distance(check: Any, normal: Any, rng: Any) -> None:
    q, k, v = (normal(2, 4, 90, 16, dtype=np.float64) for _ in range(3))
    table = sa.T5Bias(rng.standard_normal((32, 4)), bidirectional=True)
    check(q, k, v, causal=True, prefix_lens=[60, 5], t5=table)
    check(q, k, v, causal=True, prefix_lens=[60, 5], alibi_slopes=[0.5, 0.1, 0.0, 2.0])
    r, (u, w) = normal(4, 200, 16, dtype=np.float64), normal(2, 4, 16, dtype=np.float64)
    out = sa.relative_attention(q, k, v, r, u, w, r_origin=100, prefix_lens=[60, 5])
    exact = reference.attention(q, k, v, causal=True, q_offset=0, prefix_lens=[60, 5], relative=(r, u, w, 100)).out
    assert np.allclose(out, exact, rtol=0, atol=1e-12)


@pytest.mark.dtypes("float64")
def test_other_functions(normal: Any) -> None:
    q, k, v = (normal(2, 2, 50, 8, dtype=np.float64) for _ in range(3))
    exact = reference.attention(q, k, v, causal=True, prefix_lens=[12, 30]).out
    rows = [x.swapaxes(1, 2).reshape(100, 2, 8) for x in (q, k, v)]
    packed = sa.attention_varlen(*rows, [0, 50, 100], causal=True, prefix_lens=[12, 30])
    assert np.allclose(packed.reshape(2, 50, 2, 8).swapaxes(1, 2), exact, rtol=0, atol=1e-12)
    cache = sa.KVCache(2, 2, 8, 64, dtype="float64")
    first = sa.attention_with_kvcache(q[:, :, :40], cache, k[:, :, :40], v[:, :, :40], prefix_lens=[12, 30])
    rest = sa.attention_with_kvcache(q[:, :, 40:], cache, k[:, :, 40:], v[:, :, 40:], prefix_lens=[12, 30])
    assert np.allclose(np.concatenate([first, rest], axis=2), exact, rtol=0, atol=1e-12)
    state = sa.AttentionState(q, kv_len=50, causal=True, prefix_lens=[12, 30])
    for start in range(0, 50, 10):
        state.absorb(k[:, :, start : start + 10], v[:, :, start : start + 10])
    assert np.allclose(state.result()[0], exact, rtol=0, atol=1e-12)


@pytest.mark.one_isa
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefix_lens": 6}, "prefix_lens holds 6, which is outside 0..5 \\(the length of k\\)"),
        ({"prefix_lens": -1}, "prefix_lens holds -1, which is outside 0..5"),
        ({"prefix_lens": [1, 2]}, "prefix_lens has shape"),
        ({"prefix_lens": 2, "window": (3, 0)}, "prefix_lens cannot be used with a window to the left"),
        ({"prefix_lens": 2, "chunk": 3}, "prefix_lens cannot be used with chunk"),
    ],
)
def test_errors(normal: Any, options: Any, message: str) -> None:
    q = normal(2, 5, 8)
    with pytest.raises(ValueError, match=f"attention: {message}"):
        sa.attention(q, q, q, **options)
    with pytest.raises(TypeError, match="prefix_lens has dtype float64, but integers are needed"):
        sa.attention(q, q, q, prefix_lens=1.5)
