"""Rotary embedding by any frequencies, with a factor, and by positions with several coordinates."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from layer_definition import rotate

import selfattn as sa

scalar = pytest.mark.one_isa(reason="rotation is scalar code")
ROPES = {
    "frequencies": sa.RoPE(inv_freq=[1.0, 0.25, 0.0, 1e-3]),
    "factor": sa.RoPE(inv_freq=[1.0, 0.3], attention_scaling=1.25, interleaved=True),
    "factor of a base": sa.RoPE(100.0, attention_scaling=0.5),
    "coordinates": sa.RoPE(1e4, axes=[0, 1, 1, 2]),
    "all": sa.RoPE(inv_freq=[1.0, 0.3, 0.1], attention_scaling=1.5, axes=[2, 0, 1], interleaved=True),
}
# Half an ulp of 1; for float64, the error of an angle of 2**20.
ERRORS = {np.float32: 2**-24, np.float64: 2**-31, np.float16: 2**-11, ml_dtypes.bfloat16: 2**-8}


@scalar
@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("dtype", ERRORS, ids=lambda x: x.__name__)
def test_against_long_double(normal: Any, rng: Any, name: str, dtype: Any) -> None:
    rope, x = ROPES[name], normal(2, 3, 20, 8, dtype=dtype)
    several = (3,) if rope.axes else ()
    for shape in (None, (20,), (2, 20), (2, 1)):
        positions = None if shape is None else rng.integers(-(1 << 20), 1 << 20, (*several, *shape))
        wide = (
            np.arange(20)
            if positions is None
            else np.broadcast_to(positions if shape != (20,) else positions[..., None, :], (*several, 2, 20))
        )
        found = sa.apply_rope(x, positions, rope)
        wanted = rotate(x, wide, rope, np.longdouble)
        assert found.dtype == dtype
        assert np.max(abs(found - wanted)) <= ERRORS[dtype] * 2 * np.max(abs(wanted))
        swapped = sa.apply_rope(x.swapaxes(1, 2), positions, rope, layout="bshd")
        assert np.array_equal(swapped.swapaxes(1, 2), found)


@scalar
def test_angles_at_far_positions() -> None:
    frequencies = np.random.default_rng(0).uniform(0, 1, 32)
    x = np.concatenate([np.ones((1, 32)), np.zeros((1, 32))], axis=1)
    for place in (1 << 20, (1 << 20) - 1, -(1 << 20)):
        turned = sa.apply_rope(x, [place], sa.RoPE(inv_freq=frequencies))[0]
        angles = place * frequencies.astype(np.longdouble)
        assert np.max(abs(turned - np.concatenate([np.cos(angles), np.sin(angles)]))) < 1e-9


@scalar
@pytest.mark.parametrize("name", ROPES)
def test_the_inverse_is_the_gradient(normal: Any, rng: Any, name: str) -> None:
    rope, (x, y) = ROPES[name], normal(2, 2, 3, 20, 8, dtype=np.float64)
    positions = rng.integers(-50, 50, (*((3,) if rope.axes else ()), 2, 20))
    forth, back = sa.apply_rope(x, positions, rope), sa.apply_rope(y, positions, rope, inverse=True)
    assert np.isclose(np.vdot(forth, y), np.vdot(x, back), rtol=1e-12)
    turned = slice(None, rope.rotary_dim)
    again = sa.apply_rope(forth, positions, rope, inverse=True)[..., turned]
    assert np.allclose(again, x[..., turned] * rope.attention_scaling**2, rtol=0, atol=1e-12)


@scalar
def test_frequencies_of_a_base_give_the_same_bits(normal: Any) -> None:
    x = normal(3, 40, 16, dtype=np.float64)
    plain = sa.RoPE(500.0, 12)
    given = sa.RoPE(inv_freq=[500.0 ** (-2.0 * i / 12) for i in range(6)])
    assert np.array_equal(sa.apply_rope(x, rope=plain), sa.apply_rope(x, rope=given))
    assert np.array_equal(sa.apply_rope(x, rope=plain), sa.apply_rope(x, rope=replace(given, attention_scaling=1)))


@scalar
def test_equal_coordinates_are_a_position(normal: Any, rng: Any) -> None:
    x, places = normal(2, 3, 10, 8), rng.integers(0, 99, (2, 10))
    rope = sa.RoPE(axes=[1, 0, 2, 1])
    plain = sa.apply_rope(x, places)
    for positions in (places[None], np.stack([places] * 3)):
        assert np.array_equal(sa.apply_rope(x, positions, rope), plain)
    assert np.array_equal(sa.apply_rope(x, None, rope), sa.apply_rope(x))


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_caches_rotate_as_apply_rope(isa: str, normal: Any, rng: Any, name: str, dtype: str) -> None:
    rope, (q, k, v) = ROPES[name], normal(3, 2, 2, 12, 8)
    q, k, v = (x.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype) for x in (q, k, v))
    several = (3,) if rope.axes else ()
    for positions in (None, rng.integers(0, 50, (*several, 12)), rng.integers(0, 50, (*several, 2, 12))):
        here, there = (sa.KVCache(2, 2, 8, 20, dtype=q.dtype) for _ in range(2))
        for start in range(0, 12, 4):
            part = slice(start, start + 4)
            own = None if positions is None else positions[..., part]
            places = own if own is not None else np.arange(12)[(None,) * len(several)][..., part]
            new = [x[:, :, part] for x in (q, k, v)]
            turned = [sa.apply_rope(x, places, rope) for x in new[:2]]
            found = sa.attention_with_kvcache(new[0], here, *new[1:], rope=rope, positions=own)
            assert np.array_equal(found, sa.attention_with_kvcache(turned[0], there, turned[1], new[2]))


def test_forks_rotate_by_coordinates(isa: str, normal: Any, rng: Any) -> None:
    rope, (q, k, v) = ROPES["coordinates"], normal(3, 2, 2, 9, 8)
    steps = []
    for cascade in (False, True):
        pages = sa.PagedKVCache(20, 4, 2, 8)
        prompt = pages.allocate()
        pages.append(prompt, k[0], v[0])
        ids = [prompt, pages.fork(prompt)]
        step = [x[:, :, -1:] for x in (q, k, v)]
        options = {"sequences": ids, "rope": rope, "cascade": cascade}
        steps.append(sa.attention_with_kvcache(step[0], pages, *step[1:], **options))
        steps.append(
            sa.attention_with_kvcache(*(step[0], pages, *step[1:]), positions=[[[9]], [[3]], [[5]]], **options)
        )
    assert np.allclose(steps[0], steps[2], rtol=0, atol=1e-6)
    assert np.allclose(steps[1], steps[3], rtol=0, atol=1e-6)


@pytest.mark.one_isa
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"inv_freq": []}, r"inv_freq has shape \(0,\), but one finite number for each pair is needed"),
        ({"inv_freq": [[1.0]]}, r"inv_freq has shape \(1, 1\)"),
        ({"inv_freq": [1.0, np.inf]}, "inv_freq is not finite"),
        ({"inv_freq": [1, 2]}, "inv_freq has dtype int64"),
        ({"inv_freq": "x"}, "inv_freq "),
        ({"inv_freq": [1.0], "base": 500.0}, "inv_freq is given together with base"),
        ({"inv_freq": [1.0], "rotary_dim": 4}, "inv_freq has 1 numbers but rotary_dim is 4"),
        ({"attention_scaling": 0}, "attention_scaling is 0, but it must be greater than 0"),
        ({"attention_scaling": "x"}, "attention_scaling is 'x'"),
        ({"axes": [0.5]}, "axes has dtype float64"),
        ({"axes": [0, -1]}, r"axes is \[0, -1\], but a coordinate from 0"),
        ({"axes": [[0]]}, "axes is "),
        ({"inv_freqs": [1.0]}, r"unexpected keyword argument 'inv_freqs' \(did you mean 'inv_freq'\?\)"),
    ],
)
def test_bad_descriptions(given: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match="^RoPE: " + message):
        sa.RoPE(**given)


@pytest.mark.one_isa
def test_positions_need_their_coordinates() -> None:
    x, rope = np.zeros((2, 3, 5, 8)), sa.RoPE(axes=[0, 1, 2, 0])
    needed = r"but \(coordinates, ..., S\) is needed, with 3 coordinates for rope"
    for positions in (np.arange(5), np.zeros((2, 5), int), np.zeros((4, 2, 5), int)):
        with pytest.raises(ValueError, match=r"^apply_rope: positions has shape \(.*" + needed):
            sa.apply_rope(x, positions, rope)
    with pytest.raises(ValueError, match=r"positions has shape \(4,\), which does not broadcast to \(2, 5\)"):
        sa.apply_rope(x, np.zeros((3, 4), int), rope)
    with pytest.raises(ValueError, match="rope rotates 4 pairs, but has 3 axes"):
        sa.apply_rope(x, rope=sa.RoPE(axes=[0, 1, 2]))
    with pytest.raises(ValueError, match="positions has shape"):
        sa.attention_with_kvcache(x[..., :1, :], sa.KVCache(2, 3, 8, 9, dtype="float64"), rope=rope, positions=[0])
