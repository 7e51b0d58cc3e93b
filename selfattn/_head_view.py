"""Draws attention weights as lines between tokens, in SVG."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ._arguments import as_array, real
from ._errors import refusal
from ._mask_nodes import Mask
from ._picture import MARGIN, Picture, num_columns, read, read_style, shorten, without

_MOST_TOKENS, _MOST_HEADS = 128, 32
_ACROSS = 3  # panels in a row
_ROW, _COLUMN, _LINES, _GAP = (
    18,
    7.3,
    110,
    24,
)  # pixels: a token's height, a letter's width, lines' width, between panels
_TOP = 40  # pixels above the tokens of a panel
_BLUE, _RED = "#0072b2", "#d55e00"  # two colours that colour-blind people can tell apart
_BLACK, _GREY = "#111", "#555"
_FONT = "font:12px 'DejaVu Sans Mono',Menlo,Consolas,monospace"
# All but this is in attributes: Jupyter drops the rules of notebooks that it does not trust.
_HOVER = ".selfattn-view .panel:has(.query:hover) .query:not(:hover){opacity:.12}"


class HeadView(NamedTuple):
    """Lines between tokens, as `head_view` draws them. Jupyter shows the picture.

    Attributes
    ----------
    svg : str
        The picture: one ``<svg>`` element, which can be put into a page or a file.
    title : str
    size : str
        How many heads, queries and keys are drawn.

    Examples
    --------
    >>> from selfattn import viz
    >>> view = viz.head_view([[[1.0, 0.0], [0.25, 0.75]]] * 4, ["to", "Norway"], title="layer 1")
    >>> view.size
    '4 heads, 2 queries, 2 keys'
    >>> view.save("layer1.svg")
    """

    svg: str
    title: str
    size: str

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the picture to a file.

        Parameters
        ----------
        path : str or path
            Its suffix is ``.svg``, or ``.html`` for a page of its own.

        Raises
        ------
        ValueError
            Another suffix.
        OSError
            The file cannot be written.
        """
        file = Path(path)
        suffix = file.suffix.lower()
        if suffix not in (".svg", ".html"):
            raise refusal(ValueError, "save", "path", f" is {os.fspath(path)!r}, but it must end in .svg or .html")
        page = self.svg
        if suffix == ".html":
            head = f'<meta charset="utf-8">\n<title>{escape(self.title)}</title>'
            page = f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{page}\n</body>\n</html>'
        file.write_text(page + "\n", encoding="utf8")

    def _repr_html_(self) -> str:
        return self.svg

    def __repr__(self) -> str:
        return f"<HeadView: {self.size}>"


def view(
    weights: ArrayLike,
    head: int | str | None,
    names: tuple[Sequence[str] | None, Sequence[str] | None],
    mask: ArrayLike | Mask | None,
    style: tuple[Any, Sequence[str] | None, Any],
) -> HeadView:
    """Return the picture; `names` are those of queries and keys, `style` is title, skip and least."""
    title, skip, least = style
    title = read_style("head_view", title, False, None, None).title
    least = real("head_view", "least", least)
    if least <= 0:
        raise refusal(ValueError, "head_view", "least", f" is {least!r}, but it must be greater than 0")
    array = as_array("head_view", "weights", weights)
    every = array.ndim == 3 and head is None and array.shape[0] > 1
    heads: list[Any] = list(range(array.shape[0])) if every else [head]
    if len(heads) > _MOST_HEADS:
        text = f" has {len(heads)} heads, but at most {_MOST_HEADS} are drawn: choose one with head="
        raise refusal(ValueError, "head_view", "weights", text)
    pictures = [without("head_view", read("head_view", array, i, *names, mask), skip) for i in heads]
    queries, keys = pictures[0].weights.shape
    if max(queries, keys) > _MOST_TOKENS:
        text = f" has {queries} queries and {keys} keys to draw, but at most {_MOST_TOKENS} of each can be read"
        raise refusal(ValueError, "head_view", "weights", text)
    title = title or "attention weights"
    size = ", ".join(f"{n} {one if n == 1 else many}" for n, one, many in (
        (len(pictures), "head", "heads"), (queries, "query", "queries"), (keys, "key", "keys")
    ))  # fmt: skip
    return HeadView(_svg(pictures, title, least), title, size)


def _svg(pictures: list[Picture], title: str, least: float) -> str:
    every = np.concatenate([picture.weights.ravel() for picture in pictures])
    top = float(np.max(every, initial=least, where=np.isfinite(every)))
    sides = [_side(names, size) for names, size in zip(pictures[0][2:4], pictures[0].weights.shape, strict=True)]
    margins = [_COLUMN * max(num_columns(name) for name in [*side, "query"]) + 8 for side in sides]
    wide, high = sum(margins) + _LINES + _GAP, _TOP + _ROW * max(map(len, sides)) + _GAP / 2
    across = min(_ACROSS, len(pictures))
    notes = _notes(pictures, least)
    width = max(across * wide + _GAP, _COLUMN * max(map(num_columns, [title, *notes])) + 2 * _GAP, 420)
    below = 36 + -(-len(pictures) // across) * high
    height = below + 36 + 16 * len(notes)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="selfattn-view" role="img" width="{width:.0f}" '
        f'height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}" style="max-width:100%;height:auto;{_FONT}">',
        f"<title>{escape(title)}</title><style>{_HOVER}</style>",
        f'<rect width="100%" height="100%" fill="#fff"/>{_text(_GAP, 22, title, "font-weight:bold")}',
    ]
    for i, picture in enumerate(pictures):
        x, y = _GAP + i % across * wide, 36 + i // across * high
        parts += [f'<g class="panel" transform="translate({x:.1f} {y:.1f})">']
        parts += _panel(picture, sides, margins, (top, least))
        parts += ["</g>"]
    return "\n".join([*parts, *_legend(below, top, least, notes), "</svg>"])


def _side(names: list[str] | None, size: int) -> list[str]:
    return [shorten(name, MARGIN) for name in names] if names else [str(i) for i in range(size)]


def _panel(picture: Picture, sides: list[list[str]], margins: list[float], scale: tuple[float, float]) -> Iterator[str]:
    """Yield a head's tokens and lines; `scale` is the largest and the smallest weight of a line."""
    left, right = margins[0], margins[0] + _LINES
    if picture.head is not None:
        yield _text(left + _LINES / 2, 12, f"head {picture.head}", "text-anchor:middle;font-weight:bold")
    yield _text(left - 6, 30, "query", "text-anchor:end", _GREY) + _text(right + 6, 30, "key", colour=_GREY)
    for i, key in enumerate(sides[1]):
        yield _text(right + 6, _TOP + _ROW * i + 13, key)
    for i, (query, row) in enumerate(zip(sides[0], picture.weights, strict=True)):
        lines = [_text(left - 6, _TOP + _ROW * i + 13, query, "text-anchor:end")]
        for j in np.argsort(row, kind="stable"):  # the widest is on top
            weight = float(row[j])
            if weight >= scale[1] or not np.isfinite(weight):
                ends = (left, _TOP + _ROW * (i + 0.5), right, _TOP + _ROW * (int(j) + 0.5))
                lines.append(_line(ends, weight, scale[0], f"{query} → {sides[1][j]}: {weight:.3g}"))
        yield f'<g class="query">{"".join(lines)}</g>'


def _legend(y: float, top: float, least: float, notes: list[str]) -> Iterator[str]:
    x = float(_GAP)
    yield _text(x, y + 20, "weight", colour=_GREY)
    x += 7 * _COLUMN
    for weight in dict.fromkeys([least, (least + top) / 2, top]):
        yield _line((x, y + 16, x + 30, y + 16), weight, top) + _text(x + 36, y + 20, f"{weight:.2g}", colour=_GREY)
        x += 100
    for i, note in enumerate(notes):
        yield _text(_GAP, y + 40 + 16 * i, note, colour=_GREY)


def _notes(pictures: list[Picture], least: float) -> list[str]:
    notes = [f"weights below {least:.2g} have no line"]
    if pictures[0].left_out:
        notes.append(pictures[0].left_out if len(pictures) == 1 else pictures[0].left_out.partition(" (")[0])
    strange = sum(int(np.sum(~np.isfinite(picture.weights))) for picture in pictures)
    if strange:
        notes.append(f"dashed: NaN or infinite weights ({strange})")
    return notes


def _line(ends: tuple[float, float, float, float], weight: float, top: float, tip: str = "") -> str:
    share = weight / top if np.isfinite(weight) else 0.5
    kind = f'stroke="{_BLUE}"' if np.isfinite(weight) else f'stroke="{_RED}" stroke-dasharray="4 3"'
    places = " ".join(f'{name}="{x:.1f}"' for name, x in zip(("x1", "y1", "x2", "y2"), ends, strict=True))
    shown = f"<title>{escape(tip)}</title>" if tip else ""
    return (
        f'<line {kind} {places} stroke-width="{0.6 + 3.4 * share:.2f}" '
        f'stroke-opacity="{0.2 + 0.8 * share:.2f}">{shown}</line>'
    )


def _text(x: float, y: float, text: str, style: str = "", colour: str = _BLACK) -> str:
    extra = f' fill="{colour}"' + (f' style="{style}"' if style else "")
    return f'<text x="{x:.1f}" y="{y:.1f}"{extra} xml:space="preserve">{escape(text)}</text>'
