"""Shapes that take each kernel, and operands of such shapes."""

from __future__ import annotations

from typing import Any

import numpy as np

# batch, heads, kv heads, q_len, kv_len: tile kernel, row kernel, several blocks, split keys.
SHAPES = [(2, 4, 2, 50, 70), (2, 4, 2, 3, 70), (1, 2, 1, 130, 300), (2, 4, 1, 1, 2500), (1, 1, 1, 60, 4500)]


def arrays(rng: np.random.Generator, shape: Any, dim: int = 8) -> tuple[Any, Any, Any]:
    batch, heads, kv_heads, q_len, kv_len = shape
    return tuple(
        rng.standard_normal((batch, h, n, dim)).astype(np.float32)
        for h, n in ((heads, q_len), (kv_heads, kv_len), (kv_heads, kv_len))
    )  # type: ignore[return-value]
