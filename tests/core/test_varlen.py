"""Packed sequences of different lengths: the result of each, every option, and refused arguments."""

from __future__ import annotations

import itertools
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import selfattn as sa
from selfattn import reference
from selfattn._rounding import MATRIX_ROUNDINGS

HEADS, KV_HEADS, DIM, VALUE_DIM = 6, 2, 8, 5
Q_LENS, KV_LENS = [3, 0, 70, 1, 5, 2], [9, 4, 133, 600, 0, 2]
PER_SEQUENCE = ("mask", "bias", "q_offset")


@pytest.fixture
def packed(normal: Any) -> Any:
    def make(dtype: Any = np.float32, q_lens: Any = Q_LENS, kv_lens: Any = KV_LENS) -> tuple[Any, ...]:
        q, k = normal(sum(q_lens), HEADS, DIM, dtype=dtype), normal(sum(kv_lens), KV_HEADS, DIM, dtype=dtype)
        v = normal(sum(kv_lens), KV_HEADS, VALUE_DIM, dtype=dtype)
        return q, k, v, np.cumsum([0, *q_lens]), np.cumsum([0, *kv_lens])

    return make


def parts(x: Any, ends: Any) -> list[Any]:
    return [x[a:b] for a, b in itertools.pairwise(ends)]


def options_of(n: int, options: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `attention` for sequence n."""
    own = dict(options)
    for name in PER_SEQUENCE:
        if isinstance(own.get(name), list):
            own[name] = own[name][n]
    if np.ndim(own.get("alibi_slopes")) == 2:
        own["alibi_slopes"] = own["alibi_slopes"][n]
    return own


def every_option(rng: Any) -> dict[str, dict[str, Any]]:
    shapes = list(zip(Q_LENS, KV_LENS, strict=True))
    masks = [rng.random(shape) < 0.7 for shape in shapes]
    biases = [rng.standard_normal((HEADS, *shape)).astype(np.float32) for shape in shapes]
    return {
        "none": {},
        "causal": {"causal": True},
        "mask": {"mask": [masks[0], None, masks[2], masks[3], None, np.ones((HEADS, 1, 2), bool)]},
        "bias": {"bias": [None, *biases[1:5], None], "scale": 0.4},
        "q_offset": {"causal": True, "q_offset": 2},
        "q_offsets": {"causal": True, "q_offset": [0, 1, 50, 599, -3, 7]},
        "window": {"window": (20, 3), "softcap": 2.0},
        "slopes": {"alibi_slopes": rng.random(HEADS), "sinks": rng.standard_normal(HEADS)},
        "own slopes": {"alibi_slopes": rng.random((len(Q_LENS), HEADS)), "causal": True, "scale": -0.3},
    }


@pytest.mark.parametrize(
    "name", ["none", "causal", "mask", "bias", "q_offset", "q_offsets", "window", "slopes", "own slopes"]
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16], ids=lambda x: x.__name__)
def test_every_option(isa: str, rng: Any, packed: Any, assert_accurate: Any, name: str, dtype: Any) -> None:
    q, k, v, q_ends, k_ends = packed(dtype)
    options = every_option(rng)[name]
    out, lse, weights = sa.attention_varlen(q, k, v, q_ends, k_ends, return_lse=True, return_weights=True, **options)
    assert (out.shape, out.dtype) == ((sum(Q_LENS), HEADS, VALUE_DIM), q.dtype)
    assert lse.shape == (HEADS, sum(Q_LENS))
    assert [w.shape for w in weights] == [(HEADS, *shape) for shape in zip(Q_LENS, KV_LENS, strict=True)]
    whole = sa.attention_varlen(q, k, v, q_ends, k_ends, **options)
    assert np.array_equal(whole, out)
    for n, (own_q, own_k, own_v) in enumerate(zip(parts(q, q_ends), parts(k, k_ends), parts(v, k_ends), strict=True)):
        own, rows = options_of(n, options), slice(q_ends[n], q_ends[n + 1])
        expected = sa.attention(own_q, own_k, own_v, layout="bshd", return_lse=True, return_weights=True, **own)
        for found, wanted in zip((out[rows], lse[:, rows], weights[n]), expected, strict=True):
            assert found.dtype == wanted.dtype
            assert np.array_equal(found, wanted)
        precise = np.longdouble if dtype == np.float64 else np.float64
        exact = reference.attention(own_q, own_k, own_v, layout="bshd", dtype=precise, **own)
        rounded = MATRIX_ROUNDINGS.get((q.dtype.name, "highest"), (0.0, 0.0))
        assert_accurate(out[rows], exact, trivial=True, rounded=rounded)


@pytest.mark.dtypes("float32")
def test_lists_are_packed_arrays(isa: str, packed: Any, rng: Any) -> None:
    q, k, v, q_ends, k_ends = packed()
    for options in every_option(rng).values():
        expected = sa.attention_varlen(q, k, v, q_ends, k_ends, return_lse=True, return_weights=True, **options)
        lists = parts(q, q_ends), parts(k, k_ends), parts(v, k_ends)
        out, lse, weights = sa.attention_varlen(*lists, return_lse=True, return_weights=True, **options)
        assert isinstance(out, list)
        assert all(map(np.array_equal, out, parts(expected[0], q_ends)))
        assert all(map(np.array_equal, weights, expected[2]))
        found = np.concatenate(lse, axis=1) if isinstance(lse, (list, tuple)) else lse
        assert np.array_equal(found, expected[1])


@pytest.mark.dtypes("float32")
def test_lengths_of_keys_are_those_of_queries_by_default(isa: str, packed: Any) -> None:
    q, k, v, ends, _ = packed(q_lens=[5, 0, 40], kv_lens=[5, 0, 40])
    expected = sa.attention_varlen(q, k, v, ends, ends, causal=True)
    assert np.array_equal(sa.attention_varlen(q, k, v, ends, causal=True), expected)
    for kind in (list, np.int32, np.uint8):
        given = ends.tolist() if kind is list else ends.astype(kind)
        assert np.array_equal(sa.attention_varlen(q, k, v, given, causal=True), expected)


@pytest.mark.dtypes("float32")
@pytest.mark.parametrize("lens", [[], [0], [0, 0], [0, 3, 0]])
def test_nothing_at_all(isa: str, packed: Any, lens: list[int]) -> None:
    q, k, v, ends, _ = packed(q_lens=lens, kv_lens=lens)
    out, lse, weights = sa.attention_varlen(q, k, v, ends, return_lse=True, return_weights=True)
    assert (out.shape, lse.shape) == ((sum(lens), HEADS, VALUE_DIM), (HEADS, sum(lens)))
    assert [w.shape for w in weights] == [(HEADS, n, n) for n in lens]
    if lens:
        lists = sa.attention_varlen(parts(q, ends), parts(k, ends), parts(v, ends))
        assert [x.shape for x in lists] == [(n, HEADS, VALUE_DIM) for n in lens]
    else:  # an empty list does not say how many heads there are
        with pytest.raises(ValueError, match=r"^attention_varlen: q is an empty list"):
            sa.attention_varlen([], [], [])


@pytest.mark.dtypes("float32")
def test_a_sequence_without_keys_answers_0(isa: str, packed: Any) -> None:
    q, k, v, q_ends, k_ends = packed(q_lens=[2, 3], kv_lens=[0, 4])
    out, lse = sa.attention_varlen(q, k, v, q_ends, k_ends, return_lse=True)
    assert not out[:2].any()
    assert np.isneginf(lse[:, :2]).all()
    assert np.isfinite(lse[:, 2:]).all()


def test_neighbours_do_not_leak(isa: str, packed: Any) -> None:
    q, k, v, q_ends, k_ends = packed()
    expected = sa.attention_varlen(q, k, v, q_ends, k_ends, causal=True)
    for n in (0, 2, 3):
        own = slice(k_ends[n], k_ends[n + 1])
        odd_k, odd_v, odd_q = k.copy(), v.copy(), q.copy()
        odd_k[own], odd_v[own], odd_q[q_ends[n] : q_ends[n + 1]] = np.nan, np.inf, np.nan
        found = sa.attention_varlen(odd_q, odd_k, odd_v, q_ends, k_ends, causal=True)
        others = np.r_[: q_ends[n], q_ends[n + 1] : len(q)]
        assert np.array_equal(found[others], expected[others])
        assert np.isnan(found[q_ends[n] : q_ends[n + 1]]).all()


def test_strides_do_not_matter(isa: str, packed: Any) -> None:
    q, k, v, *ends = packed()
    expected = sa.attention_varlen(q, k, v, *ends)
    wide = [np.repeat(x, 2, axis=-1)[..., ::2] for x in (q, k, v)]
    assert np.array_equal(sa.attention_varlen(*wide, *ends), expected)
    by_head = [x.swapaxes(0, 1).copy().swapaxes(0, 1) for x in (q, k, v)]
    assert np.array_equal(sa.attention_varlen(*by_head, *ends), expected)
    backward = [x[::-1].copy()[::-1] for x in (q, k, v)]
    assert np.array_equal(sa.attention_varlen(*backward, *ends), expected)


@pytest.mark.dtypes("float32")
def test_out(isa: str, packed: Any) -> None:
    q, k, v, *ends = packed()
    expected, expected_lse = sa.attention_varlen(q, k, v, *ends, causal=True, return_lse=True)
    out = np.full_like(expected, 7)
    found, lse = sa.attention_varlen(q, k, v, *ends, causal=True, out=out, return_lse=True)
    assert found is out
    assert np.array_equal(out, expected)
    assert np.array_equal(lse, expected_lse)
    strided = np.zeros((len(q), HEADS, 2 * VALUE_DIM), np.float32)[..., ::2]
    assert sa.attention_varlen(q, k, v, *ends, causal=True, out=strided) is strided
    assert np.array_equal(strided, expected)


@pytest.mark.dtypes("float32")
@pytest.mark.parametrize("which", ["q", "k", "v", "shifted"])
def test_out_may_overlap_with_an_input(isa: str, normal: Any, which: str) -> None:
    ends, memory = np.array([0, 5, 60, 61]), {name: normal(70, 4, 8) for name in "qkv"}
    arrays = {name: x[:61] for name, x in memory.items()}
    expected = sa.attention_varlen(*(x.copy() for x in arrays.values()), ends, causal=True)
    out = memory["k"][3:64] if which == "shifted" else arrays[which]
    sa.attention_varlen(*arrays.values(), ends, causal=True, out=out)
    assert np.array_equal(out, expected)


NUMBERS = np.array([0, 2, 4])
BAD_CALLS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"cu_seqlens_q": [0, 3, 2, 4]}, ValueError, "cu_seqlens_q"),
    ({"cu_seqlens_q": [1, 2, 4]}, ValueError, "cu_seqlens_q"),
    ({"cu_seqlens_q": [-1, 2, 4]}, ValueError, "cu_seqlens_q"),
    ({"cu_seqlens_q": [0, 2, 5]}, ValueError, "cu_seqlens_q"),
    ({"cu_seqlens_q": [0, 2, 3]}, ValueError, "cu_seqlens_q"),
    ({"cu_seqlens_q": []}, (TypeError, ValueError), "cu_seqlens_q"),
    ({"cu_seqlens_q": [[0, 4]]}, ValueError, "cu_seqlens_q"),
    ({"cu_seqlens_q": 4}, ValueError, "cu_seqlens_q"),
    ({"cu_seqlens_q": [0.0, 2.0, 4.0]}, TypeError, "cu_seqlens_q"),
    ({"cu_seqlens_q": "0, 4"}, TypeError, "cu_seqlens_q"),
    ({"cu_seqlens_q": None}, (TypeError, ValueError), "cu_seqlens_q"),
    ({"cu_seqlens_q": [0, 1 << 62, 4]}, ValueError, "cu_seqlens_q"),
    ({"cu_seqlens_k": [0, 3, 2, 6]}, ValueError, "cu_seqlens_k"),
    ({"cu_seqlens_k": [0, 2, 7]}, ValueError, "cu_seqlens_k"),
    ({"cu_seqlens_k": [0, 6]}, ValueError, "cu_seqlens"),
    ({"cu_seqlens_k": None}, ValueError, "cu_seqlens_q|cu_seqlens_k"),  # those of q end at 4
    ({"q": np.zeros((4, 8), np.float32)}, ValueError, "q has "),
    ({"q": np.zeros((4, 2, 7), np.float32)}, ValueError, "head_dim|dim"),
    ({"q": np.zeros((4, 2, 8), np.float64)}, TypeError, "dtype|float"),
    ({"q": np.zeros((4, 2, 8), int)}, TypeError, "q has dtype"),
    ({"q": [np.zeros((4, 2, 8), np.float32)]}, (TypeError, ValueError), "list|cu_seqlens"),
    ({"k": np.zeros((5, 2, 8), np.float32)}, ValueError, "cu_seqlens_k|k has"),
    ({"v": np.zeros((5, 2, 8), np.float32)}, ValueError, "v has|cu_seqlens_k|k, v|v"),
    ({"k": np.zeros((6, 3, 8), np.float32)}, ValueError, "head"),
    ({"mask": np.ones((2, 3), bool)}, (TypeError, ValueError), "mask"),
    ({"mask": [None]}, ValueError, "mask"),
    ({"mask": [np.ones((2, 2), bool), None]}, ValueError, "mask"),
    ({"mask": [np.ones((2, 3)), None]}, TypeError, "mask"),
    ({"bias": [np.ones((3, 2, 3), np.float32), None]}, ValueError, "bias"),
    ({"q_offset": [0, 1, 2]}, ValueError, "q_offset"),
    ({"q_offset": 0.5}, TypeError, "q_offset"),
    ({"alibi_slopes": np.ones(3)}, ValueError, "alibi_slopes"),
    ({"alibi_slopes": np.ones((3, 2))}, ValueError, "alibi_slopes"),
    ({"window": 3}, TypeError, "window"),
    ({"q_lens": [2, 2]}, TypeError, "q_lens.*cu_seqlens_q"),
    ({"kv_lens": [3, 3]}, TypeError, "kv_lens.*cu_seqlens_k"),
    ({"layout": "bhsd"}, TypeError, "layout"),
    ({"is_causal": True}, TypeError, "did you mean 'causal'"),
    ({"out": np.zeros((4, 2, 7), np.float32)}, ValueError, "out"),
    ({"out": np.zeros((4, 2, 8))}, TypeError, "out"),
    ({"out": np.broadcast_to(np.zeros(8, np.float32), (4, 2, 8))}, ValueError, "out"),
    ({"out": "x"}, TypeError, "out"),
]  # fmt: skip


@pytest.mark.one_isa
@pytest.mark.parametrize(("changed", "exception", "message"), BAD_CALLS)
def test_what_is_refused(changed: dict[str, Any], exception: Any, message: str) -> None:
    arguments: dict[str, Any] = {
        "cu_seqlens_q": NUMBERS,
        "cu_seqlens_k": [0, 3, 6],
        "out": np.full((4, 2, 8), 5.0, "f4"),
    }
    for name, length in (("q", 4), ("k", 6), ("v", 6)):
        arguments[name] = np.ones((length, 2, 8), np.float32)
    assert (sa.attention_varlen(**{**arguments, "out": None}) == 1).all()
    with pytest.raises(exception, match=f"^attention_varlen: (?s:.*)({message})"):
        sa.attention_varlen(**{**arguments, **changed})
    assert (arguments["out"] == 5).all()


@pytest.mark.one_isa
@pytest.mark.parametrize("given", ["q", "k", "v"])
def test_lists_go_with_lists(given: str) -> None:
    lists = {name: [np.ones((n, 2, 8), np.float32) for n in (3, 4)] for name in "qkv"}
    with pytest.raises((TypeError, ValueError), match=r"^attention_varlen: .*cu_seqlens"):
        sa.attention_varlen(**lists, cu_seqlens_q=[0, 3, 7])
    with pytest.raises((TypeError, ValueError), match=r"^attention_varlen: "):
        sa.attention_varlen(**{**lists, given: lists[given][:1]})
    with pytest.raises((TypeError, ValueError), match=r"^attention_varlen: "):
        sa.attention_varlen(**{**lists, given: np.ones((7, 2, 8), np.float32)})
