"""Products of inputs with weights, and their gradients.

The core computes all products, so no bits depend on threads. Those of a row do not depend on the other rows either; the
gradients of weights are sums over all rows, in a fixed order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _core
from ._backward import computed_in

_NAME = "self_attention_vjp"


class Product:
    """A projection x @ w + b in the type of computation, and its gradients. x is (..., tokens, depth)."""

    def __init__(self, letter: str, x: NDArray[Any], w: NDArray[Any], b: NDArray[Any] | None, num_threads: int) -> None:
        self.letter = letter
        self.num_threads = num_threads
        self.dtype = w.dtype  # dtype of the gradients
        computed = computed_in(w.dtype)
        self.shape = x.shape
        self.rows = rows_of(x, computed)
        self.w = w.astype(computed, copy=False)
        self.b = b

    def forward(self) -> NDArray[Any]:
        """Return the result, (..., tokens, columns)."""
        b = None if self.b is None else self.b.astype(self.w.dtype, copy=False)
        return self._multiply(self.rows, self.w, b).reshape(*self.shape[:-1], self.w.shape[1])

    def of_weights(self, grad: NDArray[Any], names: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Return the gradients of w and b, if wanted; grad is the gradient of the result, (rows, columns)."""
        found = {}
        with np.errstate(all="ignore"):
            if f"w_{self.letter}" in names:
                product = self._of_matrix(self.rows, grad)
                if not np.isfinite(product).all():  # rows with gradient 0, such as padding, count as 0
                    product = self._of_matrix(np.where(grad.any(axis=1, keepdims=True), self.rows, 0), grad)
                found[f"w_{self.letter}"] = rounded(product, self.dtype)
            if f"b_{self.letter}" in names:
                found[f"b_{self.letter}"] = rounded(grad.sum(axis=0, dtype=np.float64), self.dtype)
        return found

    def of_input(self, grad: NDArray[Any]) -> NDArray[Any]:
        """Return the gradient of x, (rows, depth), in the type of computation."""
        # The core packs a matrix faster if its rows are contiguous.
        return self._multiply(grad, np.ascontiguousarray(self.w.T), None)

    def _of_matrix(self, rows: NDArray[Any], grad: NDArray[Any]) -> NDArray[Any]:
        if not len(rows):
            return np.zeros(self.w.shape, self.w.dtype)
        return self._multiply(np.ascontiguousarray(rows.T), grad, None)

    def _multiply(self, rows: NDArray[Any], w: NDArray[Any], b: NDArray[Any] | None) -> NDArray[Any]:
        weights = _core.UnpackedLinear(w=w, b=b)
        packed = _core.make_linear(weights, _core.ACTIVATIONS["none"], _core.PRECISIONS["highest"])
        return _core.call_linear(packed, _NAME, rows, None, None, self.num_threads)


def rows_of(x: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return x as C-contiguous (rows, depth) of this dtype."""
    return np.ascontiguousarray(x, dtype).reshape(math.prod(x.shape[:-1]), x.shape[-1])


def rounded(x: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return x in a dtype whose range may be smaller."""
    with np.errstate(all="ignore"):
        return x.astype(dtype, copy=False)
