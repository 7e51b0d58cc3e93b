"""Checks the arguments of `viz`, and makes names safe to show."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._arguments import as_array, flag, is_float, real
from ._errors import refusal
from ._mask_nodes import Mask

LEAST = 1e-4  # the weight at the dark end of a logarithmic scale
MARGIN = 20  # number of columns for a name

_P = ParamSpec("_P")
_R = TypeVar("_R")


class Picture(NamedTuple):
    weights: NDArray[Any]  # (Sq, Sk), in a type that NumPy computes with; 0 for hidden pairs
    hidden: NDArray[np.bool_]  # (Sq, Sk)
    rows: list[str] | None
    columns: list[str] | None
    dtype: np.dtype[Any]  # as given
    head: int | str | None
    complete: NDArray[Any]  # the weights of the same queries with every key, also those that are left out
    left_out: str = ""  # which tokens are left out, for people


class Style(NamedTuple):
    title: str | None
    log: bool
    vmax: float | None
    power: float | None


def read(
    function: str,
    weights: ArrayLike,
    head: int | str | None,
    tokens: Sequence[str] | None,
    key_tokens: Sequence[str] | None,
    mask: ArrayLike | Mask | None,
) -> Picture:
    """Return the weights of one head with the names of its rows and columns."""
    array = as_array(function, "weights", weights)
    if not is_float(array.dtype) and array.dtype.kind not in "fiub":
        raise refusal(TypeError, function, "weights", f" has dtype {array.dtype}, but real numbers are needed")
    if array.ndim == 3 and head is None and array.shape[0] == 1:
        head = 0
    matrix = _one_head(function, array, head)
    queries, keys = matrix.shape
    if key_tokens is None and queries == keys:
        key_tokens = tokens
    rows = _names(function, "tokens", tokens, queries)
    columns = _names(function, "key_tokens", key_tokens, keys)
    hidden = np.zeros(matrix.shape, bool) if mask is None else ~_mask(function, mask, matrix.shape)
    matrix = np.where(hidden, 0, matrix)
    return Picture(matrix, hidden, rows, columns, array.dtype, head, complete=matrix)


def without(function: str, picture: Picture, skip: Sequence[str] | None) -> Picture:
    """Return the picture without the queries and keys that have one of these names."""
    if skip is None:
        return picture
    if isinstance(skip, str):
        raise refusal(TypeError, function, "skip", f" is {skip!r}, but a sequence of strings is needed")
    wanted = _strings(function, "skip", skip)
    known = {*(picture.rows or ()), *(picture.columns or ())}
    for name in wanted:
        if name not in known:
            raise refusal(ValueError, function, "skip", f" has {name!r}, which is none of the ", "tokens", "")
    rows, columns = (
        np.array([names is None or names[i] not in wanted for i in range(size)], bool)
        for names, size in zip((picture.rows, picture.columns), picture.weights.shape, strict=True)
    )
    if not (rows.any() and columns.any()):
        raise refusal(ValueError, function, "skip", f" is {skip!r}, which leaves no query or no key to draw")
    complete = picture.weights[rows]
    total = float(complete.sum())
    share = float(complete[:, ~columns].sum()) / total if total else 0.0
    held = f" ({100 * share:.0f} % of the weight)" if np.isfinite(share) else ""
    return picture._replace(
        weights=complete[:, columns],
        hidden=picture.hidden[np.ix_(rows, columns)],
        rows=_kept(picture.rows, rows),
        columns=_kept(picture.columns, columns),
        complete=complete,
        left_out=f"without {', '.join(dict.fromkeys(wanted))}{held}" if wanted else "",
    )


def read_style(function: str, title: Any, log: Any, vmax: Any, power: Any) -> Style:
    """Return how to draw, checked; invisible characters of the title are escaped."""
    if title is not None:
        if not isinstance(title, str):
            raise refusal(TypeError, function, "title", f" is {title!r}, but a string is needed")
        title = "\n".join(map(visible, title.split("\n"))) if function == "heatmap" else visible(title)
    log = flag(function, "log", log)
    if power is not None and log:
        raise refusal(ValueError, function, "power", f" is {power!r}, but ", "log", " is True: choose one scale")
    return Style(title, log, _positive(function, "vmax", vmax), _positive(function, "power", power))


def _positive(function: str, name: str, value: Any) -> float | None:
    if value is None:
        return None
    number = real(function, name, value)
    if number <= 0:
        raise refusal(ValueError, function, name, f" is {number!r}, but it must be greater than 0")
    return number


def top_of(cells: NDArray[Any]) -> float:
    """Return the largest finite weight, or 1 if it is 0."""
    return float(np.max(cells, initial=0, where=np.isfinite(cells))) or 1.0


def of_head(head: int | str | None) -> str:
    """Return what a title says about the head."""
    return "" if head is None else f", head {head}"


def largest(array: NDArray[Any], steps: Sequence[int]) -> NDArray[Any]:
    """Return the maximum of each group of `steps` neighbours; the last group may be smaller."""
    for axis, step in enumerate(steps):
        if step > 1:
            array = np.maximum.reduceat(array, np.arange(0, array.shape[axis], step), axis=axis)
    return array


def visible(text: str) -> str:
    """Escape characters that are invisible or control a terminal: newlines, ESC, bidi overrides."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def num_columns(text: str) -> int:
    """Return how many terminal columns the text takes."""
    return sum(map(_column, text))


def _column(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me"):  # drawn over the preceding character
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def shorten(text: str, columns: int) -> str:
    """Return the text; if it is too wide, cut it to this width, ending in an ellipsis."""
    if num_columns(text) <= columns:
        return text
    end = used = 0
    for character in text:
        if used + _column(character) > columns - 1:
            break
        used += _column(character)
        end += 1
    return text[:end] + "…"


def fit(text: str, columns: int) -> str:
    """Return the text, shortened or padded on the left to this width."""
    text = shorten(text, columns)
    return " " * (columns - num_columns(text)) + text


def ignoring_overflow(draw: Callable[_P, _R]) -> Callable[_P, _R]:
    """Draw with floating-point errors ignored, whatever the caller has set by `numpy.errstate`."""

    @wraps(draw)
    def quiet(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with np.errstate(all="ignore"):
            return draw(*args, **kwargs)

    return quiet


def _one_head(function: str, array: NDArray[Any], head: int | str | None) -> NDArray[Any]:
    if array.ndim not in (2, 3):
        raise refusal(
            ValueError, function, "weights", f" has shape {array.shape}, but (Sq, Sk) or (H, Sq, Sk) is needed"
        )
    if array.dtype.kind != "f" or array.dtype.itemsize == 2:  # bfloat16's kind is not "f"
        array = array.astype(np.float32 if array.dtype.itemsize == 2 else np.float64)
    if array.ndim == 2:
        if head is not None:
            raise refusal(
                ValueError,
                function,
                "head",
                f" is {head!r}, but ",
                "weights",
                f" has shape {array.shape}, without heads",
            )
        return array
    if head == "mean":
        return np.asarray(array.mean(axis=0))
    if isinstance(head, (int, np.integer)) and not isinstance(head, bool):
        if not -array.shape[0] <= head < array.shape[0]:
            raise refusal(ValueError, function, "head", f" is {head}, but ", "weights", f" has {array.shape[0]} heads")
        return np.asarray(array[head])
    chosen = "" if head is None else f", but head is {head!r}"
    raise refusal(
        ValueError, function, "weights", f' has {array.shape[0]} heads{chosen}: choose one with head=, or head="mean"'
    )


def _mask(function: str, mask: ArrayLike | Mask, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    array = mask.array(*shape[-2:]) if isinstance(mask, Mask) else as_array(function, "mask", mask)
    if array.dtype != bool:
        raise refusal(TypeError, function, "mask", f" has dtype {array.dtype}, but bool is needed, True = attend")
    try:
        return np.broadcast_to(array, shape)
    except ValueError:
        raise refusal(
            ValueError, function, "mask", f" has shape {array.shape}, which does not broadcast to {shape}"
        ) from None


def _names(function: str, name: str, given: Any, wanted: int) -> list[str] | None:
    if given is None:
        return None
    names = _strings(function, name, given)
    if len(names) != wanted:
        raise refusal(ValueError, function, name, f" has {len(names)} entries, but ", "weights", f" has {wanted}")
    return names


def _strings(function: str, name: str, given: Any) -> list[str]:
    try:
        return [visible(str(token)) for token in given]
    except TypeError:
        raise refusal(TypeError, function, name, f" is {given!r}, but a sequence of strings is needed") from None


def _kept(names: list[str] | None, kept: NDArray[np.bool_]) -> list[str] | None:
    return None if names is None else [name for name, keep in zip(names, kept, strict=True) if keep]
