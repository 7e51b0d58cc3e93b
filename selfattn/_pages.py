"""Which page holds what: the pages of each sequence, how many share one, which are free. No tokens here."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

NOWHERE = -1  # in the place of a page that was released


class Move(NamedTuple):
    """A page that a reservation gave to a row."""

    row: int
    run: int
    old: int  # the page that it shares with others and has a copy of now, or NOWHERE
    new: int


class PageTable:
    """Rows of page numbers, one row per sequence. A page is free, or counts the rows that hold it.

    Numbers are Python's own, which are faster than NumPy's one by one; `table` repeats them for the core.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.page_size = page_size
        self.held: list[list[int]] = []
        self.lengths: list[int] = []
        self.starts: list[int] = []  # first token that is still held
        self.sharers = [0] * num_pages
        self.free_pages = list(range(num_pages - 1, -1, -1))
        self.free_rows: list[int] = []
        self.table = np.full((4, 4), NOWHERE, np.int32)

    def add_row(self) -> int:
        """Return the row of a new, empty sequence."""
        if not self.free_rows:
            row = len(self.held)
            self._fit(row + 1, 0)  # first: without memory there is no new row
            self.held.append([])
            self.lengths.append(0)
            self.starts.append(0)
            self.free_rows.append(row)
        return self.free_rows.pop()

    def remove_row(self, row: int) -> None:
        """Give back the row and its pages."""
        self.shorten(row, 0)
        self.free_rows.append(row)

    def fork(self, row: int) -> int:
        """Return a new row that shares all pages."""
        twin = self.add_row()
        pages = self.held[row]
        self.held[twin] = pages.copy()
        self.table[twin, : len(pages)] = pages
        self.lengths[twin], self.starts[twin] = self.lengths[row], self.starts[row]
        for page in pages:
            if page != NOWHERE:
                self.sharers[page] += 1
        return twin

    def shorten(self, row: int, length: int) -> None:
        """Give back the pages behind so many tokens."""
        pages, kept = self.held[row], self.runs(length)
        for page in pages[kept:]:
            self._leave(page)
        del pages[kept:]
        self.lengths[row] = length
        if length == 0:
            self.starts[row] = 0

    def forget(self, row: int, token: int) -> None:
        """Give back the pages that hold no token from this one on."""
        first, end = self.starts[row] // self.page_size, token // self.page_size
        for run in range(first, end):
            self._leave(self.held[row][run])
            self.held[row][run] = NOWHERE
            self.table[row, run] = NOWHERE
        self.starts[row] = max(self.starts[row], end * self.page_size)

    def runs(self, length: int) -> int:
        """Return how many pages so many tokens span."""
        return -(-length // self.page_size)

    def missing(self, rows: list[int], tokens: int) -> tuple[int, list[int]]:
        """Return how many pages so many tokens more of each row take, and the rows whose last page is shared."""
        size, pages, copied = self.page_size, 0, []
        left: dict[int, int] = {}  # sharers of pages that some have a copy of by then
        # Shortest first: whoever is left with a page alone may write to it, and does so behind what others have there.
        for row in sorted(rows, key=self.lengths.__getitem__):
            length = self.lengths[row]
            pages += -(-(length + tokens) // size) - -(-length // size)
            if length % size:
                page = self.held[row][-1]
                if left.get(page, self.sharers[page]) > 1:
                    left[page] = left.get(page, self.sharers[page]) - 1
                    copied.append(row)
        return pages + len(copied), copied

    def reserve(self, rows: list[int], tokens: int, copied: list[int], moves: list[Move]) -> None:
        """Give each row the pages for so many tokens more, and note them; there must be enough free ones."""
        self._fit(len(self.held), max(self.runs(self.lengths[row] + tokens) for row in rows))
        for row in copied:
            run, old, new = len(self.held[row]) - 1, self.held[row][-1], self._take()
            self.sharers[old] -= 1
            self.held[row][run] = self.table[row, run] = new
            moves.append(Move(row, run, old, new))
        for row in rows:
            for run in range(len(self.held[row]), self.runs(self.lengths[row] + tokens)):
                new = self._take()
                self.held[row].append(new)
                self.table[row, run] = new
                moves.append(Move(row, run, NOWHERE, new))

    def take_back(self, moves: list[Move]) -> None:
        """Undo a reservation."""
        for row, run, old, new in reversed(moves):
            self.sharers[new] = 0
            self.free_pages.append(new)
            self.table[row, run] = old
            if old == NOWHERE:
                self.held[row].pop()
            else:
                self.held[row][run] = old
                self.sharers[old] += 1

    def common(self, rows: list[int]) -> int:
        """Return how many pages from the start on all rows share."""
        shared = 0
        for pages in zip(*(self.held[row] for row in rows), strict=False):
            if pages[0] == NOWHERE or any(page != pages[0] for page in pages):
                break
            shared += 1
        return shared

    def _take(self) -> int:
        page = self.free_pages.pop()
        self.sharers[page] = 1
        return page

    def _leave(self, page: int) -> None:
        if page == NOWHERE:
            return
        self.sharers[page] -= 1
        if self.sharers[page] == 0:
            self.free_pages.append(page)

    def _fit(self, rows: int, runs: int) -> None:
        old = self.table
        if rows <= old.shape[0] and runs <= old.shape[1]:
            return
        shape = [
            have if need <= have else max(need, 2 * have) for need, have in zip((rows, runs), old.shape, strict=True)
        ]
        self.table = np.full(shape, NOWHERE, np.int32)
        self.table[: old.shape[0], : old.shape[1]] = old
