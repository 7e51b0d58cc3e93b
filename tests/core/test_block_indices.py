"""Blocks of keys that are chosen by index, compared with a mask that hides all other keys."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from chosen_cases import BATCH, CASES, HEADS, KEYS, KV_HEADS, QUERIES, TYPES, check, chosen_mask, operands, per_head
from hypothesis import given, settings
from hypothesis import strategies as st
from random_problems import checked, problems

import selfattn as sa
from selfattn import masks
from selfattn._chosen_pages import Blocks, Chosen

# Blocks of queries and keys that divide 23 queries and 41 keys or do not, and that hold more than all.
BLOCKS = [(1, 1), (1, 8), (5, 16), (23, 7), (8, 41), (100, 1 << 60)]


def drawn(rng: Any, block: tuple[int, int], heads: int, n: int) -> Any:
    """Draw indices of blocks for blocks of queries."""
    rows, count = -(-QUERIES // block[0]), -(-KEYS // block[1])
    return rng.integers(-1, count, (BATCH, heads, rows, n), np.int32)


def clipped(block: tuple[int, int]) -> tuple[int, int]:
    return min(block[0], QUERIES), min(block[1], KEYS)


def given_blocks(indices: Any, block: tuple[int, int]) -> dict[str, Any]:
    """Return the arguments; a number alone is a block of keys for each query."""
    return {"block_indices": indices, "block_size": block[1] if block[0] == 1 else block}


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("block", BLOCKS)
def test_as_with_a_mask(isa: str, rng: Any, normal: Any, dtype: Any, block: tuple[int, int]) -> None:
    q, k, v = operands(normal, dtype)
    for heads, n in ((1, 1), (KV_HEADS, 3), (HEADS, 9)):
        indices = drawn(rng, block, heads, n)
        check(q, k, v, chosen_mask(indices, clipped(block)), **given_blocks(indices, block))
    none = np.full((BATCH, 1, 1, 3), -1)
    check(q, k, v, chosen_mask(none, clipped(block)), **given_blocks(none, block))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("block", [(1, 8), (5, 6), (QUERIES, 16)])
def test_options(isa: str, rng: Any, normal: Any, block: tuple[int, int], case: str) -> None:
    for dtype, heads in ((np.float32, 1), (np.float32, HEADS), (np.float64, KV_HEADS)):
        q, k, v = operands(normal, dtype)
        indices = drawn(rng, block, heads, 2)
        check(q, k, v, chosen_mask(indices, block), **given_blocks(indices, block), **CASES[case])


@settings(checked, max_examples=40)
@given(problems(), st.integers(0, 1 << 30), st.integers(1, 70), st.integers(1, 70), st.booleans())
def test_any_options(isa: str, problem: Any, seed: int, queries: int, keys: int, shared: bool) -> None:
    (q, k, v), options = problem
    for name in ("dropout", "seed"):
        options.pop(name, None)
    rng = np.random.default_rng(seed)
    lengths = q.shape[2], k.shape[2]
    rows, count = (-(-length // block) for length, block in zip(lengths, (queries, keys), strict=True))
    heads = int(rng.choice([1, k.shape[1], q.shape[1]]))
    indices = rng.integers(-1, count, (q.shape[0], heads, 1 if shared else rows, int(rng.integers(5))))
    chosen = chosen_mask(indices, (queries, keys), lengths)
    check(q, k, v, chosen, block_indices=indices, block_size=[queries, keys], **options)


def test_shapes_layouts_and_out(isa: str, rng: Any, normal: Any) -> None:
    q, k, v = operands(normal, np.float32)
    for block in ((1, 8), (5, 8), (QUERIES, 8)):
        indices = drawn(rng, block, 1, 3)[:1]
        more = given_blocks(indices, block)
        whole, lse = sa.attention(q, k, v, return_lse=True, **more)
        for fewer in (indices[0], indices[0, 0], indices[0, 0].tolist()):
            assert np.array_equal(sa.attention(q, k, v, **more | {"block_indices": fewer}), whole)
        one = sa.attention(q[0, 0], k[0, 0], v[0, 0], return_lse=True, **more | {"block_indices": indices[0, 0]})
        assert np.allclose(one[0], whole[0, 0], atol=1e-6)
        assert np.allclose(one[1], lse[0, 0], atol=1e-6)
        swapped = [x.swapaxes(1, 2) for x in (q, k, v)]
        for last in (swapped, [x.copy() for x in swapped]):
            found = sa.attention(*last, layout="bshd", **more)
            assert found.flags.c_contiguous
            assert np.array_equal(found, whole.swapaxes(1, 2))
        out = np.empty_like(whole)[:, ::-1]
        assert sa.attention(q, k, v, out=out, **more) is out
        assert np.array_equal(out, whole)
        wide = q.copy()
        assert np.array_equal(sa.attention(wide, k, k, out=wide, **more), sa.attention(q, k, k, **more))
        wider = np.repeat(k, 2, axis=3)[..., ::2]
        for strided in (wider, np.asfortranarray(k), k[:, :, ::-1].copy()[:, :, ::-1], k.astype(">f4")):
            assert np.array_equal(sa.attention(q, strided, v, **more), whole)
        assert np.array_equal(sa.attention(np.stack([q, q]), k, v, **more)[1], whole)
        narrow = sa.attention(q, k.astype(np.float16), v.astype(np.float16), **more)
        assert np.allclose(narrow, whole, atol=5e-3)


def test_nothing_to_see(isa: str, normal: Any) -> None:
    q, k, v = operands(normal, np.float32)
    bias = np.zeros((QUERIES, 1))
    for keys, indices in ((k[:, :, :0], np.full((QUERIES, 4), -1)), (k, np.empty((QUERIES, 0), int))):
        values = v[:, :, : keys.shape[2]]
        out, lse = sa.attention(q, keys, values, bias=bias, block_indices=indices, block_size=4, return_lse=True)
        assert not out.any()
        assert np.all(lse == -np.inf)
    few = {"block_indices": np.zeros((1, 2), int), "block_size": 4}
    assert sa.attention(q[:, :, :0], k, v, **few).shape == (BATCH, HEADS, 0, 5)
    assert sa.attention(q, k, v[..., :0], **few).shape == (BATCH, HEADS, QUERIES, 0)


def test_order_and_repetition_change_no_bit(isa: str, rng: Any, normal: Any) -> None:
    q, k, v = operands(normal, np.float32)
    for block in ((1, 8), (5, 8), (QUERIES, 8)):
        indices = np.sort(drawn(rng, block, 1, 4), axis=-1)
        indices[indices == 5] = -1
        more = {"causal": True, "q_offset": 15, "block_size": block}
        found = sa.attention(q, k, v, block_indices=indices, **more)
        repeated = np.repeat(rng.permuted(indices, axis=-1), 3, axis=-1)
        others = [indices[..., ::-1], repeated, np.asfortranarray(repeated), np.pad(indices, ((0, 0),) * 3 + ((3, 0),))]
        others[-1][..., :3] = -1
        for other in others:
            for threads in (1, 3):
                same = sa.attention(q, k, v, block_indices=other, num_threads=threads, **more)
                assert np.array_equal(same, found)
        k[:, :, 38:], v[:, :, 38:] = np.nan, np.inf  # which no query may see
        assert np.array_equal(sa.attention(q, k, v, block_indices=indices, **more), found)
        k[:, :, 38:], v[:, :, 38:] = 0, 0


def test_large_terms(isa: str, rng: Any, normal: Any) -> None:
    """ALiBi's distances are measured from the nearest chosen key; finite biases are clamped."""
    q, k, v = operands(normal, np.float32)
    for block in ((1, 8), (5, 8)):
        indices = drawn(rng, block, 1, 3)
        mask = per_head(chosen_mask(indices, block))
        for options in (
            {"alibi_slopes": np.linspace(0.1, 1, HEADS), "q_offset": 10**8},
            {"bias": np.full((1, 1), -1e300)},
            {"bias": np.full((1, 1), 1e300)},
        ):
            found = sa.attention(q, k, v, **given_blocks(indices, block), **options)
            assert np.allclose(found, sa.attention(q, k, v, mask=mask, **options), atol=1e-5)


@pytest.mark.one_isa
def test_masks_that_become_options(rng: Any, normal: Any) -> None:
    q, k, v = operands(normal, np.float32)
    indices = drawn(rng, (5, 8), 1, 3)
    more = {"block_indices": indices, "block_size": (5, 8)}
    found = sa.attention(q, k, v, mask=masks.causal() & masks.window(9, None), **more)
    assert np.array_equal(found, sa.attention(q, k, v, causal=True, window=(9, None), **more))


@pytest.mark.parametrize("named", [[0, 3, 4], [0, 3, -1], [0, 4, -1], [4, 4, 4], [1, 2, -1], [0, 3, 5]])
def test_a_causal_limit_remains_one(isa: str, normal: Any, named: list[int]) -> None:
    """Where the queries of a block see the tokens of its pages as by a causal limit, no bias is needed."""
    q, k, v = operands(normal, np.float32)
    q = q[:, :, :20]
    indices = np.array([named, [0, 5, 6]])  # 10 queries each, which are at the keys from 15 on, and from 25 on
    options = {"block_indices": indices, "block_size": (10, 5), "causal": True, "q_offset": 15}
    check(q, k, v, chosen_mask(indices, (10, 5), (20, KEYS))[None, None], kv_starts=[2, 2], **options)
    positions = np.arange(15, 35)[:, None]
    chosen = Chosen(indices, np.hstack([np.full_like(positions, 2), positions + 1]), Blocks(5, KEYS))
    assert not chosen.uneven
    assert chosen.causal is not None


@pytest.mark.one_isa
def test_many_queries_that_share_blocks_are_one_call(normal: Any) -> None:
    q, k = normal(1, 4, 64, 16), normal(1, 2, 256, 16)
    for rows, keys, wanted in ((1, 64, 1), (64, 1, 1), (64, 64, 1)):
        indices = np.zeros((1, rows, 3), int)
        told = sa.explain_call(sa.attention, q, k, k, causal=True, block_indices=indices, block_size=keys)
        assert len(told["parts"]) == wanted
        assert told["parts"][0]["kernel"] == ("tile" if rows == 1 else "row")


@pytest.mark.one_isa
def test_more_blocks_than_pages_can_be_numbered(normal: Any) -> None:
    k = np.broadcast_to(np.zeros((1, 1, 4), np.float32), (1, 3 << 31, 4))
    indices = np.array([[(1 << 30) - 1, 5]])
    found = sa.attention(normal(1, 2, 4), k, k, block_indices=indices, block_size=6)
    assert np.array_equal(found, np.zeros((1, 2, 4)))
    with pytest.raises(ValueError, match=f"k has {3 << 31} keys, but block_indices needs at most {2 * (2**31 - 1)}"):
        sa.attention(normal(1, 2, 4), k, k, block_indices=indices, block_size=2)


ONE = np.zeros((QUERIES, 2), int)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"block_indices": ONE}, ValueError, "block_indices needs block_size, the number of keys in a block"),
    ({"block_size": 8}, ValueError, "block_size is given without block_indices"),
    ({"key_indices": ONE, "block_size": 8}, ValueError, "key_indices cannot be used with block_size"),
    ({"key_indices": ONE, "block_indices": ONE}, ValueError, "key_indices cannot be used with block_indices"),
    ({"block_indices": ONE, "block_size": 0}, ValueError, "block_size is 0, but it must be at least 1"),
    ({"block_indices": ONE, "block_size": (1, -3)}, ValueError, "block_size is -3, but it must be at least 1"),
    ({"block_indices": ONE, "block_size": True}, TypeError, "block_size is True, but an integer is needed"),
    ({"block_indices": ONE, "block_size": 8.0}, TypeError, "block_size is 8.0, but an integer is needed"),
    (
        {"block_indices": ONE, "block_size": (1, 2, 3)},
        TypeError,
        r"block_size is \(1, 2, 3\), but an integer or a pair",
    ),
    ({"block_indices": ONE * 1.0}, TypeError, "block_indices has dtype float64, but integers are needed"),
    ({"block_indices": ONE[:2]}, ValueError, r"block_indices has shape \(2, 2\), but \(..., 6, 2 or 1, 23 or 1, n\)"),
    ({"block_indices": ONE, "block_size": (6, 8)}, ValueError, r"shape \(23, 2\), but \(..., 6, 2 or 1, 4 or 1, n\)"),
    ({"block_indices": ONE[None, None, None]}, ValueError, "block_indices has shape"),
    ({"block_indices": ONE + 6}, ValueError, r"block_indices holds 6, which is outside -1..5 \(-1: no block\)"),
    ({"block_indices": ONE - 2}, ValueError, "block_indices holds -2, which is outside -1..5"),
    ({"block_indices": ONE + (1 << 62)}, ValueError, f"block_indices holds {1 << 62}"),
    ({"block_indices": ONE.astype("u8") + np.uint64(1 << 63)}, ValueError, f"block_indices holds {1 << 63}"),
    ({"dropout": 0.1, "seed": 1}, ValueError, "block_indices cannot be used with dropout"),
    ({"return_weights": True}, ValueError, "block_indices cannot be used with return_weights"),
    ({"return_key_mass": True}, ValueError, "block_indices cannot be used with return_key_mass"),
    ({"mask": ~masks.causal()}, ValueError, r"block_indices cannot be used with this mask: pass mask\.array"),
    ({"mask": np.ones((QUERIES, KEYS + 1), bool)}, ValueError, "mask has shape"),
    ({"out": np.empty((1, 2), np.float32)}, ValueError, "out has shape"),
    ({"kv_lens": [KEYS + 1, 0]}, ValueError, "kv_lens holds 42"),
]


@pytest.mark.one_isa
@pytest.mark.parametrize(("options", "exception", "message"), BAD)
def test_refusals(normal: Any, options: Any, exception: Any, message: str) -> None:
    q, k, v = operands(normal, np.float32)
    usual: dict[str, Any] = {"block_indices": ONE, "block_size": 8}
    given = options if message.startswith(("block_indices needs", "block_size is given", "key_")) else usual | options
    with pytest.raises(exception, match=f"^attention: .*{message}"):
        sa.attention(q, k, v, **given)
