"""Draws attention weights in a terminal."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._picture import LEAST, MARGIN, Picture, Style, fit, largest, num_columns, of_head, top_of

_SHADES = " ░▒▓█"
_HIDDEN, _NOT_FINITE = "·", "!"  # drawn instead of a shade


def drawn(picture: Picture, style: Style, width: int) -> str:
    """Return a headline, and a line per query."""
    names = picture.rows or [str(i) for i in range(picture.weights.shape[0])]
    margin = min(max(map(num_columns, names), default=0), MARGIN)
    step = max(1, -(-picture.weights.shape[1] // max(width - margin - 16, 1)))
    cells, hidden = largest(picture.weights, [1, step]), ~largest(~picture.hidden, [1, step])
    shades = np.array(list(_SHADES))[_levels(cells, style.vmax or top_of(cells), style)]
    shades[~np.isfinite(cells)] = _NOT_FINITE
    shades[hidden] = _HIDDEN
    lines = [_headline(picture, style.title, step)]
    for name, cell, row in zip(names, shades, picture.complete, strict=True):
        bits = abs(float(np.sum(row * np.log2(np.where(row > 0, row, 1)))))
        lines.append(f"{fit(name, margin)} │{''.join(cell)}│ {bits:4.1f} bit")
    return "\n".join(lines)


def _headline(picture: Picture, title: str | None, step: int) -> str:
    weights = picture.weights
    strange = int(np.sum(~np.isfinite(weights)))
    first = picture.complete[:, :1][np.isfinite(picture.complete[:, :1])]
    sums = picture.complete.sum(axis=1)
    seeing = sums[np.isfinite(sums) & (sums > 0)]
    parts = [
        f"{title or 'attention weights'} {weights.shape[0]} × {weights.shape[1]}, {picture.dtype}"
        + of_head(picture.head),
        f"first token {100 * float(first.mean()) if first.size else 0.0:.0f} %, "
        f"row sums within {float(np.max(abs(seeing - 1), initial=0)):.1e} of 1",
    ]
    if picture.left_out:
        parts.append(picture.left_out)
    if step > 1:
        parts.append(f"one character is the largest of {step} keys")
    if picture.hidden.any():
        parts.append(f"{_HIDDEN} is hidden")
    if strange:
        parts.append(f"{_NOT_FINITE} is NaN or infinite ({strange} weights)")
    return "; ".join(parts)


def _levels(cells: NDArray[Any], top: float, style: Style) -> NDArray[np.intp]:
    """Return the index of each weight's shade."""
    cells = np.where(np.isfinite(cells), cells, 0)
    if style.log:
        cells, top = np.log(np.maximum(cells, LEAST) / LEAST), np.log(max(top, 10 * LEAST) / LEAST)
    return np.ceil(np.clip(cells / top, 0, 1) ** (style.power or 1) * (len(_SHADES) - 1)).astype(np.intp)
