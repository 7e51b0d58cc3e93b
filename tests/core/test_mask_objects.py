"""Masks as expressions, compared with NumPy's logical operations."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import selfattn as sa
from selfattn import compat, masks, reference, viz
from selfattn._mask_nodes import TILE_KEYS, Grid

pytestmark = pytest.mark.one_isa  # about Python code that calls the core

IDS_4 = np.arange(4)
X = np.zeros((1, 2, 4, 8), np.float32)
W = np.zeros((16, 16), np.float32)


def literal() -> dict[str, tuple[Any, Any]]:
    i, j, offset = np.arange(7)[:, None], np.arange(9), 2
    ids, own = np.array([0, 0, 1, 1, 1, 3, 3, 0, 5]), np.array([0, 3, 3, 1, 9, 5, 0])
    return {
        "causal()": (masks.causal(), j <= i + offset),
        "causal(-3)": (masks.causal(-3), j <= i - 3),
        "window(2, None)": (masks.window(2, None), j - (i + offset) >= -2),
        "window(None, 1)": (masks.window(None, 1), j - (i + offset) <= 1),
        "window(1, 0)": (masks.window(1, 0), (j - i - offset >= -1) & (j <= i + offset)),
        "chunk(3)": (masks.chunk(3), j // 3 == (i + offset) // 3),
        "prefix(4)": (masks.prefix(4), j + 0 * i < 4),
        "documents(<(9,)>, q_ids=<(7,)>)": (masks.documents(ids, own), ids == own[:, None]),
        "dense(<(1, 9)>)": (masks.dense(ids == 0), (ids == 0) & (i >= 0)),
        "~chunk(3)": (~masks.chunk(3), j // 3 != (i + offset) // 3),
    }


@pytest.mark.parametrize("text", literal())
def test_definitions(text: str) -> None:
    mask, expected = literal()[text]
    found = mask.array(7, 9)
    assert repr(mask) == text
    assert found.dtype == bool
    assert found.flags.writeable
    assert np.array_equal(found, expected)


def test_shapes_of_arrays() -> None:
    ids = np.array([[0, 0, 1], [0, 1, 1]])
    assert np.array_equal(masks.documents(ids).array(3, 3), ids[:, None, :, None] == ids[:, None, None])
    assert masks.documents(ids[0]).array(3, 3).shape == (3, 3)
    offsets = masks.causal().array(2, 3, q_offset=[0, 1])
    assert offsets.astype(int).tolist() == [[[[1, 0, 0], [1, 1, 0]]], [[[1, 1, 0], [1, 1, 1]]]]
    assert (masks.causal() & ~(masks.prefix(2) | masks.chunk(3))).__repr__() == "causal() & ~(prefix(2) | chunk(3))"
    assert repr((masks.prefix(1) | masks.prefix(2)) & masks.causal()) == "(prefix(1) | prefix(2)) & causal()"


def leaves(q_len: int, kv_len: int) -> Any:
    side = st.none() | st.integers(0, kv_len)
    ids = st.lists(st.integers(0, 3), min_size=kv_len, max_size=kv_len)
    own = st.lists(st.integers(0, 3), min_size=q_len, max_size=q_len)
    return st.one_of(
        st.builds(masks.causal, st.none() | st.integers(-kv_len, kv_len)),
        st.builds(masks.window, side, side),
        st.builds(masks.chunk, st.integers(1, kv_len)),
        st.builds(masks.prefix, st.integers(0, kv_len)),
        st.builds(masks.documents, ids.map(sorted), own),
        st.builds(
            lambda seed: masks.dense(np.random.default_rng(seed).random((q_len, kv_len)) < 0.5), st.integers(0, 9)
        ),
    )


def expressions(q_len: int, kv_len: int) -> Any:
    joined = lambda inner: st.one_of(  # noqa: E731
        st.builds(operator.and_, inner, inner), st.builds(operator.or_, inner, inner), st.builds(operator.invert, inner)
    )
    return st.recursive(leaves(q_len, kv_len), joined, max_leaves=6)


@given(a=expressions(5, 9), b=expressions(5, 9))
@settings(max_examples=60, deadline=None)
def test_algebra(a: Any, b: Any) -> None:
    one, other = a.array(5, 9), b.array(5, 9)
    assert np.array_equal((a & b).array(5, 9), one & other)
    assert np.array_equal((a | b).array(5, 9), one | other)
    assert np.array_equal((~a).array(5, 9), ~one)
    assert np.array_equal((~(a & b)).array(5, 9), (~a | ~b).array(5, 9))
    assert np.array_equal((~(a | b)).array(5, 9), (~a & ~b).array(5, 9))


@given(mask=expressions(270, 300), offset=st.integers(-50, 300))
@settings(max_examples=40, deadline=None)
def test_bounds_of_tiles_hold(mask: Any, offset: int) -> None:
    grid = Grid("test", 270, 300, np.array(offset))
    whole = np.broadcast_to(mask.visible(range(270), range(300), grid), (270, 300))
    for queries in (range(256), range(256, 270), range(7, 8)):
        some, every = mask.seen(queries, grid)
        for tile, (may, must) in enumerate(zip(some, every, strict=True)):
            part = whole[queries.start : queries.stop, tile * TILE_KEYS : (tile + 1) * TILE_KEYS]
            assert may or not part.any()
            assert part.all() or not must


@given(mask=expressions(270, 300), limits=st.sampled_from([{}, {"causal": True}, {"q_offset": 5, "window": (30, 9)}]))
@settings(max_examples=25, deadline=None)
def test_random_expressions(mask: Any, limits: Any) -> None:
    q, k = np.random.default_rng(2).standard_normal((2, 300, 8))
    found = sa.attention(q[:270], k, k, mask=mask, **limits)
    dense = mask.array(270, 300, q_offset=limits.get("q_offset", 30))
    assert np.allclose(found, sa.attention(q[:270], k, k, mask=dense, **limits), rtol=0, atol=1e-13)


def test_pictures() -> None:
    mask = masks.causal() & masks.window(1, None)
    weights = np.full((4, 4), 0.25)
    assert viz.text(weights, mask=mask) == viz.text(weights, mask=mask.array(4, 4))


@pytest.mark.parametrize(
    "call",
    [
        lambda m: sa.attention_vjp(X, X, X, mask=m),
        lambda m: sa.AttentionState(X, kv_len=4, mask=m),
        lambda m: sa.attention_varlen(X[0], X[0], X[0], [0, 2], mask=[m]),
        lambda m: sa.self_attention(X[0, :, 0], W[:8, :8], W[:8, :8], W[:8, :8], num_heads=2, mask=m),
        lambda m: sa.attention(X, X, X, bias=m),
        lambda m: compat.scaled_dot_product_attention(X, X, X, attn_mask=m),
        lambda m: reference.attention(X, X, X, mask=m),
        np.asarray,
    ],
)
def test_other_functions_name_the_array(call: Any) -> None:
    with pytest.raises(TypeError, match=r"mask\.array\(q_len, kv_len\)"):
        call(masks.causal())


@pytest.mark.parametrize(
    ("call", "exception", "message"),
    [
        (lambda: masks.causal(1.5), TypeError, "masks.causal: offset is 1.5"),
        (lambda: masks.window(-1, 0), ValueError, "masks.window: window is"),
        (lambda: masks.chunk(0), ValueError, "masks.chunk: size is 0"),
        (lambda: masks.prefix(-1), ValueError, "masks.prefix: n is -1"),
        (lambda: masks.documents([0.5]), TypeError, "masks.documents: ids has dtype float64"),
        (lambda: masks.documents(3), ValueError, "masks.documents: ids has no axis"),
        (lambda: masks.dense([1, 0]), TypeError, "masks.dense: array has dtype int64, but bool is needed"),
        (lambda: masks.causal() & np.ones(3, bool), TypeError, r"masks.dense\(array\)"),
        (lambda: np.ones(3, bool) | masks.causal(), TypeError, r"masks.dense\(array\)"),
        (lambda: masks.causal() and masks.prefix(1), TypeError, "combine masks by"),
        (lambda: masks.causal().array(-1, 3), ValueError, "Mask.array: q_len is -1"),
        (lambda: masks.documents(IDS_4).array(3, 4), ValueError, "Mask.array: mask has the documents of 4 queries"),
        (lambda: sa.attention(X, X, X, mask=masks.documents([1, 2])), ValueError, "of 2 keys, but there are 4"),
        (lambda: sa.attention(X[:, :, :2], X, X, mask=masks.documents(IDS_4)), ValueError, "2 queries: pass q_ids"),
        (lambda: sa.attention(X, X, X, mask=masks.documents([IDS_4] * 3)), ValueError, r"\(3, 1\) batch entries"),
        (lambda: sa.attention(X, X, X, mask=~masks.dense(np.ones((3, 4), bool))), ValueError, "dense part"),
        (lambda: sa.attention(X, X, X, mask=~masks.causal(), key_indices=np.zeros((4, 1), int)), ValueError,
         r"key_indices cannot be used with this mask: pass mask\.array"),
        (lambda: sa.attention(X, X, X, mask=~masks.causal(), kv_lens=[2]), ValueError, "their positions are unclear"),
        (lambda: sa.attention(X[0, 0, 0], X, X, mask=masks.causal()), ValueError, "attention: q has shape"),
        (lambda: sa.attention(X, X, X, mask=~masks.causal(), out=X[0]), ValueError, "attention: out has shape"),
    ],
)  # fmt: skip
def test_refusals(call: Any, exception: Any, message: str) -> None:
    with pytest.raises(exception, match=message):
        call()
