"""`attention(rope=)`, compared with rotating q and k first."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import selfattn as sa
from selfattn import masks

BFLOAT = np.dtype(ml_dtypes.bfloat16)
HALF = sa.RoPE(rotary_dim=8, interleaved=True, attention_scaling=1.25)
GRID = sa.RoPE(inv_freq=[1.0, 0.3, 0.7, 0.1], axes=[0, 1, 0, 1])


def same(found: Any, expected: Any) -> bool:
    return all(np.array_equal(a, b, equal_nan=True) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float16), BFLOAT], ids=str)
@pytest.mark.parametrize("rope", [True, HALF, sa.RoPE(base=500.0)], ids=["default", "partial", "base"])
def test_it_is_rotating_first(isa: str, normal: Any, dtype: Any, rope: Any) -> None:
    q, k, v = (normal(2, *shape, dtype=dtype) for shape in ((4, 33, 16), (2, 41, 16), (2, 41, 16)))
    own = sa.RoPE() if rope is True else rope
    for options in ({}, {"causal": True}, {"causal": True, "q_offset": 3}, {"q_offset": -5}):
        places = np.arange(33) + options.get("q_offset", 8)
        expected = sa.attention(sa.apply_rope(q, places, own), sa.apply_rope(k, rope=own), v, **options)
        assert np.array_equal(sa.attention(q, k, v, rope=rope, **options), expected)
        before = q.copy(), k.copy()
        swapped = [x.swapaxes(1, 2) for x in (q, k, v)]
        found = sa.attention(*swapped, rope=rope, layout="bshd", num_threads=2, **options)
        assert np.array_equal(found.swapaxes(1, 2), expected)
        assert same((q, k), before)


@pytest.mark.one_isa
def test_positions_of_padded_entries(normal: Any) -> None:
    q, k, v = normal(3, 4, 9, 16), normal(3, 2, 9, 16), normal(3, 2, 9, 8)
    lens = {"q_lens": np.array([4, 9, 0]), "kv_lens": np.array([7, 9, 3])}
    places = np.arange(9) + (lens["kv_lens"] - lens["q_lens"])[:, None]
    expected = sa.attention(sa.apply_rope(q, places), sa.apply_rope(k), v, causal=True, return_lse=True, **lens)
    assert same(sa.attention(q, k, v, rope=True, causal=True, return_lse=True, **lens), expected)
    shared = q[:1]  # one entry of queries, but three offsets
    expected = sa.attention(sa.apply_rope(np.repeat(shared, 3, 0), places), sa.apply_rope(k), v, **lens)
    assert np.array_equal(sa.attention(shared, k, v, rope=True, **lens), expected)
    with pytest.raises(ValueError, match="attention: kv_lens"):
        sa.attention(q, k, v, rope=True, kv_lens=lens["kv_lens"])


@pytest.mark.one_isa
def test_given_positions(normal: Any) -> None:
    q, k, v = normal(2, 4, 5, 8), normal(2, 2, 12, 8), normal(2, 2, 12, 8)
    for shape in ((12,), (2, 12), (1, 12)):
        keys = np.random.default_rng(1).integers(0, 1000, shape)
        expected = sa.attention(sa.apply_rope(q, keys[..., 7:]), sa.apply_rope(k, keys), v, causal=True)
        assert np.array_equal(sa.attention(q, k, v, causal=True, rope=True, positions=keys), expected)
    for shape in ((2, 12), (2, 2, 12), (1, 2, 12)):
        keys = np.random.default_rng(2).integers(0, 50, shape)
        expected = sa.attention(sa.apply_rope(q, keys[..., 7:], GRID), sa.apply_rope(k, keys, GRID), v)
        assert np.array_equal(sa.attention(q, k, v, rope=GRID, positions=keys), expected)
    expected = sa.attention(sa.apply_rope(q, np.arange(7, 12), sa.RoPE(inv_freq=GRID.inv_freq)), sa.apply_rope(k), v)
    flat = sa.attention(q[0, 0], k[0, 0], v[0, 0], rope=True, positions=np.arange(12))
    assert np.array_equal(flat, sa.attention(q[0, 0], k[0, 0], v[0, 0], rope=True))
    own = sa.attention(q[:1], np.repeat(k[:1], 2, 0), v, rope=True, positions=keys[0])
    assert own.shape == (2, 4, 5, 8)


@pytest.mark.one_isa
def test_coordinates_of_entries_with_different_offsets(normal: Any) -> None:
    for batch in (2, 3):  # as many as coordinates, and more
        q, k, v = normal(batch, 1, 6, 8), normal(batch, 1, 6, 8), normal(batch, 1, 6, 8)
        keys = np.stack([np.arange(6), 10 * np.arange(6)])
        lens = np.arange(6, 6 - batch, -1)
        index = np.clip(np.arange(6) + 6 - lens[:, None], 0, 5)
        expected = sa.attention(sa.apply_rope(q, keys[:, index], GRID), sa.apply_rope(k, keys, GRID), v, q_lens=lens)
        assert np.array_equal(sa.attention(q, k, v, rope=GRID, positions=keys, q_lens=lens), expected)
        assert np.array_equal(sa.attention(q, k, v, rope=GRID, positions=keys[:, None], q_lens=lens), expected)


@pytest.mark.one_isa
def test_with_other_options(normal: Any) -> None:
    q, k, v = normal(1, 4, 40, 16), normal(1, 2, 40, 16), normal(1, 2, 40, 16)
    turned = sa.apply_rope(q), sa.apply_rope(k), v
    mask = masks.causal() & ~masks.window(3, 0)
    chosen = np.random.default_rng(3).integers(-1, 40, (1, 1, 40, 7))
    for options in ({"mask": mask}, {"key_indices": chosen}, {"return_key_mass": True}, {"dropout": 0.5, "seed": 1}):
        expected, found = (sa.attention(*arrays, **options, **own) for arrays, own in (
            (turned, {}), ((q, k, v), {"rope": True}),
        ))  # fmt: skip
        assert same(found, expected) if isinstance(found, tuple) else np.array_equal(found, expected)
    out = q.copy()
    assert sa.attention(out, k, v, rope=True, out=out) is out
    assert np.array_equal(out, sa.attention(*turned))


@pytest.mark.one_isa
def test_without_queries_or_keys() -> None:
    for queries, keys, batch in ((0, 3, 2), (3, 0, 2), (3, 3, 0)):
        q, k = np.zeros((batch, 2, queries, 8), np.float32), np.zeros((batch, 2, keys, 8), np.float32)
        assert np.array_equal(sa.attention(q, k, k, rope=True), np.zeros_like(q))
    for queries, keys, lens in ((3, 0, None), (3, 0, [0]), (0, 3, None)):
        q, k = (np.zeros((1, 2, n, 8), np.float32) for n in (queries, keys))
        assert not sa.attention(q, k, k, rope=True, positions=np.arange(keys), q_lens=lens).any()
        with pytest.raises(ValueError, match=r"positions has shape \(7,\)"):
            sa.attention(q, k, k, rope=True, positions=np.arange(7))


@pytest.mark.one_isa
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"positions": [0, 1, 2]}, ValueError, "attention: positions is given without rope"),
        ({"rope": False, "positions": [0, 1, 2]}, ValueError, "positions is given without rope"),
        ({"rope": 3}, TypeError, "attention: rope is 3, but a RoPE, True or None is needed"),
        ({"rope": sa.RoPE(rotary_dim=10)}, ValueError, "attention: rope rotates 10 elements, but head_dim is 8"),
        ({"rope": True, "positions": [0, 1]}, ValueError, r"positions has shape \(2,\), .* broadcast to \(1, 3\)"),
        ({"rope": True, "positions": [0.5, 1, 2]}, TypeError, "attention: positions has dtype float64"),
        ({"rope": GRID, "positions": [0, 1, 2]}, ValueError, "positions has shape .* coordinates"),
        (
            {"rope": True, "positions": [4, 5, 6], "q_offset": 1},
            ValueError,
            "attention: positions has the positions of keys 0 to 2, but query 2 is aligned with key 3",
        ),
        ({"rope": True, "mask": np.ones((4, 4), bool)}, ValueError, "attention: mask has shape"),
    ],
)
def test_refusals(options: Any, error: Any, message: str) -> None:
    x = np.zeros((1, 2, 3, 8), np.float32)
    with pytest.raises(error, match=message):
        sa.attention(x, x, x, **options)
