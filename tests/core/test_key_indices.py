"""Keys that are chosen by index, compared with a mask that hides all other keys."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from chosen_cases import BATCH, CASES, HEADS, KEYS, KV_HEADS, QUERIES, TYPES, check, chosen_mask, operands, per_head

import selfattn as sa


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("heads", [1, KV_HEADS, HEADS])
def test_as_with_a_mask(isa: str, rng: Any, normal: Any, dtype: Any, heads: int) -> None:
    q, k, v = operands(normal, dtype)
    for n in (1, 3, 40, 90):
        indices = rng.integers(-1, KEYS, (BATCH, heads, QUERIES, n))
        check(q, k, v, chosen_mask(indices), key_indices=indices)
    none = np.full((BATCH, heads, QUERIES, 3), -1)
    check(q, k, v, chosen_mask(none), key_indices=none)


@pytest.mark.parametrize("case", CASES)
def test_options(isa: str, rng: Any, normal: Any, case: str) -> None:
    for dtype in (np.float32, np.float64):
        q, k, v = operands(normal, dtype)
        for heads in (1, KV_HEADS, HEADS):
            indices = rng.integers(-1, KEYS, (BATCH, heads, QUERIES, 12), np.int32)
            check(q, k, v, chosen_mask(indices), key_indices=indices, **CASES[case])
    shared = indices[:, :1, :1]  # by all queries
    check(q, k, v, chosen_mask(shared), key_indices=shared, **CASES[case])


def test_shapes_layouts_and_out(isa: str, rng: Any, normal: Any) -> None:
    q, k, v = operands(normal, np.float32)
    indices = rng.integers(-1, KEYS, (1, 1, QUERIES, 9))
    whole, lse = sa.attention(q, k, v, key_indices=indices, return_lse=True)
    assert np.array_equal(sa.attention(q, k, v, key_indices=indices[0]), whole)
    assert np.array_equal(sa.attention(q, k, v, key_indices=indices[0, 0]), whole)
    assert np.array_equal(
        sa.attention(q[0], k[0], v[0], key_indices=indices[0, 0].astype(np.uint8 if indices.min() >= 0 else np.int16)),
        whole[0],
    )
    one = sa.attention(q[0, 0], k[0, 0], v[0, 0], key_indices=indices[0, 0], return_lse=True)
    assert np.allclose(one[0], whole[0, 0], atol=1e-6)
    assert np.allclose(one[1], lse[0, 0], atol=1e-6)
    swapped = [x.swapaxes(1, 2) for x in (q, k, v)]
    assert np.array_equal(sa.attention(*swapped, layout="bshd", key_indices=indices), whole.swapaxes(1, 2))
    deep = sa.attention(np.stack([q, q]), k, v, key_indices=indices)
    assert np.array_equal(deep[1], whole)
    for out in (np.empty_like(whole), np.empty_like(whole)[:, ::-1]):
        assert sa.attention(q, k, v, key_indices=indices, out=out) is out
        assert np.array_equal(out, whole)
    wide = q.copy()
    same = sa.attention(wide, k, k, key_indices=indices)
    assert np.array_equal(sa.attention(wide, k, k, key_indices=indices, out=wide), same)
    for strided in (np.repeat(k, 2, axis=3)[..., ::2], np.asfortranarray(k), k[:, :, ::-1].copy()[:, :, ::-1]):
        assert np.array_equal(sa.attention(q, strided, v, key_indices=indices), whole)
    narrow = sa.attention(q, k.astype(np.float16), v.astype(np.float16), key_indices=indices)
    assert np.allclose(narrow, whole, atol=5e-3)
    empty = sa.attention(q, k[:, :, :0], v[:, :, :0], key_indices=np.full((QUERIES, 4), -1), return_lse=True)
    assert not empty[0].any()
    assert np.all(empty[1] == -np.inf)
    assert not sa.attention(q, k, v, key_indices=np.empty((QUERIES, 0), int)).any()


def test_indices_with_any_strides(isa: str, rng: Any, normal: Any) -> None:
    q, k, v = operands(normal, np.float32)
    indices = rng.integers(-1, KEYS, (QUERIES, 12))
    found = sa.attention(q, k, v, key_indices=indices)
    for other in (np.asfortranarray(indices), np.ascontiguousarray(indices.T).T, np.repeat(indices, 2, axis=1)[:, ::2]):
        assert np.array_equal(sa.attention(q, k, v, key_indices=other), found)
    same = np.broadcast_to(np.arange(0, KEYS, 3), (BATCH, 1, QUERIES, 14))
    check(q, k, v, chosen_mask(same), key_indices=same)
    endless = np.broadcast_to(indices[:, :1], (QUERIES, 1 << 40))
    assert np.array_equal(sa.attention(q, k, v, key_indices=endless), sa.attention(q, k, v, key_indices=indices[:, :1]))


def test_large_terms(isa: str, rng: Any, normal: Any) -> None:
    """ALiBi's distances are measured from the nearest chosen key; finite biases are clamped."""
    q, k, v = operands(normal, np.float32)
    indices = rng.integers(-1, KEYS, (BATCH, 1, QUERIES, 12))
    for offset in (10**4, 10**8):
        options = {"alibi_slopes": np.linspace(0.1, 1, HEADS), "q_offset": offset}
        found = sa.attention(q, k, v, key_indices=indices, **options)
        assert np.allclose(found, sa.attention(q, k, v, mask=per_head(chosen_mask(indices)), **options), atol=1e-5)
    for bias in (-1e300, 1e300):
        found = sa.attention(q, k, v, key_indices=indices, bias=np.full((1, 1), bias))
        plain = sa.attention(q, k, v, mask=per_head(chosen_mask(indices)), bias=np.full((1, 1), bias))
        assert np.allclose(found, plain, atol=1e-5)


def test_other_keys_are_not_read(isa: str, rng: Any, normal: Any) -> None:
    q, k, v = operands(normal, np.float32)
    indices = rng.integers(0, 20, (QUERIES, 9))
    found = sa.attention(q, k, v, key_indices=indices)
    for threads in (1, 2, 3):
        assert np.array_equal(sa.attention(q, k, v, key_indices=indices[:, ::-1], num_threads=threads), found)
    k[:, :, 20:], v[:, :, 20:] = np.nan, np.inf
    assert np.array_equal(sa.attention(q, k, v, key_indices=indices), found)
    assert np.array_equal(sa.attention(q[1:], k[1:], v[1:], key_indices=indices), found[1:])


@pytest.mark.one_isa
def test_more_keys_than_pages_can_be_numbered(normal: Any) -> None:
    k = np.broadcast_to(np.zeros((1, 1, 4), np.float32), (1, 1 << 31, 4))
    with pytest.raises(ValueError, match=f"attention: k has {1 << 31} keys, but key_indices needs at most"):
        sa.attention(normal(1, 2, 4), k, k, key_indices=np.zeros((2, 3), int))


@pytest.mark.one_isa
@pytest.mark.parametrize(
    ("options", "exception", "message"),
    [
        ({"key_indices": np.zeros((QUERIES, 2))}, TypeError, "key_indices has dtype float64, but integers are needed"),
        ({"key_indices": np.zeros((QUERIES + 1, 2), int)}, ValueError, r"key_indices has shape \(24, 2\), but"),
        ({"key_indices": np.zeros((5, QUERIES, 2), int)}, ValueError, r"key_indices has shape \(5, 23, 2\), but"),
        ({"key_indices": np.zeros((3, 1, QUERIES, 2), int)}, ValueError, "key_indices has shape"),
        ({"key_indices": np.zeros(QUERIES, int)}, ValueError, "key_indices has shape"),
        ({"key_indices": np.full((QUERIES, 2), KEYS)}, ValueError, "key_indices holds 41, which is outside -1..40"),
        ({"key_indices": np.full((QUERIES, 2), -2)}, ValueError, "key_indices holds -2, which is outside -1..40"),
        (
            {"key_indices": np.full((QUERIES, 2), 1 << 63, np.uint64)},
            ValueError,
            "key_indices holds 9223372036854775808",
        ),
        ({"dropout": 0.1, "seed": 1}, ValueError, "key_indices cannot be used with dropout"),
        ({"return_weights": True}, ValueError, "key_indices cannot be used with return_weights"),
        ({"return_key_mass": True}, ValueError, "key_indices cannot be used with return_key_mass"),
        ({"mask": np.ones((QUERIES, KEYS + 1), bool)}, ValueError, "attention: mask has shape"),
        ({"out": np.empty((1, 2), np.float32)}, ValueError, "attention: out has shape"),
        ({"kv_lens": [KEYS + 1, 0]}, ValueError, "attention: kv_lens holds 42"),
    ],
)
def test_refusals(normal: Any, options: Any, exception: Any, message: str) -> None:
    q, k, v = operands(normal, np.float32)
    with pytest.raises(exception, match=message):
        sa.attention(q, k, v, **({"key_indices": np.zeros((QUERIES, 2), int)} | options))
