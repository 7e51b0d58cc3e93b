"""Norms of a layer's queries and keys, between projection and rotation, and their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import _core
from ._arguments import is_float
from ._errors import refusal
from ._norm import LayerNorm, RMSNorm, norm_or_none
from ._products import rounded
from ._typing import Layout

AnyNorm = LayerNorm | RMSNorm | None


class HeadNorm(NamedTuple):
    """A norm of queries or keys, and how many numbers it normalises together: a head, or all heads of a token."""

    name: str  # of the argument
    norm: AnyNorm
    core: _core.Norm | None
    width: int

    @classmethod
    def check(cls, function: str, name: str, norm: AnyNorm, shape: tuple[int, int], dtype: np.dtype[Any]) -> HeadNorm:
        """Check the norm of heads of this shape, (number of heads, head_dim), in a layer of this dtype."""
        heads, size = shape
        width = size
        if isinstance(norm, (LayerNorm, RMSNorm)):
            for part in (norm.weight, norm.bias):
                if part is not None and len(part) not in (size, heads * size):
                    text = (
                        f" is of {len(part)} numbers, but {size} (for each head) or {heads * size} (for all heads "
                        "together) are needed"
                    )
                    raise refusal(ValueError, function, name, text)
                width = width if part is None else len(part)
        return cls(name, norm, norm_or_none(function, name, norm, width, dtype), width)

    def vectors(self) -> dict[str, NDArray[Any] | None]:
        """Return weight and bias by the names that they have in `wrt`."""
        return {f"{self.name}.{part}": getattr(self.norm, part, None) for part in ("weight", "bias")}

    def apply(self, heads: NDArray[Any]) -> NDArray[Any]:
        """Return the normalised heads (..., heads, head_dim); padding may hold anything."""
        if self.norm is None:
            return heads
        rows = heads.reshape(-1, self.width)
        with np.errstate(all="ignore"):
            unit, _ = self._unit(rows)
            weight, bias = (x if x is None else x.astype(rows.dtype) for x in self.vectors().values())
            result = unit if weight is None else unit * weight
            return (result if bias is None else result + bias).reshape(heads.shape)

    def backward(
        self, heads: NDArray[Any], grad: NDArray[Any], names: Sequence[str]
    ) -> tuple[NDArray[Any], dict[str, NDArray[Any]]]:
        """Return the gradient of the heads, and those of weight and bias that `names` names.

        Rows with gradient 0, such as padding, count as 0, whatever they hold.
        """
        if self.norm is None:
            return grad, {}
        upstream = grad.reshape(-1, self.width)
        counted = upstream.any(axis=1, keepdims=True)
        with np.errstate(all="ignore"):
            unit, factor = self._unit(np.where(counted, heads.reshape(-1, self.width), 0))
            weight, bias = self.vectors().values()
            inner = upstream if weight is None else upstream * weight.astype(unit.dtype)
            result = inner - unit * _mean(inner * unit)
            if self.norm._centred:
                result -= _mean(inner)
            result = np.where(counted, result * factor, 0).astype(grad.dtype)
            found = {}
            for part, vector, terms in (("weight", weight, upstream * unit), ("bias", bias, upstream)):
                if vector is not None and f"{self.name}.{part}" in names:
                    found[f"{self.name}.{part}"] = rounded(terms.sum(axis=0, dtype=np.float64), vector.dtype)
        return result.reshape(grad.shape), found

    def _unit(self, rows: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return rows of mean square 1 (and of mean 0 for a layer norm), and the factor of each row."""
        if self.norm._centred:  # type: ignore[union-attr]
            rows = rows - _mean(rows)
        squares = np.mean(np.square(rows, dtype=np.float64), axis=1, keepdims=True)
        factor = (1 / np.sqrt(squares + self.norm.eps)).astype(rows.dtype)  # type: ignore[union-attr]
        return rows * factor, factor


def head_norms(
    function: str, norms: tuple[AnyNorm, AnyNorm], counts: tuple[int, int], size: int, dtype: np.dtype[Any]
) -> dict[str, HeadNorm]:
    """Return the checked norms of queries and keys, for `counts` heads of this size."""
    return {
        letter: HeadNorm.check(function, f"{letter}_norm", norm, (count, size), dtype)
        for letter, norm, count in zip("qk", norms, counts, strict=True)
    }


def normalised(function: str, name: str, norm: AnyNorm, heads: NDArray[Any], layout: Layout) -> NDArray[Any]:
    """Return queries or keys of a batch after their norm; what the core will refuse is returned as it is."""
    if heads.ndim != 4 or not is_float(heads.dtype):
        return heads
    tokens_first = layout == "bshd"
    count, size = heads.shape[2 if tokens_first else 1], heads.shape[3]
    own = HeadNorm.check(function, name, norm, (count, size), heads.dtype)
    assert own.norm is not None
    if own.width == size:
        return own.norm(heads)
    tokens = heads if tokens_first else heads.swapaxes(1, 2)
    result = own.norm(tokens.reshape(*tokens.shape[:2], own.width)).reshape(tokens.shape)
    return result if tokens_first else result.swapaxes(1, 2)


def _mean(rows: NDArray[Any]) -> NDArray[Any]:
    found: NDArray[Any] = np.mean(rows, axis=1, keepdims=True, dtype=np.float64).astype(rows.dtype)
    return found
