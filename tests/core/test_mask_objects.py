"""Masks as expressions, compared with NumPy's logical operations and with the reference."""

from __future__ import annotations

import operator
import tracemalloc
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import selfattn as sa
from selfattn import _masked, masks, reference, viz
from selfattn._arguments import core_options
from selfattn._mask_nodes import TILE_KEYS, Grid

BFLOAT = np.dtype(ml_dtypes.bfloat16)
ROUNDING = {"float64": 2.0**-48, "float32": 2.0**-19, "float16": 2.0**-10, "bfloat16": 2.0**-7}
QUERIES, KEYS = 300, 420  # more than a block of queries, and some tiles of keys
IDS = np.stack([np.arange(KEYS) // 90, np.sort(np.arange(KEYS) % 5)])
OWN = np.stack([np.arange(QUERIES) // 70, np.full(QUERIES, 9)])  # in the second entry, no query finds its document
DENSE = np.random.default_rng(1).random((6, QUERIES, KEYS)) < 0.4

EXPRESSIONS: dict[str, Any] = {
    "causal": masks.causal(),
    "own offset": masks.causal(3) & masks.window(40, 30),
    "window": masks.window(20, 4) & masks.window(None, 2) & masks.chunk(33),
    "prefix": masks.causal() | masks.prefix(11),
    "limited prefix": (masks.causal() | masks.prefix(11)) & masks.window(60, None),
    "window, sink": (masks.window(30, 0) | masks.prefix(4)) & masks.causal(),
    "only prefix": masks.prefix(256),
    "documents": masks.documents(IDS, OWN),
    "causal documents": masks.documents(IDS[0], OWN[0]) & masks.causal(),
    "other documents": ~masks.documents(IDS, OWN) & masks.causal(),
    "far": ~masks.window(100, None),
    "dense": masks.dense(DENSE),
    "dense, joined": masks.dense(DENSE[:, :1]) & masks.dense(DENSE[0]) & masks.causal() | masks.chunk(50),
    "nothing": masks.causal() & ~masks.causal(),
    "everything": masks.causal() | ~masks.causal(),
}
OPTIONS: dict[str, Any] = {
    "plain": {},
    "offset": {"q_offset": np.array([5, 100])},
    "lengths": {"kv_lens": np.array([250, 420]), "q_lens": np.array([200, 300]), "kv_starts": np.array([3, 150])},
    "limits": {"causal": True, "window": (150, 3), "sinks": np.linspace(-1, 1, 6)},
    "prefix": {"causal": True, "prefix_lens": np.array([40, 7])},
    "chunk": {"chunk": 64, "softcap": 2.0, "scale": 0.7},
    "distances": {
        "alibi_slopes": np.linspace(0.1, 1, 6),
        "t5": sa.T5Bias(np.linspace(-2, 2, 32 * 6).reshape(32, 6)),
        "bias": np.random.default_rng(3).standard_normal((6, QUERIES, 1)).astype("f4"),
    },
}


def operands(normal: Any, dtype: Any = np.float32) -> Any:
    keys, values = (normal(2, 2, KEYS, width, dtype=dtype) for width in (16, 5))
    return normal(2, 6, QUERIES, 16, dtype=dtype), keys, values


def array_for(mask: Any, **options: Any) -> Any:
    """Return the mask as an array, at the offset of a call with these options."""
    lens = [options.get(name, n) for name, n in (("kv_lens", KEYS), ("q_lens", QUERIES))]
    return mask.array(QUERIES, KEYS, q_offset=options.get("q_offset", np.subtract(*lens)))


def check(mask: Any, arrays: Any, **options: Any) -> None:
    found, lse = sa.attention(*arrays, mask=mask, return_lse=True, **options)
    wide = (x.astype(np.float64) for x in arrays)
    exact = reference.attention(*wide, mask=array_for(mask, **options), **options)
    assert found.dtype == arrays[0].dtype
    bound = ROUNDING[found.dtype.name] * (exact.magnitude + 1e-30)
    assert np.all(abs(found.astype(np.float64) - exact.out) <= bound)
    unseen = np.isinf(exact.lse)
    assert np.array_equal(np.isneginf(lse), unseen)
    assert np.all(abs(lse[~unseen] - exact.lse[~unseen]) < 2e-5)


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


@pytest.mark.one_isa
@pytest.mark.parametrize("text", literal())
def test_definitions(text: str) -> None:
    mask, expected = literal()[text]
    found = mask.array(7, 9)
    assert repr(mask) == text
    assert found.dtype == bool
    assert found.flags.writeable
    assert np.array_equal(found, expected)


@pytest.mark.one_isa
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


@pytest.mark.one_isa
@given(a=expressions(5, 9), b=expressions(5, 9))
@settings(max_examples=60, deadline=None)
def test_algebra(a: Any, b: Any) -> None:
    one, other = a.array(5, 9), b.array(5, 9)
    assert np.array_equal((a & b).array(5, 9), one & other)
    assert np.array_equal((a | b).array(5, 9), one | other)
    assert np.array_equal((~a).array(5, 9), ~one)
    assert np.array_equal((~(a & b)).array(5, 9), (~a | ~b).array(5, 9))
    assert np.array_equal((~(a | b)).array(5, 9), (~a & ~b).array(5, 9))


@pytest.mark.one_isa
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


@pytest.mark.one_isa
@given(mask=expressions(270, 300), limits=st.sampled_from([{}, {"causal": True}, {"q_offset": 5, "window": (30, 9)}]))
@settings(max_examples=25, deadline=None)
def test_random_expressions(mask: Any, limits: Any) -> None:
    q, k = np.random.default_rng(2).standard_normal((2, 300, 8))
    found = sa.attention(q[:270], k, k, mask=mask, **limits)
    dense = mask.array(270, 300, q_offset=limits.get("q_offset", 30))
    assert np.allclose(found, sa.attention(q[:270], k, k, mask=dense, **limits), rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_against_the_reference(isa: str, normal: Any, name: str) -> None:
    arrays = operands(normal)
    names = OPTIONS if isa == sa.isas()[-1] else ["plain", "lengths"]
    for options in names:
        check(EXPRESSIONS[name], arrays, **OPTIONS[options])


@pytest.mark.parametrize("dtype", [np.dtype(np.float64), np.dtype(np.float16), BFLOAT], ids=str)
def test_types(isa: str, normal: Any, dtype: Any) -> None:
    for name in ("documents", "window, sink"):
        check(EXPRESSIONS[name], operands(normal, dtype))


@pytest.mark.parametrize(
    ("mask", "options"),
    [
        (masks.causal() & masks.window(9, None), {"causal": True, "window": (9, None)}),
        (masks.window(9, 5) & masks.window(20, 2), {"window": (9, 2)}),
        (masks.chunk(16) & masks.causal(), {"causal": True, "chunk": 16}),
        (masks.causal() | masks.prefix(9), {"causal": True, "prefix_lens": 9}),
        (masks.prefix(999) | (masks.window(None, 3) & masks.causal()), {"causal": True, "prefix_lens": KEYS}),
        (masks.causal(4), {"causal": True, "q_offset": 4}),
        (masks.dense(DENSE) & masks.causal(), {"mask": DENSE, "causal": True}),
    ],
    ids=repr,
)
def test_lowered_masks_are_options(isa: str, normal: Any, mask: Any, options: Any) -> None:
    q, k, v = operands(normal)
    assert np.array_equal(sa.attention(q, k, v, mask=mask), sa.attention(q, k, v, **options))
    assert sa.explain(q, k, v, mask=mask) == sa.explain(q, k, v, **options)
    assert np.array_equal(
        sa.attention(q, k, v, mask=mask, causal=True), sa.attention(q, k, v, mask=array_for(mask), causal=True)
    ) or ("prefix" in repr(mask) or "causal(4)" in repr(mask))


def test_results_beside_out(isa: str, normal: Any) -> None:
    q, k, v = operands(normal)
    for name in ("causal documents", "dense, joined"):
        mask, dense = EXPRESSIONS[name], array_for(EXPRESSIONS[name])
        asked = {"return_lse": True, "return_weights": True, "return_key_mass": True}
        found, expected = (sa.attention(q, k, v, mask=m, **asked) for m in (mask, dense))
        assert [x.shape for x in found] == [x.shape for x in expected]
        assert [x.dtype for x in found] == [x.dtype for x in expected]
        assert all(np.allclose(a, b, atol=2e-5) for a, b in zip(found, expected, strict=True))
        dropped = [sa.attention(q, k, v, mask=m, dropout=0.3, seed=5, return_weights=True) for m in (mask, dense)]
        assert np.array_equal(dropped[0][1] == 0, dropped[1][1] == 0)
        assert np.allclose(dropped[0][0], dropped[1][0], atol=1e-5)


def test_shapes_layouts_and_out(isa: str, normal: Any) -> None:
    q, k, v = operands(normal)
    mask = masks.documents(IDS[0], OWN[0])
    whole, lse = sa.attention(q, k, v, mask=mask, return_lse=True)
    one = sa.attention(q[0, 0], k[0, 0], v[0, 0], mask=mask, return_lse=True)
    assert [x.shape for x in one] == [(QUERIES, 5), (QUERIES,)]
    assert np.allclose(one[0], whole[0, 0], atol=1e-6)
    swapped = [x.swapaxes(1, 2) for x in (q, k, v)]
    found = sa.attention(*swapped, layout="bshd", mask=mask, return_lse=True)
    assert np.array_equal(found[0], whole.swapaxes(1, 2))
    assert np.array_equal(found[1], lse)
    assert np.array_equal(sa.attention(np.stack([q, q]), k, v, mask=mask)[1], whole)
    for out in (np.empty_like(whole), np.empty_like(whole)[:, ::-1]):
        assert sa.attention(q, k, v, mask=mask, out=out) is out
        assert np.array_equal(out, whole)
    wide = q.copy()
    assert np.array_equal(sa.attention(wide, k, k, mask=mask, out=wide), sa.attention(q, k, k, mask=mask))
    for n, m in ((0, KEYS), (3, 0)):
        empty = sa.attention(q[..., :n, :], k[..., :m, :], v[..., :m, :], mask=~masks.chunk(5), return_lse=True)
        assert [x.shape for x in empty] == [(2, 6, n, 5), (2, 6, n)]
        assert not empty[0].any()


def test_bits_and_hidden_keys(isa: str, normal: Any) -> None:
    q, k, v = operands(normal)
    mask = masks.documents(IDS, OWN) | masks.prefix(3)
    found = sa.attention(q, k, v, mask=mask)
    for threads in (1, 2, 3):
        assert np.array_equal(sa.attention(q, k, v, mask=mask, num_threads=threads), found)
    for entry in (0, 1):
        own = masks.documents(IDS[entry], OWN[entry]) | masks.prefix(3)
        assert np.array_equal(sa.attention(q[entry], k[entry], v[entry], mask=own), found[entry])
    strided = np.repeat(k, 2, axis=3)[..., ::2]
    assert np.array_equal(sa.attention(np.asfortranarray(q), strided, v, mask=mask), found)
    hidden = ~mask.array(QUERIES, KEYS).any(axis=(1, 2))
    assert hidden.any()
    for entry in (0, 1):
        k[entry][:, hidden[entry]], v[entry][:, hidden[entry]] = np.nan, np.inf
    assert np.array_equal(sa.attention(q, k, v, mask=mask), found)


def plan_of(mask: Any, q_len: int, kv_len: int, **options: Any) -> list[tuple[range, int, int, bool]]:
    q, k = np.zeros((q_len, 1), np.float32), np.zeros((kv_len, 1), np.float32)
    call = _masked.masked("attention", (q, k, k), mask, core_options("attention", **options))
    return [(x.queries, int(x.begin), int(x.end), x.mask is not None) for x in call.blocks()]


@pytest.mark.one_isa
def test_blocks_read_only_keys_that_may_be_seen() -> None:
    ids = np.arange(1024) // 512
    first, second, third, fourth = (range(n, n + 256) for n in (0, 256, 512, 768))
    assert plan_of(masks.documents(ids), 1024, 1024) == [
        (first, 0, 512, False), (second, 0, 512, False), (third, 512, 1024, False), (fourth, 512, 1024, False),
    ]  # fmt: skip
    assert plan_of(masks.documents(ids) & masks.causal(), 1024, 1024) == [
        (first, 0, 256, False), (second, 0, 512, False), (third, 512, 768, False), (fourth, 512, 1024, False),
    ]  # fmt: skip
    assert plan_of(masks.documents(ids), 1024, 1024, window=(10, 5))[1] == (second, 246, 512, False)
    assert plan_of(~masks.window(None, 255), 512, 512) == [(range(256), 256, 512, True), (second, 0, 0, False)]
    assert plan_of(masks.prefix(200), 100, 1024) == [(range(100), 0, 256, True)]
    assert plan_of(masks.prefix(256), 100, 1024) == [(range(100), 0, 256, False)]
    explained = sa.explain(*[np.zeros((1024, 8), np.float32)] * 3, mask=masks.documents(ids))
    numbers = ("blocks_of_queries", "blocks_with_mask", "pairs", "pairs_skipped")
    assert [explained[name] for name in numbers] == [4, 0, 1024**2, 1024**2 // 2]


@pytest.mark.one_isa
def test_memory() -> None:
    x = np.zeros((1, 20_000, 4), np.float32)
    mask = masks.documents(np.arange(20_000) // 300) & masks.causal()
    sa.attention(x[:, :300], x[:, :300], x[:, :300], mask=~masks.causal())
    tracemalloc.start()
    try:
        sa.attention(x, x, x, mask=mask)
        assert tracemalloc.get_traced_memory()[1] < 20_000**2 / 40
    finally:
        tracemalloc.stop()


@pytest.mark.one_isa
def test_pictures() -> None:
    mask = masks.causal() & masks.window(1, None)
    weights = np.full((4, 4), 0.25)
    assert viz.text(weights, mask=mask) == viz.text(weights, mask=mask.array(4, 4))


X = np.zeros((1, 2, 4, 8), np.float32)
W = np.zeros((16, 16), np.float32)


@pytest.mark.one_isa
@pytest.mark.parametrize(
    "call",
    [
        lambda m: sa.attention_vjp(X, X, X, mask=m),
        lambda m: sa.AttentionState(X, kv_len=4, mask=m),
        lambda m: sa.attention_varlen(X[0], X[0], X[0], [0, 2], mask=[m]),
        lambda m: sa.self_attention(X[0, :, 0], W[:8, :8], W[:8, :8], W[:8, :8], num_heads=2, mask=m),
        lambda m: sa.attention(X, X, X, bias=m),
        lambda m: sa.compat.scaled_dot_product_attention(X, X, X, attn_mask=m),
        lambda m: reference.attention(X, X, X, mask=m),
        np.asarray,
    ],
)
def test_other_functions_name_the_array(call: Any) -> None:
    with pytest.raises(TypeError, match=r"mask\.array\(q_len, kv_len\)"):
        call(masks.causal())


IDS_4 = np.arange(4)


@pytest.mark.one_isa
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
        (lambda: sa.attention(X, X, X, mask=masks.documents([1, 2])), ValueError, "documents of 2 keys, but there are 4"),
        (lambda: sa.attention(X[:, :, :2], X, X, mask=masks.documents(IDS_4)), ValueError, "there are 2 queries: pass q_ids"),
        (lambda: sa.attention(X, X, X, mask=masks.documents([IDS_4] * 3)), ValueError, r"mask has \(3, 1\) batch entries"),
        (lambda: sa.attention(X, X, X, mask=masks.causal() | masks.dense(np.ones((3, 4), bool))), ValueError, "dense part"),
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
