"""Rotary position embedding of queries and keys."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _core
from ._arguments import LAYOUTS, as_array, choice, flag, out_array
from ._errors import refusal
from ._keywords import hinted
from ._rope import PLAIN, RoPE, positions_for
from ._typing import Array, Layout


@hinted
def apply_rope(
    x: ArrayLike,
    positions: ArrayLike | None = None,
    rope: RoPE = PLAIN,
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
        The position of each token; default 0, 1, 2, ... If the rope has `axes`: (coordinates, S) or
        (coordinates, ..., S); by default, all coordinates are equal. The axis of coordinates may have length 1.
    rope : RoPE
        Which pairs are rotated, and by what angles.
    layout : {"bhsd", "bshd"}
    out : ndarray, optional
        Array for the result; may be x itself.
    inverse : bool, default False
        Rotate by the negative angles. This undoes a rotation, apart from the square of `attention_scaling`. It also
        computes the gradient: given the gradient of the result, it returns the gradient of x.

    Returns
    -------
    ndarray
        In x's shape and dtype. Angles are computed in double precision: accurate to 1e-5 even at position 2**20.

    Raises
    ------
    TypeError, ValueError
        x has an unsupported dtype, `positions` or `out` has another shape, or `rope` rotates more elements than a head
        has.

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
    tokens = tokens_first(array, layout)
    places = None if positions is None else positions_for(function, positions, tokens.shape[:-2], rope)
    if out is None:
        out = np.empty(array.shape, array.dtype)
    else:
        _core.check_out(function, out_array(function, out), array, "x")
    same = out.ctypes.data == array.ctypes.data and out.strides == array.strides
    if not same and np.may_share_memory(out, array):
        tokens = tokens.copy()
    _core.apply_rope(tokens, places, tokens_first(out, layout), description, backwards, 1)
    return out


def tokens_first(x: NDArray[Any], layout: Layout) -> NDArray[Any]:
    """Return x, in either layout, as a view (..., S, H, D)."""
    if x.ndim == 2:
        return x[:, np.newaxis]
    return x.swapaxes(-2, -3) if layout == "bhsd" else x
