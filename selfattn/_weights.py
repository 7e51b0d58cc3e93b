"""Checks of a layer's matrices and vectors, and the head sizes that follow from them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ._arguments import as_array, floats, whole_number
from ._errors import refusal


class Weights(NamedTuple):
    """Matrices of one dtype whose shapes fit together."""

    q: NDArray[Any]
    k: NDArray[Any]
    v: NDArray[Any]
    o: NDArray[Any] | None
    head_dim: int
    value_dim: int

    @classmethod
    def check(cls, function: str, weights: tuple[Any, Any, Any, Any], num_heads: int, num_kv_heads: int) -> Weights:
        q = _matrix(function, "w_q", weights[0], None)
        head_dim = _split(function, "w_q", q, "num_heads", num_heads)
        k = _matrix(function, "w_k", weights[1], q.dtype)
        if k.shape[1] != num_kv_heads * head_dim:
            raise refusal(
                ValueError,
                function,
                "w_k",
                f" has {k.shape[1]} columns, but {num_kv_heads} KV heads of head_dim {head_dim} (from w_q) "
                f"need {num_kv_heads * head_dim}",
            )
        v = _matrix(function, "w_v", weights[2], q.dtype)
        value_dim = _split(function, "w_v", v, "num_kv_heads", num_kv_heads)
        if v.shape[0] != k.shape[0]:
            raise refusal(ValueError, function, "w_v", f" has {v.shape[0]} rows but ", "w_k", f" has {k.shape[0]}")
        if weights[3] is None:
            return cls(q, k, v, None, head_dim, value_dim)
        o = _matrix(function, "w_o", weights[3], q.dtype)
        if o.shape[0] != num_heads * value_dim:
            raise refusal(
                ValueError,
                function,
                "w_o",
                f" has {o.shape[0]} rows, but {num_heads} heads of value_dim {value_dim} need {num_heads * value_dim}",
            )
        return cls(q, k, v, o, head_dim, value_dim)

    def biases(self, function: str, vectors: tuple[Any, Any, Any, Any]) -> dict[str, NDArray[Any] | None]:
        """Return the checked biases of the matrices, by the letters of these."""
        given = zip("qkvo", vectors, (self.q, self.k, self.v, self.o), strict=True)
        return {letter: _vector(function, letter, bias, matrix, self.q.dtype) for letter, bias, matrix in given}


def head_counts(function: str, num_heads: Any, num_kv_heads: Any) -> tuple[int, int]:
    """Return the checked numbers of heads of queries and of keys."""
    heads = whole_number(function, "num_heads", num_heads, 1)
    kv_heads = heads if num_kv_heads is None else whole_number(function, "num_kv_heads", num_kv_heads, 1)
    if heads % kv_heads:
        raise refusal(
            ValueError, function, "num_heads", f" {heads} is not a multiple of ", "num_kv_heads", f" {kv_heads}"
        )
    return heads, kv_heads


def _matrix(function: str, name: str, value: Any, dtype: np.dtype[Any] | None) -> NDArray[Any]:
    array = floats(function, name, value)
    if dtype is not None and array.dtype != dtype:
        raise refusal(TypeError, function, name, f" has dtype {array.dtype} but ", "w_q", f" has {dtype}")
    if array.ndim != 2:
        raise refusal(ValueError, function, name, f" has shape {array.shape}, but a matrix is needed")
    return array


def _vector(
    function: str, letter: str, value: Any, matrix: NDArray[Any] | None, dtype: np.dtype[Any]
) -> NDArray[Any] | None:
    if value is None:
        return None
    name, columns = f"b_{letter}", f"w_{letter}"
    if matrix is None:
        raise refusal(ValueError, function, name, " is given without ", columns, "")
    array = as_array(function, name, value)
    if array.dtype != dtype:
        raise refusal(TypeError, function, name, f" has dtype {array.dtype} but ", "w_q", f" has {dtype}")
    if array.shape != (matrix.shape[1],):
        text = f" has shape {array.shape} but "
        raise refusal(ValueError, function, name, text, columns, f" has {matrix.shape[1]} columns")
    return array


def _split(function: str, name: str, matrix: NDArray[Any], heads_name: str, heads: int) -> int:
    columns = int(matrix.shape[1])
    if columns == 0 or columns % heads:
        raise refusal(
            ValueError,
            function,
            name,
            f" has {columns} columns, which ",
            heads_name,
            f" {heads} does not divide into heads",
        )
    return columns // heads
