"""Which rank has which rows of a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .._arguments import choice, integers, whole_number
from .._errors import refusal

ORDERS = ("zigzag", "contiguous")


class Run(NamedTuple):
    """Consecutive positions start..stop − 1, which are the rows from `at` on of their rank's arrays."""

    start: int
    stop: int
    at: int

    @property
    def rows(self) -> slice:
        """The rows of the rank's arrays."""
        return slice(self.at, self.at + self.stop - self.start)

    def part(self, start: int, stop: int) -> Run:
        """The run of some of these positions."""
        return Run(start, stop, self.at + start - self.start)


class Piece(NamedTuple):
    """Consecutive positions that one rank has, and its rows."""

    owner: int
    start: int
    stop: int
    at: int


def rows_of(function: str, length: Any, order: Any, rank: int, size: int) -> NDArray[np.int64]:
    """Return the positions of a rank's rows."""
    tokens = whole_number(function, "length", length, 0)
    choice(function, "order", order, ORDERS)
    if order == "contiguous":
        return np.arange(rank * tokens // size, (rank + 1) * tokens // size)
    # Early rows see few keys and late rows many: a rank gets one part from the start and its mirror image.
    parts = [(part * tokens // (2 * size), (part + 1) * tokens // (2 * size)) for part in (rank, 2 * size - 1 - rank)]
    return np.concatenate([np.arange(*part) for part in parts])


def runs_of(function: str, rows: Any) -> list[Run]:
    """Return the runs of consecutive positions in an array of positions."""
    positions = integers(function, "rows", rows)
    if positions.ndim != 1:
        raise refusal(ValueError, function, "rows", f" has shape {positions.shape}, but one axis is needed")
    if not positions.size:
        return []
    if np.min(positions) < 0:
        raise refusal(ValueError, function, "rows", f" holds {np.min(positions)}, but positions start at 0")
    cuts = np.flatnonzero(np.diff(positions) != 1) + 1
    return [
        Run(int(positions[a]), int(positions[b - 1]) + 1, int(a))
        for a, b in zip([0, *cuts], [*cuts, len(positions)], strict=True)
    ]


class Owners:
    """The runs of all ranks, which cover every position of a sequence once."""

    def __init__(self, function: str, runs: Sequence[Sequence[Run]]) -> None:
        self.runs = [list(map(Run._make, own)) for own in runs]
        pieces = [Piece(rank, *run) for rank, own in enumerate(self.runs) for run in own]
        self.pieces = sorted(pieces, key=lambda piece: piece.start)
        end, last = 0, 0
        for piece in self.pieces:
            if piece.start > end:
                raise refusal(ValueError, function, "rows", f" leave a gap: no rank has position {end}")
            if piece.start < end:
                both = f"ranks {last} and {piece.owner}" if last != piece.owner else f"rank {last} twice"
                raise refusal(ValueError, function, "rows", f" overlap: position {piece.start} is on {both}")
            end, last = piece.stop, piece.owner
        self.length = end

    def count(self, rank: int) -> int:
        """The number of rows of a rank."""
        return sum(run.stop - run.start for run in self.runs[rank])

    def between(self, first: int, stop: int) -> list[Piece]:
        """Return the pieces of the positions first..stop − 1, in their order."""
        found = []
        for owner, start, end, at in self.pieces:
            a, b = max(start, first), min(end, stop)
            if a < b:
                found.append(Piece(owner, a, b, at + a - start))
        return found
