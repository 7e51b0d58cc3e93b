"""Which page holds what: tables of sequences, counts of sharers, free pages. No tokens here."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

NOWHERE = -1  # a run whose page was released


class Move(NamedTuple):
    """One entry of a table that a reservation changed."""

    row: int
    run: int
    old: int  # the page that it shares with others and has a copy of now, or NOWHERE
    new: int


class PageTable:
    """Rows of page numbers, one row per sequence; a page is free, or counts the rows that it is in."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.page_size = page_size
        self.pages = np.full((4, 4), NOWHERE, np.int32)  # [row][run]
        self.lengths = np.zeros(4, np.int64)
        self.starts = np.zeros(4, np.int64)
        self.sharers = np.zeros(num_pages, np.int32)
        self.free_pages = list(range(num_pages - 1, -1, -1))
        self.free_rows = [3, 2, 1, 0]

    def add_row(self) -> int:
        """Return the row of a new, empty sequence."""
        if not self.free_rows:
            rows = len(self.pages)
            self.pages = _grown(self.pages, 2 * rows, self.pages.shape[1])
            self.lengths, self.starts = (np.concatenate([x, np.zeros_like(x)]) for x in (self.lengths, self.starts))
            self.free_rows = list(range(2 * rows - 1, rows - 1, -1))
        row = self.free_rows.pop()
        self.pages[row] = NOWHERE
        self.lengths[row] = self.starts[row] = 0
        return row

    def remove_row(self, row: int) -> None:
        """Give back the row and its pages."""
        self.release(row, 0, self.runs(int(self.lengths[row])))
        self.lengths[row] = self.starts[row] = 0
        self.free_rows.append(row)

    def fork(self, row: int) -> int:
        """Return a new row that shares all pages."""
        twin = self.add_row()
        self.pages[twin] = self.pages[row]
        self.lengths[twin], self.starts[twin] = self.lengths[row], self.starts[row]
        shared = self.pages[row]
        self.sharers[shared[shared != NOWHERE]] += 1
        return twin

    def runs(self, length: int) -> int:
        """Return how many pages so many tokens span."""
        return -(-length // self.page_size)

    def release(self, row: int, first: int, end: int) -> None:
        """Take the row off the pages of its runs [first, end)."""
        for run in range(first, end):
            page = int(self.pages[row, run])
            if page == NOWHERE:
                continue
            self.pages[row, run] = NOWHERE
            self.sharers[page] -= 1
            if self.sharers[page] == 0:
                self.free_pages.append(page)

    def missing(self, rows: NDArray[np.int64], tokens: int) -> tuple[int, list[tuple[int, int]]]:
        """Return how many pages so many tokens more of each row take, and the (row, run) that must be copied first."""
        lengths = self.lengths[rows]
        new_pages = int(np.sum((lengths + tokens + self.page_size - 1) // self.page_size)) - int(
            np.sum((lengths + self.page_size - 1) // self.page_size)
        )
        copies: list[tuple[int, int]] = []
        last = self.pages[rows, (lengths - 1) // self.page_size]
        partial = lengths % self.page_size != 0
        if tokens and np.any(self.sharers[last[partial]] > 1):
            sharers: dict[int, int] = {}
            for row, page, shared in zip(rows.tolist(), last.tolist(), partial.tolist(), strict=True):
                # Whoever is left with a page alone may write to it.
                if shared and sharers.setdefault(page, int(self.sharers[page])) > 1:
                    sharers[page] -= 1
                    copies.append((row, int(self.lengths[row] - 1) // self.page_size))
        return new_pages + len(copies), copies

    def reserve(self, rows: NDArray[np.int64], tokens: int, copies: list[tuple[int, int]]) -> list[Move]:
        """Give each row the pages for so many tokens more; there must be enough free ones."""
        moves = []
        for row, run in copies:
            old, new = int(self.pages[row, run]), self._take()
            self.sharers[old] -= 1
            self.pages[row, run] = new
            moves.append(Move(row, run, old, new))
        lengths = self.lengths[rows]
        first, end = (-(-n // self.page_size) for n in (lengths, lengths + tokens))
        most = int(end.max(initial=0))
        if most > self.pages.shape[1]:
            self.pages = _grown(self.pages, len(self.pages), max(most, 2 * self.pages.shape[1]))
        for i in np.flatnonzero(end > first).tolist():
            row = int(rows[i])
            for run in range(int(first[i]), int(end[i])):
                self.pages[row, run] = self._take()
                moves.append(Move(row, run, NOWHERE, int(self.pages[row, run])))
        return moves

    def take_back(self, moves: list[Move]) -> None:
        """Undo a reservation."""
        for row, run, old, new in reversed(moves):
            self.pages[row, run] = old
            self.sharers[new] = 0
            self.free_pages.append(new)
            if old != NOWHERE:
                self.sharers[old] += 1

    def _take(self) -> int:
        page = self.free_pages.pop()
        self.sharers[page] = 1
        return page


def _grown(table: NDArray[Any], rows: int, columns: int) -> NDArray[Any]:
    larger = np.full((rows, columns), NOWHERE, table.dtype)
    larger[: table.shape[0], : table.shape[1]] = table
    return larger
