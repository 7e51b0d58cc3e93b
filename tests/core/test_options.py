"""Options that change scores or results: softcap, ALiBi, sinks, lse, weights, out, threads, precision, explain."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

import selfattn as sa

pytestmark = pytest.mark.dtypes("float32", "float64")

SHAPES = [(2, 4, 30, 90), (1, 4, 2, 400), (1, 2, 3, 2500)]


@pytest.fixture(params=SHAPES, ids=str)
def qkv(request: Any, normal: Any) -> tuple[Any, Any, Any]:
    batch, heads, q_len, kv_len = request.param
    return normal(batch, heads, q_len, 16), normal(batch, heads // 2, kv_len, 16), normal(batch, heads // 2, kv_len, 12)


@pytest.mark.parametrize("cap", [0.5, 5, 50.0, 1e4])
def test_softcap(isa: str, check: Any, qkv: Any, cap: float) -> None:
    check(*qkv, softcap=cap)
    check(*qkv, softcap=cap, scale=1e-3)  # tanh near 0 keeps its relative accuracy
    check(*qkv, softcap=cap, scale=-4.0, causal=True)


@pytest.mark.parametrize("option", [{"softcap": 1e39}, {"softcap": 1e-40}, {"scale": 1e39}, {"sinks": [1e39]}], ids=str)
@pytest.mark.parametrize("q_len", [2, 40])
def test_numbers_beyond_float32(isa: str, normal: Any, q_len: int, option: Any) -> None:
    # Refused or correct: a cap without effect, one that makes all scores equal, and a row of zeros with any scale.
    q, k, v = normal(1, q_len, 8), normal(1, 50, 8), normal(1, 50, 8)
    q[0, 0] = 0
    try:
        out = sa.attention(q, k, v, **option)
    except ValueError:
        return
    assert np.isfinite(out[0, 0]).all()


def test_alibi(isa: str, check: Any, qkv: Any) -> None:
    batch, heads, _q_len = qkv[0].shape[:3]
    slopes = sa.alibi_slopes(heads)
    for options in ({}, {"causal": True}, {"q_offset": 7}, {"window": (30, 3)}, {"kv_lens": np.full(batch, 50)}):
        check(*qkv, alibi_slopes=slopes, **options)
    check(*qkv, alibi_slopes=np.linspace(0, 0.2, batch * heads).reshape(batch, heads))
    check(*qkv, alibi_slopes=list(map(float, -slopes / qkv[1].shape[2])))
    check(*qkv, alibi_slopes=slopes, mask=np.arange(qkv[1].shape[2]) % 3 > 0)


def test_one_slope_for_all_heads(isa: str, qkv: Any) -> None:
    expected = sa.attention(*qkv, alibi_slopes=np.full(qkv[0].shape[1], 0.07))
    for slopes in ([0.07], np.array(0.07), np.broadcast_to(np.array([[0.07]]), (qkv[0].shape[0], 1))):
        assert np.array_equal(sa.attention(*qkv, alibi_slopes=slopes), expected)


def test_sinks(isa: str, check: Any, qkv: Any) -> None:
    heads = qkv[0].shape[1]
    for sinks in (np.linspace(-3, 8, heads), np.full(heads, -np.inf), np.full(heads, 60, np.float32)):
        check(*qkv, sinks=sinks)
    with_zero_key = [np.concatenate([x, np.zeros_like(x[:, :, :1])], axis=2) for x in qkv[1:]]
    expected = sa.attention(qkv[0], *with_zero_key)
    assert np.allclose(sa.attention(*qkv, sinks=np.zeros(heads)), expected, atol=1e-5)


def test_order_of_results(qkv: Any) -> None:
    out = sa.attention(*qkv)
    assert isinstance(out, np.ndarray)
    assert [x.shape for x in sa.attention(*qkv, return_lse=True)] == [out.shape, out.shape[:-1]]
    weights_shape = (*out.shape[:-1], qkv[1].shape[2])
    assert [x.shape for x in sa.attention(*qkv, return_weights=True)] == [out.shape, weights_shape]
    three = sa.attention(*qkv, return_weights=True, return_lse=True)
    assert [x.shape for x in three] == [out.shape, out.shape[:-1], weights_shape]
    assert all(x.dtype == np.float32 for x in three)


def test_weights_are_what_out_is_made_of(isa: str, qkv: Any) -> None:
    out, weights = sa.attention(*qkv, causal=True, return_weights=True)
    assert np.allclose(weights.sum(axis=-1), 1, atol=1e-5)
    assert np.allclose(weights @ np.repeat(qkv[2], 2, axis=1), out, atol=1e-5)
    assert not np.triu(weights[0, 0], qkv[1].shape[2] - qkv[0].shape[2] + 1).any()


def test_lse_merges_parts_into_the_whole(isa: str, qkv: Any) -> None:
    q, k, v = qkv
    cuts = [0, 10, 11, k.shape[2]]
    parts = [sa.attention(q, k[:, :, a:b], v[:, :, a:b], return_lse=True) for a, b in itertools.pairwise(cuts)]
    out, lse = sa.merge_states(*zip(*parts, strict=True))
    expected, expected_lse = sa.attention(q, k, v, return_lse=True)
    assert np.allclose(out, expected, atol=1e-5)
    assert np.allclose(lse, expected_lse, atol=1e-5)


class TestOut:
    def test_is_returned(self, qkv: Any) -> None:
        expected = sa.attention(*qkv)
        out = np.full_like(expected, np.nan)
        assert sa.attention(*qkv, out=out) is out
        assert np.array_equal(out, expected)
        found, lse = sa.attention(*qkv, out=out, return_lse=True)
        assert found is out
        assert lse.shape == out.shape[:-1]

    def test_any_strides(self, isa: str, qkv: Any) -> None:
        expected = sa.attention(*qkv, causal=True)
        shape = expected.shape
        holders = [
            np.full((*shape[:-1], 2 * shape[-1]), 7, np.float32)[..., ::2],
            np.full(shape, 7, np.float32)[:, ::-1, :, ::-1],
            np.full(shape[::-1], 7, np.float32).T,
            np.full((shape[0], shape[2], shape[1], shape[3]), 7, np.float32).swapaxes(1, 2),
            np.frombuffer(bytearray(expected.nbytes + 1), np.uint8, offset=1)[: expected.nbytes]
            .view(np.float32)
            .reshape(shape),
        ]
        for out in holders:
            assert sa.attention(*qkv, causal=True, out=out) is out
            assert np.array_equal(out, expected)
        assert np.all(np.asarray(holders[0].base).reshape(-1, 2)[:, 1] == 7)  # memory between the elements is unchanged

    @pytest.mark.parametrize("which", [0, 1, 2])
    def test_may_overlap_an_input(self, isa: str, normal: Any, which: int) -> None:
        qkv = [normal(2, 60, 8) for _ in range(3)]
        expected = sa.attention(*qkv)
        assert np.array_equal(sa.attention(*qkv, out=qkv[which]), expected)
        buffer = normal(2 * 60 * 8 + 3)
        inside = [normal(2, 60, 8) for _ in range(3)]
        inside[which] = buffer[3:].reshape(2, 60, 8)
        expected = sa.attention(*inside)
        assert np.array_equal(sa.attention(*inside, out=buffer[:-3].reshape(2, 60, 8)), expected)

    def test_may_overlap_a_bias(self, normal: Any) -> None:
        q, bias = normal(60, 8), normal(60, 60)
        expected = sa.attention(q, q, q, bias=bias)
        assert np.array_equal(sa.attention(q, q, q, bias=bias, out=bias.reshape(-1)[:480].reshape(60, 8)), expected)

    @pytest.mark.one_isa
    def test_is_refused(self, normal: Any) -> None:
        q = normal(2, 5, 8)
        good = np.zeros_like(q)
        with pytest.raises(ValueError, match=r"attention: out has shape \(2, 5, 7\) but the result has \(2, 5, 8\)"):
            sa.attention(q, q, q, out=good[..., :7])
        with pytest.raises(TypeError, match="attention: out has dtype float64, but the result is float32"):
            sa.attention(q, q, q, out=good.astype(np.float64))
        with pytest.raises(TypeError, match="attention: out has dtype float32 of foreign byte order"):
            sa.attention(q, q, q, out=good.astype(">f4"))
        with pytest.raises(TypeError, match="out is a list"):
            sa.attention(q, q, q, out=good.tolist())
        good.flags.writeable = False
        with pytest.raises(ValueError, match="attention: out is read-only"):
            sa.attention(q, q, q, out=good)
        shared = np.lib.stride_tricks.as_strided(np.empty(8, np.float32), (2, 5, 8), (0, 0, 4), writeable=True)
        with pytest.raises(ValueError, match="stride 0 along axis 0"):
            sa.attention(q, q, q, out=shared)
        with pytest.raises(ValueError, match="out has shape"):
            sa.attention(q, q, q, out=q[:1])


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_precision_is_accepted(qkv: Any, precision: str) -> None:
    assert np.allclose(sa.attention(*qkv, precision=precision), sa.attention(*qkv), rtol=0, atol=0.05)


def test_explain_tells_what_a_call_would_do(isa: str, normal: Any) -> None:
    few, many, long = normal(1, 4, 1, 64), normal(1, 4, 300, 64), normal(1, 4, 5000, 64)
    decode, prefill = sa.explain(few, long, long), sa.explain(many, many, many, causal=True, num_threads=2)
    assert decode["isa"] == isa
    assert (decode["kernel"], prefill["kernel"]) == ("row", "tile")
    assert decode["ranges"] > 1 == prefill["ranges"]
    assert decode["tasks"] == 4 * decode["ranges"]
    assert prefill["threads"] == 2
    assert prefill["threads_source"] == "num_threads argument"
    for num_threads, source in ((1, "num_threads argument"), (2, "one thread is enough for this much work")):
        tiny = sa.explain(few, few, few, num_threads=num_threads)
        assert (tiny["threads"], tiny["threads_source"]) == (1, source)
    assert 0 < prefill["scratch_bytes_per_thread"] <= 2 << 20
    assert prefill["copied_blockwise"] == []
    assert sa.explain(many[..., ::2], many[..., ::2], many)["copied_blockwise"] == ["q", "k"]
    assert "kernel" in str(decode)
    assert decode["reason"] in str(decode)
    with pytest.raises(TypeError, match="explain: unexpected keyword argument 'is_causal'"):
        sa.explain(few, long, long, is_causal=True)


@pytest.mark.parametrize("dim", [1, 64, 512, 1536, 2048])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_scratch_stays_small(isa: str, dim: int, dtype: Any) -> None:
    k = np.broadcast_to(np.zeros((), dtype), (1, 1, 4096, dim))
    for queries in (1, 24, 4096):
        for heads in (1, 24):
            q = np.broadcast_to(np.zeros((), dtype), (1, heads, queries, dim))
            assert sa.explain(q, k, k)["scratch_bytes_per_thread"] <= 2 << 20


def test_very_wide_heads_have_smaller_blocks(isa: str, check: Any, normal: Any) -> None:
    q, k = normal(1, 120, 4096), normal(1, 20, 4096)
    assert sa.explain(q, k, k)["scratch_bytes_per_thread"] <= 2 << 20
    check(q, k, k)
