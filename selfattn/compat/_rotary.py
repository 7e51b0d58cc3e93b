"""Rotary embedding from the caller's tables of cosines and sines."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import _core
from .._arguments import as_array, is_float


class RotaryTables:
    """Checked tables, one row for each position, for heads of one size."""

    def __init__(
        self, function: str, cos: ArrayLike | None, sin: ArrayLike | None, interleaved: bool, head_dim: int
    ) -> None:
        if cos is None or sin is None:
            raise ValueError(f"{function}: rotary_cos and rotary_sin are needed together")
        self.function = function
        cosines, sines = as_array(function, "rotary_cos", cos), as_array(function, "rotary_sin", sin)
        for name, table in (("rotary_cos", cosines), ("rotary_sin", sines)):
            if not is_float(table.dtype):
                raise TypeError(f"{function}: {name} has dtype {table.dtype}, but floating-point numbers are needed")
            if table.ndim != 2 or table.shape != cosines.shape or 2 * table.shape[1] > head_dim:
                raise ValueError(
                    f"{function}: {name} has shape {table.shape}, but (positions, rotary_dim / 2) is needed, the same "
                    f"for both, with rotary_dim at most {head_dim}"
                )
        self.length = len(cosines)
        self.core = _core.Rope(cosines=cosines, sines=sines, interleaved=interleaved)

    def __call__(self, x: NDArray[Any], positions: NDArray[np.int64]) -> NDArray[Any]:
        """Rotate (..., S, H, D) by the positions (..., S) of its tokens, at least 0."""
        farthest = int(np.max(positions, initial=0))
        if farthest >= self.length:
            raise ValueError(
                f"{self.function}: rotary_cos has {self.length} positions, but position {farthest} is needed"
            )
        rotated = np.empty(x.shape, x.dtype)
        _core.apply_rope(x, positions, rotated, self.core, False, 1)
        return rotated
