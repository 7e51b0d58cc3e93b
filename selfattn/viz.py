"""Pictures of attention weights: a heatmap (matplotlib, extra ``[viz]``) and text for terminals.

Keys are along x, queries along y, row 0 at the top. Attention weights show where information may flow; they do not
explain what a model does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._arguments import whole_number
from ._keywords import hinted
from ._picture import Picture, fit, ignoring_overflow, num_columns, read, read_style, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LARGEST = 512  # maximum number of cells along an axis; more tokens are grouped, showing each group's largest weight
_LABELLED = 64  # maximum number of tokens along an axis that are labelled with their names
_LEAST = 1e-4  # the weight at the dark end of a logarithmic scale
_MARGIN = 20  # number of columns for a name
_SHADES = " ░▒▓█"
_HIDDEN, _NOT_FINITE = "·", "!"  # drawn in a terminal instead of a shade
_LITERAL: dict[str, Any] = {"parse_math": False, "usetex": False}  # a $ in a token does not start a formula


@hinted
@ignoring_overflow
def heatmap(
    weights: ArrayLike,
    tokens: Sequence[str] | None = None,
    *,
    key_tokens: Sequence[str] | None = None,
    ax: Axes | None = None,
    head: int | Literal["mean"] | None = None,
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
        Names of the queries; also of the keys if `key_tokens` is not given and there are as many keys as queries.
    key_tokens : sequence of str, optional
        Names of the keys.
    ax : matplotlib Axes, optional
        Axes to draw on; by default, a new figure is made.
    head : int or "mean", optional
        The head of (H, Sq, Sk) to draw; "mean" averages the heads. Required if there is more than one head.
    title : str, optional
    log : bool, default False
        Use a logarithmic colour scale, from 1e-4.
    mask : array_like of bool, optional
        True = attend, (Sq, Sk) or broadcastable to it. Hidden pairs are drawn grey and hatched, to tell them from a
        weight of 0.
    vmax : float, optional
        Weight of the brightest colour, for a common scale in several pictures. Default: the largest weight.

    Returns
    -------
    matplotlib Axes

    Raises
    ------
    ImportError
        matplotlib is missing.
    TypeError, ValueError
        Arguments that do not fit; the message names the argument and its value.

    Notes
    -----
    Tokens and title are shown literally: a ``$`` does not start a formula, and invisible characters, such as a newline,
    appear as escapes (``\\n``). Tokens are cut to 20 columns. NaN and infinite weights are red. Above 512 tokens along
    an axis, adjacent tokens are grouped, and each group shows its largest weight. The title says if weights are not
    finite or grouped.

    Examples
    --------
    >>> from selfattn import viz
    >>> ax = viz.heatmap([[1.0, 0.0], [0.25, 0.75]], ["to", "Norway"])
    >>> ax.figure.savefig("weights.png")
    """
    try:
        import matplotlib
        from matplotlib.colors import ListedColormap, LogNorm, Normalize
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle
    except ImportError as error:
        raise ImportError('viz.heatmap needs matplotlib: pip install "selfattn[viz]"') from error
    picture = read("heatmap", weights, head, tokens, key_tokens, mask)
    title, log, vmax = read_style("heatmap", title, log, vmax)
    steps = [-(-size // _LARGEST) for size in picture.weights.shape]
    cells, hidden = _largest(picture.weights, steps), ~_largest(~picture.hidden, steps)
    strange = ~np.isfinite(cells) & ~hidden
    if ax is None:
        ax = Figure(figsize=(7, 6), layout="constrained").add_subplot()
    top = vmax or _top(cells)
    colours = matplotlib.colormaps["viridis"].with_extremes(bad="0.85")
    norm = LogNorm(_LEAST, max(top, 10 * _LEAST), clip=True) if log else Normalize(0, top)
    how: dict[str, Any] = {"aspect": "auto", "interpolation": "none"}
    image = ax.imshow(np.ma.MaskedArray(cells, hidden), cmap=colours, norm=norm, **how)
    if strange.any():
        ax.imshow(np.ma.MaskedArray(np.ones(cells.shape), ~strange), cmap=ListedColormap(["tab:red"]), **how)
    for query, key in np.argwhere(hidden) if hidden.sum() <= 4096 else ():
        ax.add_patch(Rectangle((key - 0.5, query - 0.5), 1, 1, fill=False, hatch="////", edgecolor="0.6", linewidth=0))
    ax.figure.colorbar(image, ax=ax, label="attention weight", shrink=0.9)
    _label(ax, picture, steps)
    notes = [title or "attention weights" + _of_head(picture.head)]
    if max(steps) > 1:
        notes.append(f"largest of {steps[0]} × {steps[1]} neighbours")
    if strange.any():
        notes.append("red: NaN or infinite")
    ax.set_title("\n".join(notes), **_LITERAL)
    return ax


@hinted
@ignoring_overflow
def text(
    weights: ArrayLike,
    tokens: Sequence[str] | None = None,
    *,
    key_tokens: Sequence[str] | None = None,
    head: int | Literal["mean"] | None = None,
    width: int = 100,
    title: str | None = None,
    log: bool = False,
    mask: ArrayLike | None = None,
    vmax: float | None = None,
) -> str:
    """Draw attention weights with block characters, for a terminal.

    Parameters
    ----------
    weights, tokens, key_tokens, head
        As for `heatmap`.
    width : int, default 100
        Columns of the terminal. If there are more keys, adjacent ones are grouped, showing each group's largest weight.
    title : str, optional
        Replaces "attention weights" at the start of the headline.
    log, mask, vmax
        As for `heatmap`. Hidden pairs are drawn as ``·``.

    Returns
    -------
    str
        A headline (shape, dtype, head, share of the first token, largest deviation of a row's sum from 1), then a line
        per query: its name, its weights relative to the largest one, and its entropy in bits. Weights that are NaN or
        infinite are drawn as ``!``, and the headline counts them.

    Raises
    ------
    TypeError, ValueError
        Arguments that do not fit; the message names the argument and its value.

    Notes
    -----
    Tokens cannot control the terminal: invisible characters, such as a newline or an escape, appear as escapes
    (``\\n``, ``\\x1b``). Names are cut to 20 columns, and aligned by their width in a terminal.

    Examples
    --------
    >>> from selfattn import viz
    >>> print(viz.text([[1.0, 0.0], [0.25, 0.75]], ["to", "Norway"], title="weights"))
    weights 2 × 2, float64; first token 62 %, row sums within 0.0e+00 of 1
        to │█ │  0.0 bit
    Norway │░▓│  0.8 bit
    """
    picture = read("text", weights, head, tokens, key_tokens, mask)
    title, log, vmax = read_style("text", title, log, vmax)
    width = whole_number("text", "width", width, 1)
    names = picture.rows or [str(i) for i in range(picture.weights.shape[0])]
    margin = min(max(map(num_columns, names), default=0), _MARGIN)
    step = max(1, -(-picture.weights.shape[1] // max(width - margin - 16, 1)))
    cells, hidden = _largest(picture.weights, [1, step]), ~_largest(~picture.hidden, [1, step])
    shades = np.array(list(_SHADES))[_levels(cells, vmax or _top(cells), log)]
    shades[~np.isfinite(cells)] = _NOT_FINITE
    shades[hidden] = _HIDDEN
    lines = [_headline(picture, title, step)]
    for name, cell, row in zip(names, shades, picture.weights, strict=True):
        bits = abs(float(np.sum(row * np.log2(np.where(row > 0, row, 1)))))
        lines.append(f"{fit(name, margin)} │{''.join(cell)}│ {bits:4.1f} bit")
    return "\n".join(lines)


def _headline(picture: Picture, title: str | None, step: int) -> str:
    weights = picture.weights
    strange = int(np.sum(~np.isfinite(weights)))
    first = weights[:, :1][np.isfinite(weights[:, :1])]
    sums = weights.sum(axis=1)
    seeing = sums[np.isfinite(sums) & (sums > 0)]
    parts = [
        f"{title or 'attention weights'} {weights.shape[0]} × {weights.shape[1]}, {picture.dtype}"
        + _of_head(picture.head),
        f"first token {100 * float(first.mean()) if first.size else 0.0:.0f} %, "
        f"row sums within {float(np.max(abs(seeing - 1), initial=0)):.1e} of 1",
    ]
    if step > 1:
        parts.append(f"one character is the largest of {step} keys")
    if picture.hidden.any():
        parts.append(f"{_HIDDEN} is hidden")
    if strange:
        parts.append(f"{_NOT_FINITE} is NaN or infinite ({strange} weights)")
    return "; ".join(parts)


def _levels(cells: NDArray[Any], top: float, log: bool) -> NDArray[np.intp]:
    """Return the index of each weight's shade."""
    cells = np.where(np.isfinite(cells), cells, 0)
    if log:
        cells, top = np.log(np.maximum(cells, _LEAST) / _LEAST), np.log(max(top, 10 * _LEAST) / _LEAST)
    return np.ceil(np.clip(cells / top, 0, 1) * (len(_SHADES) - 1)).astype(np.intp)


def _top(cells: NDArray[Any]) -> float:
    return float(np.max(cells, initial=0, where=np.isfinite(cells))) or 1.0


def _of_head(head: int | str | None) -> str:
    return "" if head is None else f", head {head}"


def _largest(array: NDArray[Any], steps: Sequence[int]) -> NDArray[Any]:
    """Return the maximum of each group of `steps` neighbours; the last group may be smaller."""
    for axis, step in enumerate(steps):
        if step > 1:
            array = np.maximum.reduceat(array, np.arange(0, array.shape[axis], step), axis=axis)
    return array


def _label(ax: Axes, picture: Picture, steps: Sequence[int]) -> None:
    rows, columns = ([shorten(x, _MARGIN) for x in names or ()] for names in (picture.rows, picture.columns))
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
