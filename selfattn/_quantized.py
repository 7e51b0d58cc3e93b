"""Weights of layers as 8-bit codes with scales."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ._arguments import as_array, floats, whole_number
from ._elements import ELEMENT_TYPES
from ._errors import refusal
from ._keywords import hinted
from ._typing import Array

_QUANTIZED = ELEMENT_TYPES["int8"]
"""The type of the codes that `quantize` makes."""
_CODES = [name for name, stored in ELEMENT_TYPES.items() if stored.codes and stored.elements == 1]
"""The types of codes that layers take: kernels read them one by one."""


class QuantizedWeights(NamedTuple):
    """A weight matrix as codes and scales, for `Linear` and `FeedForward`: see `quantize`.

    Attributes
    ----------
    codes : ndarray of int8, shape (d_in, d_out)
    scales : ndarray of float32, shape (groups, d_out)
        One for each group of d_in / groups rows and each column.

    Examples
    --------
    >>> import numpy as np
    >>> import selfattn as sa
    >>> codes = np.array([[100, -50]], dtype=np.int8)
    >>> weights = sa.QuantizedWeights(codes, np.array([[0.01, 0.02]], dtype=np.float32))
    >>> sa.Linear(weights)(np.ones((1, 1), dtype=np.float32)).round(3)
    array([[ 1., -1.]], dtype=float32)
    """

    codes: Array
    scales: Array


@hinted
def quantize(w: ArrayLike, *, groups: int = 1) -> QuantizedWeights:
    """Round a weight matrix to 8-bit codes, with one scale for each column, or for each group of rows of a column.

    ``scale = max|w| / 127`` over the group's rows of a column, and ``code = round(w / scale)``: each weight is off by
    at most scale / 2, and a result of a layer by at most the sum of abs(x) · scale / 2.

    Parameters
    ----------
    w : array_like, shape (d_in, d_out)
        Finite numbers.
    groups : int
        A divisor of d_in. More groups are more accurate.

    Returns
    -------
    weights : QuantizedWeights

    Raises
    ------
    ValueError, TypeError
        If w is not a matrix of finite numbers, or `groups` does not divide its number of rows.

    Examples
    --------
    >>> import numpy as np
    >>> import selfattn as sa
    >>> weights = sa.quantize(np.array([[1.27, 0.0], [-0.5, 0.0]]))
    >>> weights.codes
    array([[127,   0],
           [-50,   0]], dtype=int8)
    >>> sa.Linear(weights)(np.ones((1, 2), np.float32)).round(3)
    array([[0.77, 0.  ]], dtype=float32)
    """
    function = "quantize"
    array = floats(function, "w", w)
    if array.ndim != 2 or 0 in array.shape:
        raise refusal(ValueError, function, "w", f" has shape {array.shape}, but a matrix is needed")
    count = whole_number(function, "groups", groups, 1)
    if len(array) % count:
        raise refusal(ValueError, function, "groups", f" is {count}, which does not divide the {len(array)} rows of w")
    parts = array.astype(np.float64).reshape(count, -1, array.shape[1])
    if not np.isfinite(parts).all():
        raise refusal(ValueError, function, "w", " holds numbers that are not finite")
    scales = (abs(parts).max(axis=1) / _QUANTIZED.codes).astype(np.float32)
    divisors = np.where(scales > 0, scales, 1)[:, None]
    codes = np.clip(np.rint(parts / divisors), -_QUANTIZED.codes, _QUANTIZED.codes).astype(_QUANTIZED.memory)
    return QuantizedWeights(codes.reshape(array.shape), scales)


def checked(function: str, name: str, weights: QuantizedWeights) -> QuantizedWeights:
    """Return codes and scales that fit together, or raise an error."""
    codes, scales = (as_array(function, name, part) for part in weights)
    if codes.dtype.name not in _CODES or scales.dtype != np.float32:
        wanted = " or ".join(_CODES)
        text = f" has codes of {codes.dtype} and scales of {scales.dtype}, but {wanted} and float32 are needed"
        raise refusal(TypeError, function, name, text)
    if codes.ndim != 2 or 0 in codes.shape:
        raise refusal(ValueError, function, name, f" has codes of shape {codes.shape}, but a matrix is needed")
    rows, columns = codes.shape
    if scales.ndim != 2 or scales.shape[1] != columns or not len(scales) or rows % len(scales):
        text = f" has scales of shape {scales.shape}, but (groups, {columns}) are needed, where groups divide {rows}"
        raise refusal(ValueError, function, name, text)
    return QuantizedWeights(codes, scales)


def dtype_and_shape(weights: Any) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """Return the dtype and the shape of a matrix, quantized or not."""
    matrix = weights.codes if isinstance(weights, QuantizedWeights) else weights
    return matrix.dtype, matrix.shape
