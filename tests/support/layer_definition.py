"""The definition of a layer in float64 NumPy, and how close a result must be to it."""

from __future__ import annotations

from typing import Any

import numpy as np

import selfattn as sa
from selfattn import reference


def rotate(x: Any, positions: Any, rope: sa.RoPE, kind: Any = np.float64) -> Any:
    """Rotate (..., H, S, D) in float64 or another type, pair by pair. Positions are (..., S), or with rope.axes
    (coordinates, ..., S); one-dimensional ones are the same for all coordinates."""
    size = rope.rotary_dim or x.shape[-1]
    x, positions = x.astype(kind), np.asarray(positions, kind)
    for i in range(size // 2):
        first, second = (2 * i, 2 * i + 1) if rope.interleaved else (i, i + size // 2)
        rate = kind(rope.base) ** (kind(-2 * i) / size) if rope.inv_freq is None else kind(rope.inv_freq[i])
        place = (
            positions if rope.axes is None or positions.ndim == 1 else positions[min(rope.axes[i], len(positions) - 1)]
        )
        angle = place[..., None, :] * rate
        cos, sin = (kind(rope.attention_scaling) * f(angle) for f in (np.cos, np.sin))
        a, b = x[..., first].copy(), x[..., second].copy()
        x[..., first], x[..., second] = a * cos - b * sin, a * sin + b * cos
    return x


def expected(
    x: Any, params: dict[str, Any], heads: int, kv_heads: int, *, context: Any = None, rope: Any = None,
    positions: Any = None, **options: Any,
) -> tuple[Any, reference.Result]:  # fmt: skip
    """The layer in float64: its output, and the result of attention on the projections."""
    p = {name: None if w is None else w.astype(np.float64) for name, w in params.items()}
    x64 = x.astype(np.float64)
    c64 = x64 if context is None else context.astype(np.float64)

    def project(source: Any, letter: str, count: int) -> Any:
        y = source @ p["w_" + letter]
        if p.get("b_" + letter) is not None:
            y = y + p["b_" + letter]
        return y.reshape(*y.shape[:-1], count, -1).swapaxes(-2, -3)

    q, k, v = project(x64, "q", heads), project(c64, "k", kv_heads), project(c64, "v", kv_heads)
    if rope is not None:
        own = np.arange(x.shape[-2]) if positions is None else positions
        q = rotate(q, own, rope)
        k = rotate(k, own if context is None else np.arange(context.shape[-2]), rope)
    result = reference.attention(q, k, v, **options)
    y = result.out.swapaxes(-2, -3)
    y = y.reshape(*y.shape[:-2], -1)
    if p.get("w_o") is not None:
        y = y @ p["w_o"] + (0 if p.get("b_o") is None else p["b_o"])
    return y, result


def tolerance(dtype: Any) -> float:
    return 3e-6 if dtype == np.float32 else 1e-14


def close(found: Any, wanted: Any) -> None:
    # Errors of three products in a row; outputs are of the order of 1.
    assert found.shape == wanted.shape
    assert np.max(abs(found - wanted), initial=0) <= tolerance(found.dtype) * max(1, np.max(abs(wanted), initial=0))
