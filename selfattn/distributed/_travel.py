"""Rows that travel: all ranks see the rows of all others, a chunk at a time, in the order of their positions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ._link import Bytes, Link
from ._rows import Owners, Piece

ALIGNMENT = 64
CHUNK_BYTES = 4 << 20  # of one chunk: small in memory, and large enough to send at full speed
MOST_BLOCKS = 8


class Chunk(NamedTuple):
    """The rows of positions start..stop − 1 from all ranks, and the messages of the next chunk, still travelling."""

    start: int
    stop: int
    arrays: list[NDArray[Any]]
    coming: Sequence[Any]


class Travel:
    """One journey of some arrays of rows, with their rows on axis −2; on all ranks they differ in this axis only."""

    def __init__(self, link: Link, function: str, owners: Owners, arrays: Sequence[NDArray[Any]]) -> None:
        self._link, self._function, self._owners, self._arrays = link, function, owners, arrays
        self.row_bytes = sum(_bytes_of(array, 1) for array in arrays)

    def chunks(self, block: int) -> Iterator[Chunk]:
        """Yield all chunks. Their lengths are multiples of `block`, which depend on the shapes alone."""
        blocks = min(max(CHUNK_BYTES // max(self.row_bytes * block, 1), 1), MOST_BLOCKS)
        length, step = self._owners.length, int(blocks * block)
        buffers = (_Memory(), _Memory())
        spans = [(first, min(first + step, length)) for first in range(0, length, step)]
        coming = self._send(buffers[0], *spans[0]) if spans else None
        for i, (start, stop) in enumerate(spans):
            assert coming is not None
            pieces, requests = coming
            self._link.wait(self._function, requests)
            # Only now, when nobody uses the other buffer any more, may the next chunk fill it.
            coming = self._send(buffers[(i + 1) % 2], *spans[i + 1]) if i + 1 < len(spans) else ([], [])
            yield Chunk(start, stop, _joined(pieces), coming[1])

    def _send(self, buffer: _Memory, start: int, stop: int) -> tuple[list[list[NDArray[Any]]], list[Any]]:
        """Start to send the rows of a chunk; return the arrays of each piece, and the messages."""
        pieces = self._owners.between(start, stop)
        sizes = [sum(_bytes_of(array, piece.stop - piece.start) for array in self._arrays) for piece in pieces]
        memory = buffer.of(sum(sizes))
        found, requests, first = [], [], 0
        for piece, size in zip(pieces, sizes, strict=True):
            part = memory[first : first + size]
            first += size
            views = self._views(part, piece)
            if piece.owner == self._link.rank:
                for view, array in zip(views, self._arrays, strict=True):
                    view[...] = array[..., piece.at : piece.at + piece.stop - piece.start, :]
            requests += self._link.broadcast(part, piece.owner)
            found.append(views)
        return found, requests

    def _views(self, memory: Bytes, piece: Piece) -> list[NDArray[Any]]:
        return views_of(memory, self._arrays, piece.stop - piece.start)


class _Memory:
    """Memory that is used again."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)

    def of(self, size: int) -> Bytes:
        """Return this many bytes; what they held before is lost."""
        if len(self._memory) < size:
            self._memory = np.empty(size, np.uint8)
        return self._memory[:size]


def bytes_for(arrays: Sequence[NDArray[Any]], rows: int) -> int:
    """The size of the memory for `views_of`."""
    return sum(_bytes_of(array, rows) for array in arrays)


def views_of(memory: Bytes, arrays: Sequence[NDArray[Any]], rows: int) -> list[NDArray[Any]]:
    """Return arrays like these ones with this number of rows, in this memory."""
    found, first = [], 0
    for array in arrays:
        shape = (*array.shape[:-2], rows, array.shape[-1])
        size = math.prod(shape) * array.dtype.itemsize
        found.append(memory[first : first + size].view(array.dtype).reshape(shape))
        first += _bytes_of(array, rows)
    return found


def _bytes_of(array: NDArray[Any], rows: int) -> int:
    size: int = math.prod(array.shape[:-2]) * rows * array.shape[-1] * array.dtype.itemsize
    return -(-size // ALIGNMENT) * ALIGNMENT


def _joined(pieces: list[list[NDArray[Any]]]) -> list[NDArray[Any]]:
    """Return the arrays of all pieces, one after another."""
    if len(pieces) == 1:
        return pieces[0]
    return [np.concatenate(parts, axis=-2) for parts in zip(*pieces, strict=True)]
