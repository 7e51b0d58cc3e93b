"""Products of inputs with weights, and their gradients, computed by NumPy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._backward import computed_in


class Product:
    """A projection x @ w + b in the type of computation, and its gradients. x is (..., tokens, depth)."""

    def __init__(self, letter: str, x: NDArray[Any], w: NDArray[Any], b: NDArray[Any] | None) -> None:
        self.letter = letter
        self.dtype = w.dtype  # dtype of the gradients
        computed = computed_in(w.dtype)
        self.shape = x.shape
        self.rows = rows_of(x, computed)
        self.w = w.astype(computed, copy=False)
        self.b = b

    def forward(self) -> NDArray[Any]:
        """Return the result, (..., tokens, columns)."""
        result = np.empty((*self.shape[:-1], self.w.shape[1]), self.w.dtype)
        rows = result.reshape(len(self.rows), self.w.shape[1])
        with np.errstate(all="ignore"):  # padding may hold anything
            np.matmul(self.rows, self.w, out=rows)
            if self.b is not None:
                rows += self.b.astype(self.w.dtype, copy=False)
        return result

    def of_weights(self, grad: NDArray[Any], names: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Return the gradients of w and b, if wanted; grad is the gradient of the result, (rows, columns)."""
        found = {}
        with np.errstate(all="ignore"):
            if f"w_{self.letter}" in names:
                product = self.rows.T @ grad
                if not np.isfinite(product).all():  # rows with gradient 0, such as padding, count as 0
                    product = np.where(grad.any(axis=1, keepdims=True), self.rows, 0).T @ grad
                found[f"w_{self.letter}"] = rounded(product, self.dtype)
            if f"b_{self.letter}" in names:
                found[f"b_{self.letter}"] = rounded(grad.sum(axis=0, dtype=np.float64), self.dtype)
        return found

    def of_input(self, grad: NDArray[Any]) -> NDArray[Any]:
        """Return the gradient of x, (rows, depth), in the type of computation."""
        with np.errstate(all="ignore"):
            return np.matmul(grad, self.w.T, out=np.empty_like(self.rows))


def rows_of(x: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return x as C-contiguous (rows, depth) of this dtype."""
    return np.ascontiguousarray(x, dtype).reshape(math.prod(x.shape[:-1]), x.shape[-1])


def rounded(x: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return x in a dtype whose range may be smaller."""
    with np.errstate(all="ignore"):
        return x.astype(dtype, copy=False)
