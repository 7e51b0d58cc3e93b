"""Draws attention weights with matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ._errors import refusal
from ._picture import LEAST, MARGIN, Picture, Style, largest, of_head, shorten, top_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

_LARGEST = 512  # maximum number of cells along an axis; more tokens are grouped, showing each group's largest weight
_LABELLED = 64  # maximum number of tokens along an axis that are labelled with their names, or whose values are written
_LITERAL: dict[str, Any] = {"parse_math": False, "usetex": False}  # a $ in a token does not start a formula


def drawn(picture: Picture, style: Style, ax: Axes | None, values: bool) -> Axes:
    """Draw on the axes, or on those of a new figure."""
    import matplotlib
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Rectangle

    if values and max(picture.weights.shape) > _LABELLED:
        size = f", but there are {' × '.join(map(str, picture.weights.shape))} weights to draw: at most {_LABELLED}"
        raise refusal(ValueError, "heatmap", "values", f" is True{size} along an axis can be read")
    steps = [-(-size // _LARGEST) for size in picture.weights.shape]
    cells, hidden = largest(picture.weights, steps), ~largest(~picture.hidden, steps)
    strange = ~np.isfinite(cells) & ~hidden
    ax = _new_axes(cells.shape, values) if ax is None else ax
    colours = matplotlib.colormaps["viridis"].with_extremes(bad="0.85")
    how: dict[str, Any] = {"aspect": "auto", "interpolation": "none"}
    norm = _norm(style, style.vmax or top_of(cells))
    image = ax.imshow(np.ma.MaskedArray(cells, hidden), cmap=colours, norm=norm, **how)
    if strange.any():
        ax.imshow(np.ma.MaskedArray(np.ones(cells.shape), ~strange), cmap=ListedColormap(["tab:red"]), **how)
    for query, key in np.argwhere(hidden) if hidden.sum() <= 4096 else ():
        ax.add_patch(Rectangle((key - 0.5, query - 0.5), 1, 1, fill=False, hatch="////", edgecolor="0.6", linewidth=0))
    if values:
        _write_values(ax, image, cells, hidden)
    _add_scale(ax, image, style.power)
    _label(ax, picture, steps)
    notes = [style.title or "attention weights" + of_head(picture.head)]
    if picture.left_out:
        notes.append(picture.left_out)
    if max(steps) > 1:
        notes.append(f"largest of {steps[0]} × {steps[1]} neighbours")
    if strange.any():
        notes.append("red: NaN or infinite")
    ax.set_title("\n".join(notes), **_LITERAL)
    return ax


def _new_axes(shape: tuple[int, ...], values: bool) -> Axes:
    from matplotlib.figure import Figure

    queries, keys = shape if values else (0, 0)  # values need room
    return Figure(figsize=(max(7, 0.4 * keys + 2.5), max(6, 0.3 * queries + 2)), layout="constrained").add_subplot()


def _norm(style: Style, top: float) -> Any:
    from matplotlib.colors import LogNorm, Normalize, PowerNorm

    if style.log:
        return LogNorm(LEAST, max(top, 10 * LEAST), clip=True)
    return Normalize(0, top) if style.power is None else PowerNorm(style.power, 0, top, clip=True)


def _add_scale(ax: Axes, image: AxesImage, power: float | None) -> None:
    how: dict[str, Any] = {}
    if power is not None:  # by default, the labels of large weights would overlap
        how = {"ticks": image.norm.vmax * np.linspace(0, 1, 6) ** (1 / power), "format": "%.2g"}
    ax.figure.colorbar(image, ax=ax, label="attention weight", shrink=0.9, **how)


def _write_values(ax: Axes, image: AxesImage, cells: NDArray[Any], hidden: NDArray[np.bool_]) -> None:
    """Write each weight into its cell, black on bright colours and white on dark ones."""
    width, height = (72 / ax.figure.dpi * x for x in (ax.bbox.width, ax.bbox.height))
    size = min(10.0, width / cells.shape[1] / 2.6, height / cells.shape[0] / 1.4)  # in points, as the cells
    red, green, blue, _ = np.moveaxis(image.cmap(image.norm(np.nan_to_num(cells))), -1, 0)
    bright = 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.45
    for query, key in np.argwhere(~hidden):
        colour = "black" if bright[query, key] or not np.isfinite(cells[query, key]) else "white"
        how: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": size, "color": colour}
        ax.text(key, query, _value(float(cells[query, key])), **how)


def _value(weight: float) -> str:
    """Return the weight with two decimals, short: .25, 0, 1."""
    if not 0 <= weight < 10:
        return f"{weight:.1g}"
    shown = f"{weight:.2f}"
    return shown.removesuffix(".00") if shown.endswith(".00") else shown.removeprefix("0")


def _label(ax: Axes, picture: Picture, steps: Sequence[int]) -> None:
    rows, columns = ([shorten(x, MARGIN) for x in names or ()] for names in (picture.rows, picture.columns))
    ax.set_xlabel("key")
    ax.set_ylabel("query")
    if columns and len(columns) <= _LABELLED:
        slanted: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
        ax.set_xticks(range(len(columns)), columns, **slanted, **_LITERAL)
    elif steps[1] > 1:
        ax.set_xlabel(f"key / {steps[1]}")
    if rows and len(rows) <= _LABELLED:
        ax.set_yticks(range(len(rows)), rows, **_LITERAL)
    elif steps[0] > 1:
        ax.set_ylabel(f"query / {steps[0]}")
