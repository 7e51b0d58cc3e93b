"""The header of a KVCache's memory: the parameters of the cache, and the lengths of its sequences."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from . import _core
from ._errors import refusal
from ._store import Layout

_VERSION = 1
_FIXED = 16  # integers before the lengths: magic, version, description, index of the valid copy of the lengths
_ACTIVE = 9


def header_bytes(batch: int) -> int:
    """Return the size of the header of a cache with `batch` sequences."""
    return (_FIXED + 4 * batch) * 8


class Ledger:
    """Lengths and starts in two copies, of which one is valid. Here they are only read: the core writes them.

    A sequence holds the tokens from its start to its length; without a window the start is 0.
    """

    def __init__(self, memory: NDArray[np.uint8], layout: Layout, window: int | None, cache: object) -> None:
        self.capacity, self.window = layout.slots, window
        self.header = memory[: layout.header_bytes].view(np.int64)
        self.copies = self.header[_FIXED:].reshape(2, 2, layout.pages)
        self._open(_description(layout, -1 if window is None else int(window)), cache)
        self.core = _core.make_ledger(copies=self.copies, active=self.header[_ACTIVE : _ACTIVE + 1])

    def _open(self, description: tuple[int, ...], cache: object) -> None:
        header = self.header
        if header[0] == 0:
            # The process that was creating the cache may have been killed halfway.
            begun = header[1 : len(description)]
            if np.any((begun != 0) & (begun != description[1:])) or header[len(description) :].any():
                raise refusal(ValueError, "KVCache", "buffer", " holds neither a cache nor zeros")
            header[1 : len(description)] = description[1:]
            header[0] = description[0]  # written last: without the magic number, the buffer is not a cache
            return
        if tuple(header[: len(description)].tolist()) != description:
            raise refusal(ValueError, "KVCache", "buffer", f" holds something else than a {cache!r}")
        states = self.copies.copy()
        if header[_ACTIVE] not in (0, 1) or not self.are_possible(states[:, 0], states[:, 1]):
            raise refusal(ValueError, "KVCache", "buffer", " holds a cache whose lengths are impossible")

    def state(self) -> NDArray[np.int64]:
        """Return the valid (lengths, starts). A copy, since the buffer may be shared with another process."""
        state: NDArray[np.int64] = self.copies[int(self.header[_ACTIVE]) & 1].copy()
        for b, (length, start) in enumerate(zip(*state.tolist(), strict=True)):
            if not self._is_possible(length, start):
                raise ValueError(
                    f"KVCache: the cache's buffer says that sequence {b} has the tokens {start} to {length}, "
                    "which is impossible"
                )
        return state

    def are_possible(self, lengths: NDArray[np.int64], starts: NDArray[np.int64]) -> bool:
        """Whether sequences of such a cache can hold such tokens."""
        return all(map(self._is_possible, lengths.ravel().tolist(), starts.ravel().tolist()))

    def _is_possible(self, length: int, start: int) -> bool:
        return _core.is_possible(start, length, self.capacity, self.window is not None)


def _description(layout: Layout, window: int) -> tuple[int, ...]:
    magic, kind = (int.from_bytes(text.ljust(8, b"\0"), "little") for text in (b"selfattn", layout.name.encode()))
    value_dim = -layout.value_dim if layout.prefix else layout.value_dim
    sizes = (layout.pages, layout.heads, layout.head_dim, value_dim, layout.slots)
    return (magic, _VERSION, *sizes, kind, window)
