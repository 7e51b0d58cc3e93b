"""Layer norm and RMS norm: functions, and descriptions of the norms inside layers."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _core
from ._arguments import as_array, floats, is_float, out_array, real
from ._errors import refusal
from ._immutable import Immutable
from ._keywords import hinted
from ._typing import Array


@hinted
def layer_norm(
    x: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
    residual: ArrayLike | None = None,
    out: Array | None = None,
) -> Array:
    """Normalise each row of x to mean 0 and variance 1, then scale and shift it.

    ``y = (z - mean(z)) / sqrt(var(z) + eps) · weight + bias`` with ``z = x + residual`` and the biased variance
    (Ba, Kiros, Hinton, "Layer normalization", 2016).

    Parameters
    ----------
    x : array_like, shape (..., d)
        float32, float64, float16 or bfloat16; 16-bit numbers are computed in float32.
    weight, bias : array_like, shape (d,), optional
        Any of these dtypes.
    eps : float
        At least 0.
    residual : array_like, shape and dtype of x, optional
        Added to x first.
    out : ndarray, shape and dtype of x, optional
        May be x or `residual` itself.

    Returns
    -------
    y : ndarray, shape and dtype of x

    Raises
    ------
    ValueError, TypeError
        If shapes or dtypes do not fit.

    Examples
    --------
    >>> import numpy as np
    >>> import selfattn as sa
    >>> sa.layer_norm(np.array([[1.0, 2.0, 3.0]]), eps=0.0).round(3)
    array([[-1.225,  0.   ,  1.225]])
    """
    return _call("layer_norm", x, (weight, bias, eps, True), residual, out)


@hinted
def rms_norm(
    x: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    eps: float = 1e-6,
    residual: ArrayLike | None = None,
    out: Array | None = None,
) -> Array:
    """Scale each row of x to a mean square of 1, then by a weight.

    ``y = z / sqrt(mean(z²) + eps) · weight`` with ``z = x + residual`` (Zhang, Sennrich, "Root mean square layer
    normalization", 2019).

    Parameters
    ----------
    x : array_like, shape (..., d)
        float32, float64, float16 or bfloat16; 16-bit numbers are computed in float32.
    weight : array_like, shape (d,), optional
        Any of these dtypes.
    eps : float
        At least 0.
    residual : array_like, shape and dtype of x, optional
        Added to x first.
    out : ndarray, shape and dtype of x, optional
        May be x or `residual` itself.

    Returns
    -------
    y : ndarray, shape and dtype of x

    Raises
    ------
    ValueError, TypeError
        If shapes or dtypes do not fit.

    Examples
    --------
    >>> import numpy as np
    >>> import selfattn as sa
    >>> sa.rms_norm(np.array([3.0, 4.0]), eps=0.0).round(3)
    array([0.849, 1.131])
    """
    return _call("rms_norm", x, (weight, None, eps, False), residual, out)


_Form = tuple[Any, Any, Any, bool]  # weight, bias, eps, and whether the mean is subtracted


def _call(function: str, x: Any, form: _Form, residual: Any, out: Any) -> Array:
    x = as_array(function, "x", x)
    if x.ndim == 0:
        raise refusal(ValueError, function, "x", " has shape (), but rows are needed: (..., d)")
    *vectors, eps, centred = form
    epsilon = _epsilon(function, eps)
    wide = computed_in(x.dtype)
    weight, bias = (
        _vector(function, name, value, x.shape[-1], wide)
        for name, value in zip(("weight", "bias"), vectors, strict=True)
    )
    if residual is not None:
        residual = as_array(function, "residual", residual)
    if out is not None:
        out = out_array(function, out)
    norm = _core.NormForm(weight=weight, bias=bias, eps=epsilon, centred=centred)
    return _core.normalise(norm, function, x, residual, out)


def computed_in(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the type of computation for an accepted dtype."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def _epsilon(function: str, eps: Any) -> float:
    epsilon = real(function, "eps", eps)
    if epsilon < 0:
        raise refusal(ValueError, function, "eps", f" is {eps!r}, but it must be at least 0")
    return epsilon


def _vector(function: str, name: str, value: Any, count: int | None, dtype: np.dtype[Any]) -> NDArray[Any] | None:
    if value is None:
        return None
    array = floats(function, name, value)
    if array.ndim != 1 or (count is not None and len(array) != count):
        needed = "a vector" if count is None else f"({count},)"
        raise refusal(ValueError, function, name, f" has shape {array.shape}, but {needed} is needed")
    return np.ascontiguousarray(array, dtype)


class _Norm(Immutable):
    """A norm inside a layer. Immutable; its vectors are copies."""

    __slots__ = ("bias", "eps", "weight")

    _centred = False
    weight: Array | None
    bias: Array | None
    eps: float

    def _build(self, weight: Any, bias: Any, eps: Any) -> None:
        function, found = type(self).__name__, {}
        for name, value in (("weight", weight), ("bias", bias)):
            if value is not None:
                dtype = as_array(function, name, value).dtype
                value = _vector(function, name, value, None, dtype if is_float(dtype) else np.dtype(float))
                value = np.array(value)
                value.flags.writeable = False
            found[name] = value
        self._set({**found, "eps": _epsilon(function, eps)})
        if self.weight is not None and self.bias is not None and self.weight.shape != self.bias.shape:
            text = f" has shape {self.bias.shape} but weight has {self.weight.shape}"
            raise refusal(ValueError, function, "bias", text)

    def for_core(self, function: str, name: str, count: int, dtype: np.dtype[Any]) -> _core.Norm:
        """Return the norm for rows of `count` numbers, computed in `dtype`."""
        for part in (self.weight, self.bias):
            if part is not None and len(part) != count:
                text = f" is of {len(part)} numbers, but rows of {count} are to be normalised"
                raise refusal(ValueError, function, name, text)
        weight, bias = (
            None if part is None else np.ascontiguousarray(part, dtype) for part in (self.weight, self.bias)
        )
        return _core.make_norm(_core.NormForm(weight=weight, bias=bias, eps=self.eps, centred=self._centred))


@hinted
class LayerNorm(_Norm):
    """The description of a layer norm inside a layer: see `layer_norm` for its formula and parameters.

    Parameters
    ----------
    weight, bias : array_like, shape (d,), optional
    eps : float

    Raises
    ------
    TypeError, ValueError
        Vectors of an unsupported dtype or of different lengths, or a negative eps.

    Examples
    --------
    >>> import numpy as np
    >>> import selfattn as sa
    >>> norm = sa.LayerNorm(np.ones(4), np.zeros(4))
    >>> norm(np.array([1.0, 1.0, 3.0, 3.0])).round(2)
    array([-1., -1.,  1.,  1.])
    """

    __slots__ = ()

    _centred = True

    def __init__(self, weight: ArrayLike | None = None, bias: ArrayLike | None = None, *, eps: float = 1e-5) -> None:
        self._build(weight, bias, eps)

    def __call__(self, x: ArrayLike, *, residual: ArrayLike | None = None, out: Array | None = None) -> Array:
        """Return `layer_norm` of x."""
        return layer_norm(x, self.weight, self.bias, eps=self.eps, residual=residual, out=out)

    def __reduce__(self) -> tuple[Any, ...]:
        return _load, (True, self.weight, self.bias, self.eps)


@hinted
class RMSNorm(_Norm):
    """The description of an RMS norm inside a layer: see `rms_norm` for its formula and parameters.

    Parameters
    ----------
    weight : array_like, shape (d,), optional
    eps : float

    Raises
    ------
    TypeError, ValueError
        A vector of an unsupported dtype, or a negative eps.

    Examples
    --------
    >>> import numpy as np
    >>> import selfattn as sa
    >>> sa.RMSNorm(np.ones(2), eps=0.0)(np.array([3.0, 4.0])).round(3)
    array([0.849, 1.131])
    """

    __slots__ = ()

    def __init__(self, weight: ArrayLike | None = None, *, eps: float = 1e-6) -> None:
        self._build(weight, None, eps)

    def __call__(self, x: ArrayLike, *, residual: ArrayLike | None = None, out: Array | None = None) -> Array:
        """Return `rms_norm` of x."""
        return rms_norm(x, self.weight, eps=self.eps, residual=residual, out=out)

    def __reduce__(self) -> tuple[Any, ...]:
        return _load, (False, self.weight, None, self.eps)


def _load(centred: bool, weight: Any, bias: Any, eps: float) -> LayerNorm | RMSNorm:
    return LayerNorm(weight, bias, eps=eps) if centred else RMSNorm(weight, eps=eps)


def norm_or_none(
    function: str, name: str, value: LayerNorm | RMSNorm | None, count: int, dtype: np.dtype[Any]
) -> _core.Norm | None:
    """Return a layer's norm in the core's form; `dtype` is the layer's dtype."""
    if value is None:
        return None
    if not isinstance(value, (LayerNorm, RMSNorm)):
        raise refusal(
            TypeError, function, name, f" is a {type(value).__name__}, but a LayerNorm or an RMSNorm is needed"
        )
    return value.for_core(function, name, count, computed_in(dtype))
