"""The definition of a layer in float64 NumPy, and how close a result must be to it."""

from __future__ import annotations

from typing import Any

import numpy as np

import selfattn as sa
from selfattn import reference


def rotate(x: Any, positions: Any, rope: sa.RoPE) -> Any:
    """Rotate (..., H, S, D) in float64, pair by pair."""
    size = rope.rotary_dim or x.shape[-1]
    x = x.copy()
    for i in range(size // 2):
        first, second = (2 * i, 2 * i + 1) if rope.interleaved else (i, i + size // 2)
        angle = np.asarray(positions)[..., None, :] * float(rope.base) ** (-2 * i / size)
        a, b = x[..., first].copy(), x[..., second].copy()
        x[..., first], x[..., second] = a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)
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
