"""Rotary position embedding."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from layer_definition import rotate

import selfattn as sa

pytestmark = pytest.mark.one_isa(reason="rotation is scalar code")


def exact(x: Any, positions: Any, rope: sa.RoPE) -> Any:
    return rotate(x, positions, rope, np.longdouble)


ROPES = [sa.RoPE(), sa.RoPE(interleaved=True), sa.RoPE(1e6, 6), sa.RoPE(100.0, 4, True)]


@pytest.mark.parametrize("rope", ROPES, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_against_long_double(normal: Any, rng: Any, rope: sa.RoPE, dtype: Any) -> None:
    x = normal(2, 3, 20, 8, dtype=dtype)
    for positions in (None, np.arange(20) * 7, rng.integers(0, 1 << 20, (2, 20)), np.array([[5], [1 << 20]])):
        given = (
            np.arange(20)
            if positions is None
            else np.broadcast_to(positions, (2, 20))
            if np.ndim(positions) > 1
            else positions
        )
        wanted = exact(x, given, rope)
        found = sa.apply_rope(x, positions, rope)
        assert found.dtype == dtype
        assert np.max(abs(found - wanted)) < (1e-6 if dtype == np.float32 else 1e-9)
        swapped = sa.apply_rope(x.swapaxes(1, 2), positions, rope, layout="bshd")
        assert np.array_equal(swapped.swapaxes(1, 2), found)


def test_far_positions_keep_their_accuracy(normal: Any) -> None:
    x, positions = normal(1, 4, 64), np.array([1 << 20, (1 << 20) + 1, 0, -(1 << 20)])
    assert np.max(abs(sa.apply_rope(x, positions) - exact(x, positions, sa.RoPE()))) < 1e-5


def test_scores_depend_on_distance_only(normal: Any) -> None:
    q, k = normal(1, 1, 16, dtype=np.float64), normal(1, 1, 16, dtype=np.float64)
    scores = [np.vdot(sa.apply_rope(q, [i]), sa.apply_rope(k, [i - 5])) for i in (5, 100, 4000)]
    assert np.ptp(scores) < 1e-12


# Half an ulp of numbers from 1 to 2.
HALF_ULPS = {"float32": 2.0**-24, "float64": 2.0**-53, "float16": 2.0**-11, "bfloat16": 2.0**-8}


@pytest.mark.parametrize("rope", ROPES, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16], ids=lambda x: x.__name__)
def test_the_inverse_is_the_gradient(normal: Any, rng: Any, rope: sa.RoPE, dtype: Any) -> None:
    x, y = normal(2, 2, 3, 20, 8, dtype=dtype)
    positions = rng.integers(-50, 50, (2, 20))
    for where in (None, positions):
        forth, back = sa.apply_rope(x, where, rope), sa.apply_rope(y, where, rope, inverse=True)
        assert back.dtype == dtype
        wide = [array.astype(np.float64) for array in (forth, y, x, back)]
        # Each element of forth and back is at most a few units large, with an error of half an ulp.
        allowed = 8 * HALF_ULPS[np.dtype(dtype).name] * np.sqrt(x.size)
        assert abs(np.vdot(wide[0], wide[1]) - np.vdot(wide[2], wide[3])) < allowed
        again = sa.apply_rope(forth, where, rope, inverse=True).astype(np.float64)
        assert np.max(abs(again - wide[2])) < 16 * HALF_ULPS[np.dtype(dtype).name]
    assert np.array_equal(back, sa.apply_rope(y, -positions, rope))
    swapped = sa.apply_rope(y.swapaxes(1, 2), positions, rope, layout="bshd", inverse=True)
    assert np.array_equal(swapped.swapaxes(1, 2), back)
    assert np.array_equal(sa.apply_rope(y, positions, rope, inverse=True, out=y), back)


@pytest.mark.parametrize("shape", [(5, 8), (3, 5, 8), (2, 1, 3, 5, 8), (0, 5, 8), (2, 0, 8)])
def test_shapes_and_out(normal: Any, shape: Any) -> None:
    x = normal(*shape)
    wanted = sa.apply_rope(x)
    assert wanted.shape == shape
    out = np.empty_like(x)
    assert sa.apply_rope(x, out=out) is out
    assert np.array_equal(out, wanted)
    strided = np.zeros((*shape[:-1], 16), np.float32)[..., ::2]
    assert np.array_equal(sa.apply_rope(x, out=strided), wanted)
    assert np.array_equal(sa.apply_rope(x[..., ::-1].copy()[..., ::-1]), wanted)
    assert np.array_equal(sa.apply_rope(x, out=x), wanted)
    assert np.array_equal(x, wanted)


def test_out_may_overlap(normal: Any) -> None:
    buffer = normal(6, 8)
    wanted = sa.apply_rope(buffer[:5].copy())
    assert np.array_equal(sa.apply_rope(buffer[:5], out=buffer[1:]), wanted)


@pytest.mark.parametrize(
    ("arguments", "exception", "message"),
    [
        ({"x": np.zeros(8)}, ValueError, r"x has shape \(8,\) but needs 2 dimensions"),
        ({"x": np.zeros((5, 7))}, ValueError, "rope rotates 7 elements, but head_dim is 7"),
        ({"x": np.zeros((5, 8), int)}, TypeError, "x has dtype int64"),
        ({"positions": np.zeros(5)}, TypeError, "positions has dtype float64, but integers are needed"),
        (
            {"positions": np.zeros(4, int)},
            ValueError,
            r"positions has shape \(4,\), which does not broadcast to \(5,\)",
        ),
        ({"rope": True}, TypeError, "rope is True, but a RoPE is needed"),
        ({"rope": sa.RoPE(rotary_dim=10)}, ValueError, "rope rotates 10 elements, but head_dim is 8"),
        ({"layout": "x"}, ValueError, "layout is 'x'"),
        ({"inverse": 1}, TypeError, "inverse is 1, but True or False is needed"),
        ({"out": np.zeros((5, 7))}, ValueError, r"out has shape \(5, 7\) but the result has \(5, 8\)"),
        ({"out": np.zeros((5, 8), np.float32)}, TypeError, "out has dtype float32, but the result is float64"),
        ({"out": np.broadcast_to(np.zeros(8), (5, 8))}, ValueError, "out is read-only"),
        ({"out": "x"}, TypeError, "out is a str"),
    ],
)
def test_errors(arguments: dict[str, Any], exception: type[Exception], message: str) -> None:
    with pytest.raises(exception, match="^apply_rope: " + message):
        sa.apply_rope(**{"x": np.zeros((5, 8)), **arguments})


def test_out_must_not_share_memory_with_itself() -> None:
    shared = np.lib.stride_tricks.as_strided(np.zeros(8), (5, 8), (0, 8), writeable=True)
    with pytest.raises(ValueError, match="apply_rope: out has stride 0"):
        sa.apply_rope(np.zeros((5, 8)), out=shared)


@pytest.mark.parametrize(
    "bad",
    [{"base": "x"}, {"base": None}, {"base": 10**400}, {"rotary_dim": 4.0}, {"rotary_dim": "4"}, {"interleaved": "x"}],
)
def test_descriptions_of_bad_types(bad: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=f"RoPE: {next(iter(bad))} is "):
        sa.RoPE(**bad)


@pytest.mark.parametrize("bad", [{"base": 0.0}, {"base": np.inf}, {"rotary_dim": 3}, {"rotary_dim": 0}])
def test_bad_descriptions(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="RoPE: "):
        sa.RoPE(**bad)


def test_claimed_sizes_are_refused_at_once() -> None:
    wide = np.broadcast_to(np.ones(1, np.float32), (1, 1 << 40))
    with pytest.raises(ValueError, match="apply_rope: rope rotates 1099511627776 elements, but at most 65536 are"):
        sa.apply_rope(wide)
    for name, one in (("inv_freq", np.ones(1)), ("axes", np.ones(1, np.int64))):
        with pytest.raises(ValueError, match=f"RoPE: {name} has 1099511627776 numbers, but at most 32768 are"):
            sa.RoPE(**{name: np.broadcast_to(one, 1 << 40)})
    with pytest.raises(ValueError, match="head_dim is 1099511627776, but it must be in 2"):
        sa.RoPE.from_config({"rope_theta": 10000.0, "head_dim": 1 << 40})
