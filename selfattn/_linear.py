"""Linear layers: a matrix product with bias, activation, gate and residual in one call of the core."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _core
from ._arguments import as_array, choice, floats, is_float, out_array, thread_count
from ._errors import refusal
from ._immutable import Immutable
from ._keywords import hinted
from ._norm import computed_in
from ._quantized import QuantizedWeights, checked, dtype_and_shape
from ._typing import Array, Precision

Activation: TypeAlias = Literal["relu", "gelu", "gelu_tanh", "silu"]

_CODES = _core.ACTIVATIONS
_VERSION = 2  # version of the pickle format


@hinted
class Linear(Immutable):
    """A matrix product and the steps after it. The weights are packed once, for this machine's kernels.

    ``y = activation(x w + b) + residual``, or with a gate ``activation(x w_gate + b_gate) · (x w + b) + residual``
    (Shazeer, "GLU variants improve Transformer", 2020).

    Parameters
    ----------
    w : array_like, shape (d_in, d_out)
        Used literally as ``x @ w``. A PyTorch ``Linear`` holds the transpose: pass ``linear.weight.T``. float32,
        float64, float16 or bfloat16 (of ``ml_dtypes``); or 8-bit codes, the result of `quantize`.
    b : array_like, shape (d_out,), optional
        In the dtype of w, or in the type of computation.
    activation : str, optional
        "relu"; "gelu", x times the normal distribution function; "gelu_tanh", its approximation by tanh; or "silu",
        x · sigmoid(x), also called swish.
    w_gate, b_gate : array_like, optional
        Like w and b. The activation is then applied to the gate: "gelu" gives GeGLU, "silu" SwiGLU, None a product of
        two linear maps.
    precision : {"highest", "high", "medium"}
        For 8-bit codes only: how exactly each row of x takes part. "highest": in float32. "high" and "medium": rounded
        to integers of 16 or 8 bits times one float32 factor, so that integers are multiplied (Dettmers et al.,
        "LLM.int8()", 2022: the factor of a row). Then a result is off by at most ``max|x| / 65278`` or ``max|x| / 254``
        times the sum of abs(w) over a column, in addition to the error of `quantize`, and a row that holds NaN or
        infinity becomes NaN. Instruction sets without products of bytes compute as with "highest"; so does any other
        if a group of rows of w is not a multiple of 4 long.

    Attributes
    ----------
    d_in, d_out : int
    dtype : numpy.dtype
        The dtype of w.
    activation : str or None
    precision : str
    isa : str
        The instruction set that the weights are packed for: the one active when the layer was created.

    Raises
    ------
    TypeError, ValueError
        Weights or vectors of an unsupported dtype or of shapes that do not fit together, an unknown activation or
        precision, or a precision other than "highest" for weights that are not codes.

    Notes
    -----
    A layer is immutable and may be called from many threads at once. The bits of a row of y depend neither on the
    other rows, nor on their number, nor on the number of threads.

    Examples
    --------
    >>> import numpy as np
    >>> import selfattn as sa
    >>> linear = sa.Linear(np.array([[1.0, 0.0], [0.0, -1.0]]), np.array([1.0, 1.0]), activation="relu")
    >>> linear(np.array([[1.0, 2.0], [3.0, 0.5]]))
    array([[2. , 0. ],
           [4. , 0.5]])
    """

    __slots__ = ("_core", "_gated", "_groups", "activation", "d_in", "d_out", "dtype", "isa", "precision")

    _core: _core.Linear
    _gated: bool
    _groups: tuple[int, ...]
    activation: Activation | None
    d_in: int
    d_out: int
    dtype: np.dtype[Any]
    isa: str
    precision: Precision

    def __init__(
        self,
        w: ArrayLike | QuantizedWeights,
        b: ArrayLike | None = None,
        *,
        activation: Activation | None = None,
        w_gate: ArrayLike | QuantizedWeights | None = None,
        b_gate: ArrayLike | None = None,
        precision: Precision = "highest",
    ) -> None:
        self._build("Linear", ("w", "b", "w_gate", "b_gate"), (w, b, w_gate, b_gate), activation, precision)

    def _build(
        self, function: str, names: tuple[str, ...], values: tuple[Any, ...], activation: Any, precision: Any
    ) -> None:
        w = matrix(function, names[0], values[0])
        dtype, shape = dtype_and_shape(w)
        b = _bias(function, names[1], values[1], names[0], w)
        gate = None if values[2] is None else matrix(function, names[2], values[2])
        if gate is not None:
            gate_dtype, gate_shape = dtype_and_shape(gate)
            if gate_dtype != dtype:
                raise refusal(TypeError, function, names[2], f" has dtype {gate_dtype} but {names[0]} has {dtype}")
            if gate_shape != shape:
                raise refusal(ValueError, function, names[2], f" has shape {gate_shape} but {names[0]} has {shape}")
        elif values[3] is not None:
            raise refusal(ValueError, function, names[3], f" is given without {names[2]}")
        gate_bias = None if gate is None else _bias(function, names[3], values[3], names[2], gate)
        if activation is not None:
            choice(function, "activation", activation, tuple(name for name in _CODES if name != "none"))
        code = _CODES["none" if activation is None else activation]
        (codes, scales), (gate_codes, gate_scales) = _parts(w), _parts(gate)
        weights = _core.UnpackedLinear(
            w=codes, scales=scales, b=b, w_gate=gate_codes, gate_scales=gate_scales, b_gate=gate_bias
        )
        choice(function, "precision", precision, tuple(_core.PRECISIONS))
        if precision != "highest" and scales is None:
            raise refusal(ValueError, function, "precision", f" is {precision!r}, but {names[0]} does not hold codes")
        core = _core.make_linear(weights, code, _core.PRECISIONS[precision])
        self._set(
            {
                "_core": core,
                "_groups": tuple(len(x) for x in (scales, gate_scales) if x is not None),
                "_gated": gate is not None,
                "activation": activation,
                "d_in": shape[0],
                "d_out": shape[1],
                "dtype": dtype,
                "isa": _core.linear_isa(core),
                "precision": precision,
            }
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the unpacked weights: unpickling packs them for the machine it runs on."""
        shape = (self.d_in, self.d_out)
        scales, gate_scales = (*(np.empty((n, self.d_out), np.float32) for n in self._groups), None, None)[:2]
        to = _core.UnpackedLinear(
            w=np.empty(shape, self.dtype),
            scales=scales,
            w_gate=np.empty(shape, self.dtype) if self._gated else None,
            gate_scales=gate_scales,
        )
        _core.unpack_linear(self._core, to)
        w, w_gate = _joined(to.w, to.scales), _joined(to.w_gate, to.gate_scales)
        return _load, (_VERSION, w, to.b, w_gate, to.b_gate, self.activation, self.precision)

    def __repr__(self) -> str:
        gate = ", gated" if self._gated else ""
        precision = f", precision={self.precision!r}" if self._groups else ""
        return (
            f"Linear(d_in={self.d_in}, d_out={self.d_out}, activation={self.activation!r}{gate}, dtype={self.dtype}"
            f"{precision}, isa={self.isa!r})"
        )

    def __call__(
        self,
        x: ArrayLike,
        *,
        residual: ArrayLike | None = None,
        out: Array | None = None,
        num_threads: int | None = None,
    ) -> Array:
        """Apply the layer to x.

        Parameters
        ----------
        x : array_like, shape (..., d_in)
            In the layer's dtype. For 16-bit weights, x may be float32 as well; for 8-bit weights, x is float32 or a
            16-bit type.
        residual : array_like, shape of y and dtype of x, optional
            Added at the end.
        out : ndarray, shape of y and dtype of x, optional
            Array for y. May be `residual` itself.
        num_threads : int, optional

        Returns
        -------
        y : ndarray, shape (..., d_out), dtype of x
        """
        arguments = row_arguments("Linear", x, residual, out, num_threads)
        return _core.call_linear(self._core, *arguments)


def row_arguments(
    function: str, x: Any, residual: Any, out: Any, num_threads: Any
) -> tuple[str, NDArray[Any], NDArray[Any] | None, NDArray[Any] | None, int]:
    """Convert the arguments of a layer's call."""
    x = as_array(function, "x", x)
    if residual is not None:
        residual = as_array(function, "residual", residual)
    if out is not None:
        out = out_array(function, out)
    return function, x, residual, out, thread_count(function, num_threads)


def matrix(function: str, name: str, value: Any) -> NDArray[Any] | QuantizedWeights:
    """Return a checked weight matrix."""
    if isinstance(value, QuantizedWeights):
        return checked(function, name, value)
    array = floats(function, name, value, also=", and for 8 bits the result of quantize")
    if array.ndim != 2 or 0 in array.shape:
        raise refusal(ValueError, function, name, f" has shape {array.shape}, but a matrix is needed")
    return array


def _parts(weights: NDArray[Any] | QuantizedWeights | None) -> tuple[Any, Any]:
    """Return a matrix of numbers or codes, and the scales of codes."""
    return weights if isinstance(weights, QuantizedWeights) else (weights, None)


def _joined(matrix: Any, scales: Any) -> Any:
    """Undo `_parts`."""
    return matrix if scales is None else QuantizedWeights(matrix, scales)


def _bias(function: str, name: str, value: Any, of: str, w: Any) -> NDArray[Any] | None:
    if value is None:
        return None
    array, (dtype, shape) = as_array(function, name, value), dtype_and_shape(w)
    if not is_float(array.dtype) or array.dtype not in (dtype, computed_in(dtype)):
        raise refusal(TypeError, function, name, f" has dtype {array.dtype} but {of} has {dtype}")
    if array.shape != (shape[1],):
        raise refusal(ValueError, function, name, f" has shape {array.shape} but {of} has {shape[1]} columns")
    return array


def _load(version: int, *parts: Any) -> Linear:
    if version not in (1, _VERSION):
        raise ValueError(f"Linear: the pickle has version {version!r}, but 1 and {_VERSION} are known")
    w, b, w_gate, b_gate, activation, *precision = parts  # version 1 has no precision
    return Linear(w, b, activation=activation, w_gate=w_gate, b_gate=b_gate, precision=(*precision, "highest")[0])
