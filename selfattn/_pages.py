"""The page table: the pages of each sequence, how many sequences share a page, and which pages are free.

The rows are authoritative. The number of rows that share each page and the list of free pages are derived from the
rows. Both are updated with every change, and recomputed if a change failed halfway, for example because of an
interrupt. Tokens are not stored here.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

from ._core import PagedRow

NUMBER = "i"  # the array type of page numbers, as the core reads them
assert array(NUMBER).itemsize == 4


class Growth(NamedTuple):
    """Rows with room for more tokens, and the changes that come with them. The core adds the tokens to the lengths."""

    before: dict[int, PagedRow]
    lengths: list[int]  # lengths of the rows in `before`
    rows: dict[int, PagedRow]  # the rows of `before` themselves if nothing else changes
    taken: int = 0  # number of pages taken from the end of the free list
    gained: Sequence[int] = ()
    lost: Sequence[int] = ()
    copies: Sequence[tuple[int, int]] = ()  # (page shared with other rows, page for its copy)
    reused: Sequence[int] = ()  # pages that will be written to, but also belong to rows of `before`


def is_count(value: Any) -> bool:
    """Whether a value from a pickle can be a length or an id."""
    return type(value) is int and 0 <= value < 1 << 61


class PageTable:
    """A row for each sequence. Each page is either free or has a count of the rows that hold it.

    A row is replaced rather than changed, so that the old row can be restored; only the core changes a row's length. A
    row's array may have more pages than its tokens need: the row shares the array with the row that replaces it, and a
    step appends new pages to this array.

    Uses Python's own integers: accessed one by one, they are faster than NumPy's.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.page_size = page_size
        self.rows: dict[int, PagedRow] = {}
        self.sharers = [0] * num_pages
        self.free_pages = list(range(num_pages - 1, -1, -1))
        self.settled = True  # whether sharers and free_pages agree with the rows

    def runs(self, length: int) -> int:
        """Return how many pages `length` tokens span."""
        return -(-length // self.page_size)

    def count(self, row: PagedRow) -> int:
        """Return how many pages a row holds."""
        return self.runs(row.length) - row.start // self.page_size

    def held(self, row: PagedRow) -> array[int]:
        """Return the pages that a row holds, as a copy."""
        return row.pages[: self.count(row)]

    def row_of(self, description: Any, there: set[int]) -> PagedRow | None:
        """Return the row that a pickle describes; None if it is impossible or has a page that is not in `there`."""
        try:
            length, start, held = description
            row = PagedRow(pages=array(NUMBER, held), start=start, length=length)
            sound = is_count(length) and is_count(start) and start <= length and start % self.page_size == 0
            sound = sound and len(held) == self.count(row) == len(set(held)) and there.issuperset(held)
        except (TypeError, ValueError, OverflowError):
            return None
        return row if sound else None

    def settle(self) -> None:
        """Recount the pages if the last change was interrupted."""
        if not self.settled:
            self.recount()

    def recount(self) -> None:
        """Recompute from the rows how many of them hold each page."""
        self.settled = False
        sharers = [0] * len(self.sharers)
        for row in self.rows.values():
            for page in self.held(row):
                sharers[page] += 1
        self.sharers = sharers
        self.free_pages = [page for page in range(len(sharers) - 1, -1, -1) if not sharers[page]]
        self.settled = True

    def put(self, rows: Mapping[int, PagedRow | None], gained: Iterable[int] = (), lost: Iterable[int] = ()) -> None:
        """Replace rows, or delete a row where None is given; after an exception nothing has changed."""
        before = {name: self.rows.get(name) for name in rows}
        try:
            self.settled = False
            self._set(rows)
            self._move(gained, lost)
        except BaseException:
            self.restore(before)
            raise

    def _move(self, gained: Iterable[int], lost: Iterable[int], taken: int = 0) -> None:
        """Count each page in `gained` for one more row, each in `lost` for one fewer; `taken` pages were free."""
        if taken:
            del self.free_pages[-taken:]
        for page in gained:
            self.sharers[page] += 1
        for page in lost:
            self.sharers[page] -= 1
            if not self.sharers[page]:
                self.free_pages.append(page)
        self.settled = True

    def restore(self, before: Mapping[int, PagedRow | None]) -> None:
        """Restore the rows of an earlier state."""
        if not self.settled or any(self.rows.get(name) is not row for name, row in before.items()):
            self.settled = False
            self._set(before)
            self.recount()

    def _set(self, rows: Mapping[int, PagedRow | None]) -> None:
        for name, row in rows.items():
            if row is None:
                self.rows.pop(name, None)
            else:
                self.rows[name] = row

    def fork(self, name: int, twin: int) -> None:
        """Add a row that shares all pages of another."""
        row = self.rows[name]
        pages = self.held(row)
        self.put({twin: PagedRow(pages=pages, start=row.start, length=row.length)}, gained=pages)

    def shorten(self, name: int, length: int) -> None:
        """Cut a row to `length` tokens and release the pages after them."""
        row = self.rows[name]
        shorter = PagedRow(pages=row.pages, start=row.start if length else 0, length=length)
        kept = self.count(shorter)
        self.put({name: shorter}, lost=self.held(row)[kept:])
        del row.pages[kept:]

    def remove(self, name: int) -> None:
        """Delete a row and release its pages."""
        self.put({name: None}, lost=self.held(self.rows[name]))

    def grow(self, function: str, names: list[int], tokens: int, window: int | None) -> Growth:
        """Plan room for `tokens` more tokens in each row; the table does not change yet.

        With a window, each row releases the pages that none of the new tokens sees. These pages are reused if there are
        not enough free ones.
        """
        before = {name: self.rows[name] for name in names}
        lengths = [row.length for row in before.values()]
        if self._have_room(before, tokens, window):
            return Growth(before, lengths, before)
        skipped = dict.fromkeys(names, 0)
        lost: list[int] = []
        if window is not None:
            skipped = {name: self._unseen(row, window) for name, row in before.items()}
            lost = [page for name, row in before.items() for page in row.pages[: skipped[name]]]
        left: dict[int, int] = {}
        needed, copied = self._missing(before, tokens, left)
        given: list[int] = []
        if needed > len(self.free_pages) and lost:
            left = {}
            for page in lost:
                left[page] = left.get(page, self.sharers[page]) - 1
            given = [page for page, sharers in left.items() if not sharers]
            needed, copied = self._missing(before, tokens, left)
            reusable = set(lost)
        else:
            reusable = set()
        there = len(self.free_pages)
        if needed > there + len(given):
            raise MemoryError(f"{function}: {needed} pages are needed, but {there + len(given)} are free")
        taken = min(needed, there)
        gained = [*self.free_pages[there - taken :][::-1], *given[: needed - taken]]
        fresh = iter(gained)
        rows: dict[int, PagedRow] = {}
        copies: list[tuple[int, int]] = []
        reused: list[int] = []
        for name, row in before.items():
            pages = self._extended(row, skipped[name], copies if name in copied else None, tokens, fresh)
            start = row.start + skipped[name] * self.page_size
            rows[name] = PagedRow(pages=pages, start=start, length=row.length)
            if reusable:
                written = pages[(row.length - start) // self.page_size :]
                reused.extend(page for page in written if page in reusable)
        lost.extend(page for page, _ in copies)
        return Growth(before, lengths, rows, taken, gained, lost, copies, reused)

    def _have_room(self, rows: dict[int, PagedRow], tokens: int, window: int | None) -> bool:
        """Whether each row has room in its last page, shares this page with no other row, and keeps all of its pages.

        This holds for nearly all steps that append a token, and the check is fast.
        """
        size = self.page_size
        for row in rows.values():
            length = row.length
            filled = length % size
            if not 0 < filled <= size - tokens or self.sharers[row.pages[length // size - row.start // size]] > 1:
                return False
            if window is not None and self._unseen(row, window):
                return False
        return True

    def claim(self, growth: Growth) -> None:
        """Give the rows of a growth their room, before the core stores tokens there."""
        if growth.rows is not growth.before:
            self.settled = False
            self.rows.update(growth.rows)

    def commit(self, growth: Growth) -> None:
        """Count the pages of a growth whose tokens the core has stored."""
        if growth.rows is not growth.before:
            self._move(growth.gained, growth.lost, growth.taken)

    def undo(self, growth: Growth) -> None:
        """Restore the rows as they were before a growth, of which any part may have happened."""
        for row, length in zip(growth.before.values(), growth.lengths, strict=True):
            row.length = length
        self.restore(growth.before)

    def _extended(
        self, row: PagedRow, skipped: int, copies: list[tuple[int, int]] | None, tokens: int, fresh: Iterator[int]
    ) -> array[int]:
        count = self.count(row)
        pages = row.pages
        if skipped or copies is not None:
            pages = pages[skipped:count]
        else:
            del pages[count:]  # left over from a failed step
        if copies is not None:
            copies.append((pages[-1], next(fresh)))
            pages[-1] = copies[-1][1]
        pages.extend(islice(fresh, self.runs(row.length + tokens) - self.runs(row.length)))
        return pages

    def _unseen(self, row: PagedRow, window: int) -> int:
        """Return how many pages hold no token that the next token sees."""
        return max((row.length - window) // self.page_size - row.start // self.page_size, 0)

    def _missing(self, rows: dict[int, PagedRow], tokens: int, left: dict[int, int]) -> tuple[int, set[int]]:
        """Return how many pages `tokens` more tokens per row need, and the rows whose last page must be copied.

        `left`: for pages that some of the rows release, how many rows still share them afterwards.
        """
        size, pages, copied = self.page_size, 0, set()
        # Shortest first: the last row to hold a shared page writes to it in place, after the tokens of the others.
        for name, row in sorted(rows.items(), key=lambda item: item[1].length):
            pages += self.runs(row.length + tokens) - self.runs(row.length)
            if row.length % size:
                page = row.pages[self.count(row) - 1]
                sharers = left.get(page, self.sharers[page])
                if sharers > 1:
                    left[page] = sharers - 1
                    copied.add(name)
        return pages + len(copied), copied

    def common(self, rows: list[PagedRow]) -> int:
        """Return how many leading pages all rows share."""
        shared = 0
        if any(row.start for row in rows):
            return 0
        for pages in zip(*(row.pages for row in rows), strict=False):
            if any(page != pages[0] for page in pages):
                break
            shared += 1
        return shared
