"""Pictures of attention weights, for people: a heatmap (matplotlib, extra ``[viz]``) and text for terminals.

Keys run along x, queries along y, row 0 on top. Attention weights show where information may flow; they are not an
explanation of what a model does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LARGEST = 512  # tokens along an axis; more are shown as the largest weight of each group
_LABELLED = 64  # tokens along an axis that still get their names
_SHADES = " ░▒▓█"


def heatmap(
    weights: ArrayLike,
    tokens: Sequence[str] | None = None,
    *,
    key_tokens: Sequence[str] | None = None,
    ax: Axes | None = None,
    head: int | str | None = None,
    title: str | None = None,
    log: bool = False,
    mask: ArrayLike | None = None,
    vmax: float | None = None,
) -> Axes:
    """Draw attention weights as a heatmap.

    Parameters
    ----------
    weights : array_like, shape (Sq, Sk) or (H, Sq, Sk)
        As returned by ``attention(..., return_weights=True)`` for one batch entry.
    tokens : sequence of str, optional
        Names of the queries, and of the keys if `key_tokens` is not given and their numbers agree.
    key_tokens : sequence of str, optional
        Names of the keys.
    ax : matplotlib Axes, optional
        Where to draw; by default the axes of a new figure.
    head : int or "mean", optional
        Which head of (H, Sq, Sk); "mean" averages them. Needed if there is more than one.
    title : str, optional
    log : bool, default False
        Logarithmic colours, from 1e-4.
    mask : array_like of bool, optional
        True = attend, (Sq, Sk) or what broadcasts to it. What is hidden is drawn grey and hatched, so that it
        differs from a weight of 0.
    vmax : float, optional
        Weight of the brightest colour, to share one scale among several pictures. Default: the largest weight.

    Returns
    -------
    matplotlib Axes

    Raises
    ------
    ImportError
        matplotlib is missing.
    ValueError
        Shapes or numbers of tokens that do not fit.

    Notes
    -----
    Above 512 tokens along an axis, groups of neighbours are drawn as their largest weight, and the title says so.
    """
    try:
        import matplotlib
        from matplotlib.colors import LogNorm, Normalize
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle
    except ImportError as error:
        raise ImportError('viz.heatmap needs matplotlib: pip install "selfattn[viz]"') from error
    picture = _matrix("heatmap", weights, head)
    rows, columns = _names("heatmap", picture, tokens, key_tokens)
    hidden = np.zeros(picture.shape, bool) if mask is None else ~_mask("heatmap", mask, picture.shape)
    steps = [-(-size // _LARGEST) for size in picture.shape]
    picture, hidden = _largest(picture, steps), ~_largest(~hidden, steps)
    if ax is None:
        ax = Figure(figsize=(7, 6), layout="constrained").add_subplot()
    top = float(vmax if vmax is not None else np.nanmax(picture, initial=0)) or 1.0
    colours = matplotlib.colormaps["viridis"].with_extremes(bad="0.85")
    norm = LogNorm(1e-4, max(top, 1e-3), clip=True) if log else Normalize(0, top)
    image = ax.imshow(np.ma.MaskedArray(picture, hidden), cmap=colours, norm=norm, aspect="auto", interpolation="none")
    for query, key in np.argwhere(hidden) if hidden.sum() <= 4096 else ():
        ax.add_patch(Rectangle((key - 0.5, query - 0.5), 1, 1, fill=False, hatch="////", edgecolor="0.6", linewidth=0))
    ax.figure.colorbar(image, ax=ax, label="attention weight", shrink=0.9)
    _label(ax, rows, columns, steps)
    notes = [title or f"attention weights{'' if head is None else f', head {head}'}"]
    if max(steps) > 1:
        notes.append(f"largest of {steps[0]} × {steps[1]} neighbours")
    ax.set_title("\n".join(notes))
    return ax


def text(
    weights: ArrayLike,
    tokens: Sequence[str] | None = None,
    *,
    key_tokens: Sequence[str] | None = None,
    head: int | str | None = None,
    width: int = 100,
) -> str:
    """Draw attention weights with block characters, for a terminal.

    Parameters
    ----------
    weights, tokens, key_tokens, head
        As for `heatmap`.
    width : int, default 100
        Columns of the terminal; keys beyond it are drawn as the largest weight of a group.

    Returns
    -------
    str
        A headline (shape, dtype, head, share of the first token, largest deviation of a row's sum from 1), then a line
        per query: its name, its weights relative to the largest one, and its entropy in bits.
    """
    picture = _matrix("text", weights, head)
    rows, _ = _names("text", picture, tokens, key_tokens)
    names = rows or [str(i) for i in range(picture.shape[0])]
    margin = min(max((len(name) for name in names), default=0), 20)
    step = max(1, -(-picture.shape[1] // max(width - margin - 16, 1)))
    cells = _largest(picture, [1, step])
    sums = picture.sum(axis=1)
    seeing = sums[sums > 0]
    deviation = float(np.max(abs(seeing - 1), initial=0))
    first = float(picture[:, 0].mean()) if picture.size else 0.0
    lines = [
        f"attention weights {picture.shape[0]} × {picture.shape[1]}, {np.asarray(weights).dtype}"
        + ("" if head is None else f", head {head}")
        + f"; first token {100 * first:.0f} %, row sums within {deviation:.1e} of 1"
        + (f"; one character is the largest of {step} keys" if step > 1 else "")
    ]
    top = float(np.nanmax(cells, initial=0)) or 1.0
    for name, cell, row in zip(names, cells, picture, strict=True):
        shades = np.ceil(np.nan_to_num(cell) / top * (len(_SHADES) - 1)).astype(int).clip(0, len(_SHADES) - 1)
        bits = abs(float(np.sum(row * np.log2(np.where(row > 0, row, 1)))))
        lines.append(f"{name[:margin]:>{margin}} │{''.join(_SHADES[s] for s in shades)}│ {bits:4.1f} bit")
    return "\n".join(lines)


def _matrix(function: str, weights: ArrayLike, head: int | str | None) -> NDArray[Any]:
    array = np.asarray(weights)
    if array.ndim == 3 and head is None and array.shape[0] == 1:
        head = 0
    if array.ndim == 3 and head == "mean":
        return np.asarray(array.mean(axis=0))
    if array.ndim == 3 and isinstance(head, (int, np.integer)):
        if not -array.shape[0] <= head < array.shape[0]:
            raise ValueError(f"{function}: head is {head}, but weights has {array.shape[0]} heads")
        return np.asarray(array[head])
    if array.ndim == 3:
        raise ValueError(f'{function}: weights has {array.shape[0]} heads: choose one with head=, or head="mean"')
    if array.ndim != 2:
        raise ValueError(f"{function}: weights has shape {array.shape}, but (Sq, Sk) or (H, Sq, Sk) is needed")
    return array


def _mask(function: str, mask: ArrayLike, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    array = np.asarray(mask)
    if array.dtype != bool:
        raise TypeError(f"{function}: mask has dtype {array.dtype}, but bool is needed, True = attend")
    try:
        return np.broadcast_to(array, shape)
    except ValueError:
        raise ValueError(f"{function}: mask has shape {array.shape}, which does not broadcast to {shape}") from None


def _names(
    function: str, picture: NDArray[Any], tokens: Sequence[str] | None, key_tokens: Sequence[str] | None
) -> tuple[list[str] | None, list[str] | None]:
    queries, keys = picture.shape
    if key_tokens is None and tokens is not None and queries == keys:
        key_tokens = tokens
    for name, given, wanted in (("tokens", tokens, queries), ("key_tokens", key_tokens, keys)):
        if given is not None and len(given) != wanted:
            raise ValueError(f"{function}: {name} has {len(given)} entries, but weights has {wanted}")
    return (
        None if tokens is None else [str(t) for t in tokens],
        None if key_tokens is None else [str(t) for t in key_tokens],
    )


def _largest(array: NDArray[Any], steps: Sequence[int]) -> NDArray[Any]:
    """Return the maximum of each group of `steps` neighbours; the last group may be smaller."""
    for axis, step in enumerate(steps):
        if step > 1:
            array = np.maximum.reduceat(array, np.arange(0, array.shape[axis], step), axis=axis)
    return array


def _label(ax: Axes, rows: list[str] | None, columns: list[str] | None, steps: Sequence[int]) -> None:
    ax.set_xlabel("key")
    ax.set_ylabel("query")
    if columns is not None and len(columns) <= _LABELLED:
        ax.set_xticks(range(len(columns)), columns, rotation=45, ha="right", rotation_mode="anchor")
    elif steps[1] > 1:
        ax.set_xlabel(f"key / {steps[1]}")
    if rows is not None and len(rows) <= _LABELLED:
        ax.set_yticks(range(len(rows)), rows)
    elif steps[0] > 1:
        ax.set_ylabel(f"query / {steps[0]}")
