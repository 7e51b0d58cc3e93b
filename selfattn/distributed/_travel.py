"""Rows that travel: all ranks see the rows of all others, a chunk at a time, in the order of their positions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ._call import Call
from ._link import Bytes, Link
from ._rows import Piece

ALIGNMENT = 64
CHUNK_BYTES = 4 << 20  # of one chunk: small in memory, and large enough to send at full speed
MOST_BLOCKS = 8

# Whether a rank wants the rows of positions start..stop − 1.
Wants = Callable[[int, int, int], bool]


class Chunk(NamedTuple):
    """The rows of positions start..stop − 1 from all ranks, and messages that are still travelling."""

    start: int
    stop: int
    arrays: list[NDArray[Any]]
    coming: Sequence[Any]


class Travel:
    """One journey of some arrays of rows, with their rows on axis −2; on all ranks they differ in this axis only."""

    def __init__(self, link: Link, call: Call, arrays: Sequence[NDArray[Any]], block: int, wants: Wants) -> None:
        """Cut positions into chunks: multiples of `block`, which depend on the shapes alone."""
        self._link, self._call, self._arrays, self._wants = link, call, arrays, wants
        row_bytes = sum(_bytes_of(array, 1) for array in arrays)
        blocks = min(max(CHUNK_BYTES // max(row_bytes * block, 1), 1), MOST_BLOCKS)
        length, step = call.owners.length, int(blocks * block)
        self.spans = [(first, min(first + step, length)) for first in range(0, length, step)]

    def chunks(self) -> Iterator[Chunk]:
        """Yield the chunks that this rank wants."""
        sent, leaving = self._send()
        buffers, whole = (_Memory(), _Memory()), _Memory()
        spans = [span for span in self.spans if self._wants(self._link.rank, *span)]
        coming = self._receive(buffers[0], *spans[0]) if spans else ([], [])
        for i, (start, stop) in enumerate(spans):
            pieces, requests = coming
            self._link.wait(self._call.function, requests)
            # The next chunk may fill the other buffer only now, when that buffer is no longer used.
            coming = self._receive(buffers[(i + 1) % 2], *spans[i + 1]) if i + 1 < len(spans) else ([], [])
            yield Chunk(start, stop, self._joined(pieces, whole, stop - start), [*coming[1], *leaving])
        self._link.wait(self._call.function, sent)

    def _send(self) -> tuple[list[Any], list[Any]]:
        """Start to send all of this rank's rows; return the messages, and those that go to other machines.

        MPI moves the latter only while somebody asks for them; ranks of this machine fetch theirs.
        """
        sent: list[Any] = []
        leaving: list[Any] = []
        for start, stop in self.spans:
            for piece in self._call.owners.between(start, stop):
                receivers = self._receivers(piece.owner, start, stop) if piece.owner == self._link.rank else []
                if receivers:
                    rows = piece.stop - piece.start
                    memory = np.empty(bytes_for(self._arrays, rows), np.uint8)
                    for view, own in zip(views_of(memory, self._arrays, rows), self._own(piece), strict=True):
                        view[...] = own
                    requests = self._link.spread(memory, piece.owner, receivers, piece.start)
                    sent += requests
                    leaving += requests if self._link.leaves(receivers) else []
        return sent, leaving

    def _receive(self, buffer: _Memory, start: int, stop: int) -> tuple[list[list[NDArray[Any]]], list[Any]]:
        """Start to receive the rows of a chunk; return the arrays of each piece, and the messages."""
        pieces = self._call.owners.between(start, stop)
        foreign = [piece for piece in pieces if piece.owner != self._link.rank]
        sizes = {piece: bytes_for(self._arrays, piece.stop - piece.start) for piece in foreign}
        memory, first = buffer.of(sum(sizes.values())), 0
        found, requests = [], []
        for piece in pieces:
            if piece not in sizes:
                found.append(self._own(piece))
                continue
            part = memory[first : first + sizes[piece]]
            first += sizes[piece]
            found.append(views_of(part, self._arrays, piece.stop - piece.start))
            requests += self._link.spread(part, piece.owner, self._receivers(piece.owner, start, stop), piece.start)
        return found, requests

    def _joined(self, pieces: list[list[NDArray[Any]]], memory: _Memory, rows: int) -> list[NDArray[Any]]:
        """Return the arrays of all pieces, one after another."""
        if len(pieces) == 1:
            return pieces[0]
        found = views_of(memory.of(bytes_for(self._arrays, rows)), self._arrays, rows)
        for parts, array in zip(zip(*pieces, strict=True), found, strict=True):
            np.concatenate(parts, axis=-2, out=array)
        return found

    def _own(self, piece: Piece) -> list[NDArray[Any]]:
        return [array[..., piece.at : piece.at + piece.stop - piece.start, :] for array in self._arrays]

    def _receivers(self, owner: int, start: int, stop: int) -> list[int]:
        return [rank for rank in range(self._link.size) if rank != owner and self._wants(rank, start, stop)]


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
