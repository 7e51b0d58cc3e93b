"""The feed-forward half of a Transformer layer in one call of the core."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from . import _core
from ._errors import refusal
from ._immutable import Immutable
from ._keywords import hinted
from ._linear import Activation, Linear, row_arguments
from ._norm import LayerNorm, RMSNorm, norm_or_none
from ._quantized import QuantizedWeights
from ._typing import Array, Precision

_VERSION = 1  # version of the pickle format


@hinted
class FeedForward(Immutable):
    """Two linear layers with an activation or a gate between them, and a norm before or after.

    ``y = post_norm(h w_2 + b_2 + residual)`` with ``h = activation(norm(x) w_1 + b_1)``, or with a gate
    ``h = activation(norm(x) w_gate + b_gate) · (norm(x) w_1 + b_1)`` (Vaswani et al., "Attention is all you need",
    2017; Shazeer, "GLU variants improve Transformer", 2020). Each block of rows passes through all steps before the
    next, so that h stays in the processor's cache.

    Parameters
    ----------
    w_1 : array_like, shape (d_in, d_hidden)
        Used literally as ``x @ w_1``: see `Linear` for this and for the dtypes. All matrices share one dtype.
    w_2 : array_like, shape (d_hidden, d_out)
    b_1, b_2 : array_like, optional
        Biases, one number per column of the matrix.
    activation : str or None
        See `Linear`.
    w_gate, b_gate : array_like, optional
        Like w_1 and b_1.
    norm : LayerNorm or RMSNorm, optional
        The norm of x, before the first product.
    post_norm : LayerNorm or RMSNorm, optional
        The norm of the result, after the residual is added.
    precision : {"highest", "high", "medium"}
        Of both products, for 8-bit codes only: see `Linear`.

    Attributes
    ----------
    d_in, d_hidden, d_out : int
    dtype : numpy.dtype
        The dtype of the weights.
    isa : str
        The instruction set that the weights are packed for: the one active when the layer was created.

    Raises
    ------
    TypeError, ValueError
        Weights or vectors of an unsupported dtype or of shapes that do not fit together, or an unknown activation.

    Notes
    -----
    A layer is immutable and may be called from many threads at once. The bits of a row of y depend neither on the
    other rows, nor on their number, nor on the number of threads. With bfloat16 weights and inputs, units that multiply
    bfloat16 round h to bfloat16.

    Examples
    --------
    >>> import numpy as np
    >>> import selfattn as sa
    >>> rng = np.random.default_rng(0)
    >>> w_1, w_2 = rng.standard_normal((8, 32), np.float32), rng.standard_normal((32, 8), np.float32)
    >>> ff = sa.FeedForward(w_1, w_2, activation="gelu", norm=sa.LayerNorm(np.ones(8, np.float32)))
    >>> x = rng.standard_normal((2, 5, 8), np.float32)
    >>> ff(x, residual=x).shape
    (2, 5, 8)
    """

    __slots__ = ("_core", "_first", "_norms", "_second", "d_hidden", "d_in", "d_out", "dtype", "isa")

    _core: _core.FeedForwardWeights
    _first: Linear
    _second: Linear
    _norms: tuple[LayerNorm | RMSNorm | None, LayerNorm | RMSNorm | None]
    d_hidden: int
    d_in: int
    d_out: int
    dtype: np.dtype[Any]
    isa: str

    def __init__(
        self,
        w_1: ArrayLike | QuantizedWeights,
        w_2: ArrayLike | QuantizedWeights,
        b_1: ArrayLike | None = None,
        b_2: ArrayLike | None = None,
        *,
        activation: Activation | None = "gelu",
        w_gate: ArrayLike | QuantizedWeights | None = None,
        b_gate: ArrayLike | None = None,
        norm: LayerNorm | RMSNorm | None = None,
        post_norm: LayerNorm | RMSNorm | None = None,
        precision: Precision = "highest",
    ) -> None:
        function = "FeedForward"
        first, second = Linear.__new__(Linear), Linear.__new__(Linear)
        first._build(function, ("w_1", "b_1", "w_gate", "b_gate"), (w_1, b_1, w_gate, b_gate), activation, precision)
        second._build(function, ("w_2", "b_2", "", ""), (w_2, b_2, None, None), None, precision)
        if second.dtype != first.dtype:
            raise refusal(TypeError, function, "w_2", f" has dtype {second.dtype} but w_1 has {first.dtype}")
        if second.d_in != first.d_out:
            raise refusal(ValueError, function, "w_2", f" has {second.d_in} rows but w_1 has {first.d_out} columns")
        self._join(first, second, norm, post_norm)

    def _join(self, first: Linear, second: Linear, norm: Any, post_norm: Any) -> None:
        function = "FeedForward"
        weights = _core.FeedForwardWeights(
            first=first._core,
            second=second._core,
            norm=norm_or_none(function, "norm", norm, first.d_in, first.dtype),
            post_norm=norm_or_none(function, "post_norm", post_norm, second.d_out, first.dtype),
        )
        self._set(
            {
                "_core": weights,
                "_first": first,
                "_second": second,
                "_norms": (norm, post_norm),
                "d_in": first.d_in,
                "d_hidden": first.d_out,
                "d_out": second.d_out,
                "dtype": first.dtype,
                "isa": first.isa,
            }
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return _load, (_VERSION, self._first, self._second, *self._norms)

    def __repr__(self) -> str:
        return (
            f"FeedForward(d_in={self.d_in}, d_hidden={self.d_hidden}, d_out={self.d_out}, "
            f"activation={self._first.activation!r}, dtype={self.dtype}, isa={self.isa!r})"
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
            In a dtype that `Linear` takes for these weights.
        residual : array_like, shape of y and dtype of x, optional
            Added at the end; often x itself.
        out : ndarray, shape of y and dtype of x, optional
            Array for y. May be x or `residual` itself.
        num_threads : int, optional

        Returns
        -------
        y : ndarray, shape (..., d_out), dtype of x
        """
        arguments = row_arguments("FeedForward", x, residual, out, num_threads)
        return _core.call_feed_forward(self._core, *arguments)


def _load(version: int, *parts: Any) -> FeedForward:
    if version != _VERSION:
        raise ValueError(f"FeedForward: the pickle has version {version!r}, but {_VERSION} is known")
    layer = FeedForward.__new__(FeedForward)
    layer._join(*parts)
    return layer
