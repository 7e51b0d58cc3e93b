"""The error bound of gradients, on every instruction set, around every boundary and with every option."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from gradient_bounds import check, given_names

import selfattn as sa
from selfattn import reference

pytestmark = pytest.mark.dtypes("float32", "float64")

INF = np.float32(np.inf)
WIDE = pytest.mark.parametrize("dtype", [np.float32, np.float64])
# bfloat16 has kernels of its own on some instruction sets.
EVERY = pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16])


@EVERY
# Strips have 4 to 48 rows, blocks up to 96.
@pytest.mark.parametrize("q_len", [1, 4, 5, 11, 12, 13, 24, 25, 47, 48, 49, 95, 96, 97, 193])
def test_query_lengths(isa: str, normal: Any, dtype: Any, q_len: int) -> None:
    q, k, v = (normal(2, n, 9, dtype=dtype) for n in (q_len, 21, 21))
    check(q, k, v, causal=q_len % 2 == 0, q_offset=5)


@EVERY
# Blocks of 96 keys; of the head size 64, ranges of 384 keys in float32, of 192 in float64 and of 480 in pairs.
@pytest.mark.parametrize("kv_len", [1, 7, 8, 9, 95, 96, 97, 191, 192, 193, 383, 384, 385, 479, 480, 481])
def test_key_lengths(isa: str, normal: Any, dtype: Any, kv_len: int) -> None:
    q, k, v = (normal(1, n, 64, dtype=dtype) for n in (14, kv_len, kv_len))
    check(q, k, v, causal=kv_len % 2 == 1, q_offset=kv_len - 14)


@EVERY
@pytest.mark.parametrize(
    ("dim", "value_dim"), [(1, 1), (1, 3), (3, 17), (17, 65), (64, 1), (65, 33), (128, 16), (2, 129), (515, 4), (8, 0)]
)
def test_head_sizes(isa: str, normal: Any, dtype: Any, dim: int, value_dim: int) -> None:
    for q_len, kv_len in ((3, 110), (53, 30)):
        q, k, v = (normal(1, n, d, dtype=dtype) for n, d in ((q_len, dim), (kv_len, dim), (kv_len, value_dim)))
        check(q, k, v, all_results=False)


def options_by_name(rng: Any) -> dict[str, dict[str, Any]]:
    """Options for 2 entries, 4 heads, 61 queries and 150 keys."""
    batch, heads, q_len, kv_len = 2, 4, 61, 150
    tiles = np.zeros((q_len, kv_len), bool)
    tiles[:, 100:] = tiles[48:] = True
    bias = rng.standard_normal((batch, heads, q_len, kv_len)).astype(np.float32)
    holes = np.where(rng.random(bias.shape) < 0.3, -INF, bias)
    holes[0, 1, 7], holes[:, :, :, 96:120] = -INF, -INF
    sinks = rng.standard_normal(heads)
    t5 = sa.T5Bias(rng.standard_normal((16, heads)).astype(np.float32), max_distance=40)
    decoder = sa.T5Bias(rng.standard_normal((6, heads)), bidirectional=False, max_distance=9)
    return {
        "causal": {"causal": True},
        "before all keys": {"causal": True, "q_offset": -20, "sinks": sinks},
        "after all keys": {"window": (40, 0), "q_offset": 170},
        "window": {"window": (7, 3), "q_offset": [30, 90]},
        "right side only": {"window": (None, 2), "softcap": 2.0},
        "empty tiles": {"mask": tiles},
        "one key": {"mask": np.arange(kv_len) == 97},
        "no key": {"mask": np.zeros((batch, 1, 1, 1), bool), "sinks": sinks},
        "scattered": {"mask": rng.random((batch, 1, q_len, kv_len)) < 0.1, "softcap": 0.7},
        "rows": {"mask": rng.random((heads, q_len, 1)) < 0.5, "bias": bias[:, :, :1]},
        "lengths": {"q_lens": [60, 0], "kv_lens": [150, 33], "causal": True, "sinks": sinks},
        "starts": {"kv_starts": [140, 3], "kv_lens": [141, 150], "q_lens": [61, 61], "bias": bias[0]},
        "softcap": {"softcap": 30.0, "alibi_slopes": rng.random(heads) / 20},
        "slopes of each entry": {"alibi_slopes": rng.random((batch, heads)) / 20, "q_offset": -30},
        "slopes far away": {"alibi_slopes": rng.random(heads) / 20, "q_offset": 500},
        "slopes and sinks": {"alibi_slopes": -rng.random(heads) / 20, "sinks": sinks, "window": (60, 20)},
        "t5": {"t5": t5, "scale": 1.0},
        "t5 of a decoder": {"t5": decoder, "causal": True, "bias": bias[:1, :, :1], "sinks": sinks},
        "t5 and all others": {"t5": t5, "bias": holes, "alibi_slopes": [0.1] * heads, "softcap": 3.0, "sinks": sinks},
        "bias with holes": {"bias": holes},
        "bias of an entry": {"bias": holes[:, :1]},
        "bias of heads": {"bias": holes[0]},
        "bias of pairs": {"bias": holes[0, 0], "causal": True},
        "bias of keys": {"bias": bias[:, :, :1]},
        "bias of all keys": {"bias": bias[0, 0, 0], "q_lens": [40, 61]},
        "bias of rows": {"bias": bias[..., :1], "sinks": sinks},
        "bias of all rows": {"bias": bias[0, 0, :, :1], "sinks": sinks},
        "bias of an entry's heads": {"bias": bias[:, :, :1, :1], "sinks": sinks},
        "one number": {"bias": np.float32(0.3), "sinks": sinks},
        "no scale": {"scale": 0.0, "softcap": 1.0, "bias": bias[0, 0]},
        "negative scale": {"scale": -0.6},
    }


OPTIONS = list(options_by_name(np.random.default_rng(0)))


@EVERY
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option(isa: str, rng: Any, normal: Any, dtype: Any, name: str) -> None:
    q, k, v = normal(2, 4, 61, 6, dtype=dtype), normal(2, 2, 150, 6, dtype=dtype), normal(2, 2, 150, 5, dtype=dtype)
    check(q, k, v, **options_by_name(rng)[name])


@pytest.mark.parametrize("precision", ["high", "medium"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_lower_precision(isa: str, rng: Any, normal: Any, dtype: Any, precision: str) -> None:
    q, k, v = (normal(1, h, n, 32, dtype=dtype) for h, n in ((2, 41), (1, 110), (1, 110)))
    check(q, k, v, precision=precision, causal=True, q_offset=60)
    check(q, k, v, precision=precision, bias=normal(41, 110), softcap=3.0, sinks=rng.standard_normal(2))


@pytest.mark.parametrize(
    ("q_shape", "k_shape", "v_shape", "options"),
    [
        ((20, 4), (30, 4), (30, 3), {"bias": np.zeros((20, 30), np.float32), "causal": True}),
        ((20, 4), (30, 4), (30, 3), {"t5": sa.T5Bias(np.ones((8, 1)), max_distance=9), "sinks": [1.0]}),
        ((6, 20, 4), (1, 30, 4), (1, 30, 3), {"sinks": np.ones(6)}),
        ((3, 1, 4, 20, 4), (2, 2, 30, 4), (3, 2, 2, 30, 5), {"kv_lens": [[30, 20]], "q_offset": [[3], [4], [5]]}),
        ((2, 20, 4), (3, 1, 30, 4), (1, 1, 30, 3), {"bias": np.zeros((3, 2, 20, 30), np.float32), "scale": 0.5}),
        ((1, 2, 20, 4), (2, 2, 30, 4), (2, 2, 30, 4), {"alibi_slopes": np.full((2, 2), 0.1)}),
        ((2, 20, 6, 4), (2, 30, 3, 4), (2, 30, 3, 5), {"layout": "bshd", "bias": np.zeros((6, 1, 30), np.float32)}),
        ((20, 6, 4), (2, 30, 2, 4), (1, 30, 2, 5), {"layout": "bshd", "alibi_slopes": np.full(6, 0.1)}),
    ],
)
def test_shapes(isa: str, normal: Any, q_shape: Any, k_shape: Any, v_shape: Any, options: Any) -> None:
    check(normal(*q_shape), normal(*k_shape), normal(*v_shape), **options)


@WIDE
@pytest.mark.parametrize("size", [0.1, 4.0, 12.0])
def test_small_and_large_scores(isa: str, normal: Any, dtype: Any, size: float) -> None:
    q, k, v = normal(1, 2, 50, 32, dtype=dtype) * dtype(size), normal(1, 1, 120, 32, dtype=dtype), normal(1, 1, 120, 8)
    check(q, k, v.astype(dtype), all_results=False)
    check(q, k, v.astype(dtype), softcap=20.0)


@WIDE
def test_ranges_of_keys(isa: str, rng: Any, normal: Any, dtype: Any) -> None:
    # Of the head size 8, ranges of 512 keys.
    q, k, v = (normal(2, n, 8, dtype=dtype) for n in (30, 530, 530))
    for shape in ((2, 30, 530), (30, 530), (2, 1, 530), (30, 1)):
        check(q, k, v, bias=normal(*shape, dtype=dtype), causal=True, q_offset=505, all_results=False)
    check(q, k, v, t5=sa.T5Bias(normal(32, 2)), alibi_slopes=rng.random(2) / 50, q_offset=400, all_results=False)


def test_many_rows(isa: str, normal: Any) -> None:
    q, k, v = normal(1, 800, 8), normal(1, 800, 8), normal(1, 800, 8)
    check(q, k, v, causal=True, bias=np.zeros((1, 800), np.float32), all_results=False)


@pytest.mark.parametrize("shape", [(0, 2, 10, 10), (1, 0, 10, 10), (1, 2, 0, 10), (1, 2, 10, 0), (1, 2, 0, 0)], ids=str)
def test_empty_arrays(isa: str, normal: Any, shape: Any) -> None:
    batch, heads, q_len, kv_len = shape
    q, k, v = normal(batch, heads, q_len, 3), normal(batch, heads, kv_len, 3), normal(batch, heads, kv_len, 2)
    options: dict[str, Any] = {
        "bias": normal(q_len, kv_len), "sinks": normal(heads), "alibi_slopes": normal(heads),
        "t5": sa.T5Bias(normal(8, heads)),
    }  # fmt: skip
    wrt = given_names(options)
    out, vjp = sa.attention_vjp(q, k, v, wrt=wrt, **options)
    grad_lse = normal(batch, heads, q_len)
    found = vjp(out, grad_lse)
    exact = reference.attention_backward(out, q, k, v, wrt=wrt, grad_lse=grad_lse, **options)
    for name in wrt:
        assert np.allclose(getattr(found, name), exact.gradients[name], atol=1e-6)
        assert getattr(found, name).shape == exact.gradients[name].shape


@pytest.mark.parametrize("shape", [(1,), (40, 1), (2, 40, 1)])
def test_what_a_whole_row_shares_has_no_gradient(isa: str, normal: Any, shape: Any) -> None:
    # Adding the same number to all scores of a row does not change the softmax.
    bias = normal(*shape)
    out, vjp = sa.attention_vjp(normal(2, 40, 8), normal(2, 60, 8), normal(2, 60, 8), wrt=("bias",), bias=bias)
    found = vjp(out).bias
    assert found is not None
    assert found.shape == shape
    assert np.all(abs(found) <= 1e-4)


# Half of the limits of lse in units of log2, beyond which gradients are 0, and twice these limits.
@pytest.mark.parametrize(("dtype", "limit"), [(np.float32, 2.0**20), (np.float64, 2.0**49)])
def test_rows_with_scores_beyond_the_limit_count_as_empty(isa: str, normal: Any, dtype: Any, limit: float) -> None:
    q, k, v = (normal(1, n, 8, dtype=dtype) for n in (50, 130, 130))
    sizes = np.where(np.arange(50) % 3 == 1, 2, 0.5) * np.where(np.arange(50) % 2 == 1, -limit, limit)
    bias = (sizes[:, None] * np.log(2)).astype(dtype)
    out, vjp = sa.attention_vjp(q, k, v, wrt=("q",), bias=bias)
    found = vjp(1 + out).q
    assert found is not None
    beyond = abs(sizes) > limit
    assert not found[:, beyond].any()
    assert found[:, ~beyond].any(axis=-1).all()


@WIDE
def test_probabilities_sum_to_1_up_to_scores_of_1e5(isa: str, normal: Any, dtype: Any) -> None:
    q, k, v = (normal(1, n, 8, dtype=dtype) for n in (50, 130, 130))
    bias = normal(50, 1, dtype=dtype) * dtype(3e4)
    out, vjp = sa.attention_vjp(q, k, v, bias=bias)
    found = vjp(np.ones_like(out)).v
    assert found is not None
    assert np.allclose(found.sum(axis=-2), 50, rtol=1e-5 if dtype == np.float32 else 1e-13)


@EVERY
def test_wrt_names_what_is_returned(isa: str, normal: Any, dtype: Any) -> None:
    q, k, v = normal(2, 40, 8, dtype=dtype), normal(2, 60, 8, dtype=dtype), normal(2, 60, 8, dtype=dtype)
    terms = {"sinks": [0.5, 2.0], "bias": normal(40, 60), "t5": sa.T5Bias(normal(32, 2))}
    every = ("q", "k", "v", "scale", *terms)
    out, vjp = sa.attention_vjp(q, k, v, wrt=every, **terms)
    everything = vjp(out)
    for names in ((), *((name,) for name in every), ["v", "q"], ("q", "q"), ("k", "scale")):
        found = sa.attention_vjp(q, k, v, wrt=names, **terms)[1](out)
        for name, x in found._asdict().items():
            assert (x is not None) == (name in names)
            assert x is None or np.array_equal(x, getattr(everything, name))
    found = sa.attention_vjp(q, k, v, **terms)[1](out)
    assert [name for name, x in found._asdict().items() if x is not None] == ["q", "k", "v"]
