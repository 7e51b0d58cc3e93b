"""Rotary position embedding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _core
from ._arguments import LAYOUTS, as_array, choice, flag, integers, out_array, real
from ._errors import refusal
from ._keywords import hinted
from ._typing import Array, Layout


@hinted
@dataclass(frozen=True)
class RoPE:
    """A description of rotary position embedding (Su et al., "RoFormer", 2021).

    Parameters
    ----------
    base : float, default 10000.0
        Pair i is rotated by ``position · base^(−2 i / rotary_dim)`` radians.
    rotary_dim : int, optional
        Even; only the first rotary_dim elements of a head are rotated. Default: all of them.
    interleaved : bool, default False
        False: element i pairs with ``i + rotary_dim / 2`` (Llama, GPT-NeoX). True: adjacent elements pair (GPT-J).
    """

    base: float = 10000.0
    rotary_dim: int | None = None
    interleaved: bool = False

    def __post_init__(self) -> None:
        if real("RoPE", "base", self.base) <= 0:
            raise refusal(ValueError, "RoPE", "base", f" is {self.base!r}, but it must be finite and greater than 0")
        flag("RoPE", "interleaved", self.interleaved)
        if self.rotary_dim is not None and (
            isinstance(self.rotary_dim, bool) or not isinstance(self.rotary_dim, (int, np.integer))
        ):
            raise refusal(TypeError, "RoPE", "rotary_dim", f" is {self.rotary_dim!r}, but an integer is needed")
        if self.rotary_dim is not None and (self.rotary_dim < 2 or self.rotary_dim % 2):
            raise refusal(
                ValueError, "RoPE", "rotary_dim", f" is {self.rotary_dim!r}, but it must be even and at least 2"
            )

    def for_core(self, function: str, head_dim: int) -> _core.Rope:
        """Return the rotation of heads of this size."""
        rotary_dim = head_dim if self.rotary_dim is None else int(self.rotary_dim)
        if rotary_dim > head_dim or rotary_dim % 2:
            raise refusal(
                ValueError,
                function,
                "rope",
                f" rotates {rotary_dim} elements, but head_dim is {head_dim}: rotary_dim must be even and at "
                "most head_dim",
            )
        return _core.Rope(base=float(self.base), rotary_dim=rotary_dim, interleaved=bool(self.interleaved))


_PLAIN = RoPE()


def rope_or_none(function: str, rope: Any) -> RoPE | None:
    """Return the `RoPE` that a `rope=` argument means, or None."""
    if rope is None or rope is False:
        return None
    if rope is True:
        return _PLAIN
    if not isinstance(rope, RoPE):
        raise refusal(TypeError, function, "rope", f" is {rope!r}, but a RoPE, True or None is needed")
    return rope


def positions_for(function: str, positions: Any, shape: tuple[int, ...]) -> NDArray[np.int64]:
    """Return positions, checked to broadcast to `shape` = (..., S)."""
    array = integers(function, "positions", positions)
    try:
        fits = np.broadcast_shapes(array.shape, shape) == shape and array.ndim > 0
    except ValueError:
        fits = False
    if not fits:
        raise refusal(
            ValueError, function, "positions", f" has shape {array.shape}, which does not broadcast to {shape}"
        )
    return array


@hinted
def apply_rope(
    x: ArrayLike,
    positions: ArrayLike | None = None,
    rope: RoPE = RoPE(),
    *,
    layout: Layout = "bhsd",
    out: Array | None = None,
    inverse: bool = False,
) -> NDArray[Any]:
    """Rotate pairs of elements of each head by angles proportional to the token's position.

    Parameters
    ----------
    x : array_like, shape (..., H, S, D)
        Queries or keys: float32, float64, float16 or bfloat16; (..., S, H, D) in layout "bshd"; (S, D) is one
        head.
    positions : integer array, shape (S,) or (..., S), optional
        The position of each token; default 0, 1, 2, ...
    rope : RoPE
        Which pairs are rotated, and by what angles.
    layout : {"bhsd", "bshd"}
    out : ndarray, optional
        Array for the result; may be x itself.
    inverse : bool, default False
        Rotate by the negative angles. This undoes a rotation. It also computes the gradient: given the gradient of the
        result, it returns the gradient of x.

    Returns
    -------
    ndarray
        In x's shape and dtype. Angles are computed in double precision: accurate to 1e-5 even at position 2**20.

    Examples
    --------
    >>> import numpy as np
    >>> import selfattn as sa
    >>> x = np.ones((2, 3, 4), dtype=np.float32)
    >>> bool(np.array_equal(sa.apply_rope(x)[:, 0], x[:, 0]))
    True
    >>> bool(np.allclose(sa.apply_rope(sa.apply_rope(x), inverse=True), x, rtol=0, atol=1e-6))
    True
    """
    function = "apply_rope"
    array = as_array(function, "x", x)
    choice(function, "layout", layout, LAYOUTS)
    backwards = flag(function, "inverse", inverse)
    if not isinstance(rope, RoPE):
        raise refusal(TypeError, function, "rope", f" is {rope!r}, but a RoPE is needed")
    if array.ndim < 2:
        raise refusal(
            ValueError, function, "x", f" has shape {array.shape} but needs 2 dimensions or more: (..., S, D)"
        )
    description = rope.for_core(function, array.shape[-1])
    tokens = _tokens_first(array, layout)
    places = None if positions is None else positions_for(function, positions, tokens.shape[:-2])
    if out is None:
        out = np.empty(array.shape, array.dtype)
    else:
        _core.check_out(function, out_array(function, out), array, "x")
    same = out.ctypes.data == array.ctypes.data and out.strides == array.strides
    if not same and np.may_share_memory(out, array):
        tokens = tokens.copy()
    _core.apply_rope(tokens, places, _tokens_first(out, layout), description, backwards)
    return out


def _tokens_first(x: NDArray[Any], layout: Layout) -> NDArray[Any]:
    """Return x, in either layout, as a view (..., S, H, D)."""
    if x.ndim == 2:
        return x[:, np.newaxis]
    return x.swapaxes(-2, -3) if layout == "bhsd" else x
