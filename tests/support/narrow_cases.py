"""Types, shapes and operands of tests of 16-bit attention."""

from __future__ import annotations

import itertools
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import selfattn as sa

TYPES = [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
# q's type, that of k and v
MIXTURES = [
    *itertools.product([np.dtype(np.float32), np.dtype(np.float64)], TYPES),
    (np.dtype(np.float64), np.dtype(np.float32)),
]
# batch, heads, kv heads, q_len, kv_len, head_dim, value_dim, kernel
TILE, ROW, RANGES, TILE_RANGES = SHAPES = [
    (2, 4, 2, 50, 70, 20, 9, "tile"),
    (2, 4, 2, 2, 70, 33, 17, "row"),
    (1, 4, 1, 1, 2500, 16, 16, "row"),
    (1, 1, 1, 30, 4500, 8, 24, "tile"),
]
types = pytest.mark.parametrize("dtype", TYPES, ids=str)
mixtures = pytest.mark.parametrize(("wide", "narrow"), MIXTURES, ids=str)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def operands(normal: Any, shape: Any, dtype: Any, narrow: Any = None) -> tuple[Any, Any, Any]:
    batch, heads, kv_heads, q_len, kv_len, head_dim, value_dim, _ = shape
    narrow = narrow or dtype
    return (
        normal(batch, heads, q_len, head_dim, dtype=dtype),
        normal(batch, kv_heads, kv_len, head_dim, dtype=narrow),
        normal(batch, kv_heads, kv_len, value_dim, dtype=narrow),
    )


def same(a: Any, b: Any) -> bool:
    return all(
        x.dtype == y.dtype and np.ascontiguousarray(x).tobytes() == np.ascontiguousarray(y).tobytes()
        for x, y in zip(a, b, strict=True)
    )


def everything(q: Any, k: Any, v: Any, **options: Any) -> Any:
    return sa.attention(q, k, v, return_lse=True, return_weights=True, **options)


def backwards(x: Any) -> Any:
    return np.ascontiguousarray(x[..., ::-1, ::-1])[..., ::-1, ::-1]


def columns(x: Any) -> Any:
    return np.ascontiguousarray(x.swapaxes(-1, -2)).swapaxes(-1, -2)


def columns_apart(x: Any) -> Any:
    wide = np.full((*x.shape[:-1], 3 * x.shape[-1]), np.nan).astype(x.dtype)
    wide[..., ::3] = x
    return wide[..., ::3]


def every_second(x: Any) -> Any:
    """Spacing of float32 numbers."""
    wide = np.full((*x.shape[:-1], 2 * x.shape[-1]), np.nan).astype(x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]
