"""The masks of which others are composed: limits, documents, arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._errors import refusal
from ._mask_nodes import FAR, TILE_KEYS, Bools, Grid, Mask, Seen


class Limit(Mask):
    """A mask that shows each query one interval of keys, whose ends do not decrease from query to query."""

    def interval(self, queries: Any, offset: NDArray[np.int64]) -> tuple[Any, Any]:
        """Return the begin and the end of what the queries see."""
        raise NotImplementedError

    def visible(self, queries: range, keys: range, grid: Grid) -> Bools:
        begin, end = self.interval(_numbers(queries)[:, None], _with_axes(grid.offset, 2))
        own = _numbers(keys)
        return np.asarray((own >= begin) & (own < end))

    def seen(self, queries: range, grid: Grid) -> Seen:
        offset, (first, last) = _with_axes(grid.offset, 1), grid.tiles()
        least_begin, least_end = self.interval(queries[0], offset)
        most_begin, most_end = self.interval(queries[-1], offset)
        return Seen((last >= least_begin) & (first < most_end), (first >= most_begin) & (last < least_end))


class Causal(Limit):
    def __init__(self, offset: int | None) -> None:
        self.offset = offset
        self.positional = offset is None

    def interval(self, queries: Any, offset: NDArray[np.int64]) -> tuple[Any, Any]:
        return -FAR, queries + (offset if self.offset is None else self.offset) + 1

    def __repr__(self) -> str:
        return "causal()" if self.offset is None else f"causal({self.offset})"


class Window(Limit):
    positional = True

    def __init__(self, left: int, right: int) -> None:
        self.left, self.right = left, right  # -1: unbounded

    def interval(self, queries: Any, offset: NDArray[np.int64]) -> tuple[Any, Any]:
        left, right = (min(side, FAR) for side in (self.left, self.right))
        return -FAR if left < 0 else queries + offset - left, FAR if right < 0 else queries + offset + right + 1

    def __repr__(self) -> str:
        left, right = (None if side < 0 else side for side in (self.left, self.right))
        return f"window({left}, {right})"


class Chunk(Limit):
    positional = True

    def __init__(self, size: int) -> None:
        self.size = size

    def interval(self, queries: Any, offset: NDArray[np.int64]) -> tuple[Any, Any]:
        begin = (queries + offset) // self.size * self.size
        return begin, begin + self.size

    def __repr__(self) -> str:
        return f"chunk({self.size})"


class Prefix(Limit):
    def __init__(self, n: int) -> None:
        self.n = n

    def interval(self, queries: Any, offset: NDArray[np.int64]) -> tuple[Any, Any]:
        return -FAR, self.n

    def __repr__(self) -> str:
        return f"prefix({self.n})"


class Documents(Mask):
    """`keys` and `queries` are ids, (S,), or (..., 1, S) with an axis for the heads; `queries` may be `keys`."""

    def __init__(self, keys: NDArray[np.int64], queries: NDArray[np.int64]) -> None:
        self.keys, self.queries = keys, queries
        first = np.arange(0, keys.shape[-1], TILE_KEYS)
        if len(first):
            self._least, self._most = (x.reduceat(keys, first, axis=-1) for x in (np.minimum, np.maximum))

    def visible(self, queries: range, keys: range, grid: Grid) -> Bools:
        own = self.queries[..., queries.start : queries.stop, None]
        return np.asarray(own == self.keys[..., None, keys.start : keys.stop])

    def seen(self, queries: range, grid: Grid) -> Seen:
        own = self.queries[..., queries.start : queries.stop]
        least, most = own.min(axis=-1, keepdims=True), own.max(axis=-1, keepdims=True)
        every = (least == most) & (self._least == self._most) & (least == self._least)
        return Seen((least <= self._most) & (self._least <= most), every)

    def check(self, grid: Grid) -> None:
        for ids, wanted, what in ((self.keys, grid.kv_len, "keys"), (self.queries, grid.q_len, "queries")):
            if ids.shape[-1] != wanted:
                text = f" has the documents of {ids.shape[-1]} {what}, but there are {wanted} {what}"
                hint = ": pass q_ids" if ids is self.keys is self.queries and what == "queries" else ""
                raise refusal(ValueError, grid.function, "mask", text + hint)

    def __repr__(self) -> str:
        own = "" if self.queries is self.keys else f", q_ids=<{_shape(self.queries)}>"
        return f"documents(<{_shape(self.keys)}>{own})"


class Dense(Mask):
    def __init__(self, values: Bools) -> None:
        self.values = values  # (..., queries or 1, keys or 1)

    def visible(self, queries: range, keys: range, grid: Grid) -> Bools:
        rows, columns = (
            slice(None) if size == 1 else slice(part.start, part.stop)
            for size, part in zip(self.values.shape[-2:], (queries, keys), strict=True)
        )
        return self.values[..., rows, columns]

    def seen(self, queries: range, grid: Grid) -> Seen:
        """Promise nothing: the core skips tiles that are hidden, and reads each element once."""
        some = np.ones((*self.values.shape[:-2], len(grid.tiles()[0])), bool)
        return Seen(some, ~some)

    def check(self, grid: Grid) -> None:
        wanted = (grid.q_len, grid.kv_len)
        if any(size not in (1, n) for size, n in zip(self.values.shape[-2:], wanted, strict=True)):
            text = f" has a dense part of shape {self.values.shape}, which does not broadcast to (..., {wanted[0]}, "
            raise refusal(ValueError, grid.function, "mask", f"{text}{wanted[1]})")

    def __repr__(self) -> str:
        return f"dense(<{self.values.shape}>)"


def _numbers(part: range) -> NDArray[np.int64]:
    return np.arange(part.start, part.stop)


def _with_axes(offset: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Return the offset with axes after that of the heads."""
    return offset.reshape(*offset.shape, *[1] * count) if offset.ndim else offset


def _shape(ids: NDArray[np.int64]) -> tuple[int, ...]:
    return ids.shape if ids.ndim == 1 else (*ids.shape[:-2], ids.shape[-1])
