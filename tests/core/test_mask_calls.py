"""Calls of `attention` with masks that are expressions, compared with the reference and with options."""

from __future__ import annotations

import tracemalloc
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import selfattn as sa
from selfattn import _masked, masks, reference
from selfattn._arguments import core_options

BFLOAT = np.dtype(ml_dtypes.bfloat16)
ROUNDING = {"float64": 2.0**-48, "float32": 2.0**-19, "float16": 2.0**-10, "bfloat16": 2.0**-7}
HEADS, QUERIES, KEYS = 4, 70, 300  # several blocks of queries, see `small_blocks`, and of tiles of keys
IDS = np.stack([np.arange(KEYS) // 90, np.sort(np.arange(KEYS) % 5)])
OWN = np.stack([np.arange(QUERIES) // 20, np.full(QUERIES, 9)])  # in the second entry, no query finds its document
DENSE = np.random.default_rng(1).random((HEADS, QUERIES, KEYS)) < 0.4

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
    "lengths": {"kv_lens": np.array([250, KEYS]), "q_lens": np.array([50, QUERIES]), "kv_starts": np.array([3, 150])},
    "limits": {"causal": True, "window": (150, 3), "sinks": np.linspace(-1, 1, HEADS)},
    "prefix": {"causal": True, "prefix_lens": np.array([40, 7])},
    "chunk": {"chunk": 64, "softcap": 2.0, "scale": 0.7},
    "distances": {
        "alibi_slopes": np.linspace(0.01, 0.1, HEADS),
        "t5": sa.T5Bias(np.linspace(-2, 2, 32 * HEADS).reshape(32, HEADS)),
        "bias": np.random.default_rng(3).standard_normal((HEADS, QUERIES, 1)).astype("f4"),
    },
}


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_masked, "BLOCK_QUERIES", 32)


def operands(normal: Any, dtype: Any = np.float32) -> Any:
    keys, values = (normal(2, 2, KEYS, width, dtype=dtype) for width in (8, 5))
    return normal(2, HEADS, QUERIES, 8, dtype=dtype), keys, values


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


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("name", EXPRESSIONS)
@pytest.mark.one_isa  # a mask is turned into arguments of the core, whose kernels are tested elsewhere
def test_against_the_reference(normal: Any, name: str) -> None:
    arrays = operands(normal)
    for options in OPTIONS:
        check(EXPRESSIONS[name], arrays, **OPTIONS[options])


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.one_isa  # as above
@pytest.mark.parametrize("dtype", [np.dtype(np.float64), np.dtype(np.float16), BFLOAT], ids=str)
def test_types(normal: Any, dtype: Any) -> None:
    for name in ("documents", "window, sink"):
        check(EXPRESSIONS[name], operands(normal, dtype))


@pytest.mark.one_isa  # as above
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
def test_lowered_masks_are_options(normal: Any, mask: Any, options: Any) -> None:
    q, k, v = operands(normal)
    assert np.array_equal(sa.attention(q, k, v, mask=mask), sa.attention(q, k, v, **options))
    one = {"num_threads": 1}  # the default number of threads follows measured times
    assert sa.explain(q, k, v, mask=mask, **one) == sa.explain(q, k, v, **options, **one)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.one_isa  # as above
def test_results_beside_out(normal: Any) -> None:
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


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.one_isa  # as above
def test_shapes_layouts_and_out(normal: Any) -> None:
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
        assert [x.shape for x in empty] == [(2, HEADS, n, 5), (2, HEADS, n)]
        assert not empty[0].any()


@pytest.mark.usefixtures("small_blocks")
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
def test_one_length_for_all(normal: Any) -> None:
    x, mask = normal(2, 6, 8), ~masks.prefix(1)
    expected = sa.attention(x, x, x, q_lens=3, kv_lens=5, mask=mask.array(6, 6))
    assert np.array_equal(sa.attention(x, x, x, q_lens=3, kv_lens=5, mask=mask), expected)
    assert sa.explain(x, x, x, q_lens=3, kv_lens=5, mask=mask)["blocks_of_queries"] == 1


@pytest.mark.one_isa
def test_offsets_beyond_any_position(normal: Any) -> None:
    x, mask = normal(2, 6, 8), masks.window(5, None) | masks.prefix(0)
    for offset in (-(1 << 61), 1 << 61):
        assert np.array_equal(sa.attention(x, x, x, q_offset=offset, mask=mask),
                              sa.attention(x, x, x, q_offset=offset, window=(5, None)))  # fmt: skip
