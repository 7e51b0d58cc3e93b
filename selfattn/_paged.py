"""A cache of keys and values in pages that sequences share."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _core
from ._arguments import as_array, integers
from ._cache import AnyCache, Step
from ._lock import SharedLock
from ._pages import Move, PageTable
from ._store import Layout, Store, count, storage_name


class PagedKVCache(AnyCache):
    """Keys and values of any number of sequences, in pages of a fixed number of tokens.

    A sequence takes a page when it needs one and gives it back when it ends, so that nothing is reserved for tokens
    that may never come; forks share the pages of their common prefix until one of them writes to it.

    Parameters
    ----------
    num_pages, page_size : int
        Pages, and tokens of a page.
    num_kv_heads, head_dim : int
        Heads of k and v, size of k's heads.
    value_dim : int, optional
        Size of v's heads; default head_dim.
    dtype : {"float32", "float16", "bfloat16", "int8", "float64"} or dtype
        How tokens are stored, see `KVCache`.
    window : int, optional
        The farthest that any query will look to the left: pages that no query can see any more are released when
        tokens are appended.
    buffer : buffer, optional
        Writeable memory of at least ``PagedKVCache.buffer_size(...)`` bytes for the tokens. Which page belongs to whom
        is kept in this object, not there.

    Attributes
    ----------
    num_pages, page_size, num_kv_heads, head_dim, value_dim, window : int
    nbytes : int

    Notes
    -----
    Calls from several threads wait for each other: many read or one writes. The idea is that of Kwon et al., "Efficient
    memory management for large language model serving with PagedAttention" (2023).

    Examples
    --------
    >>> import numpy as np
    >>> import selfattn as sa
    >>> rng = np.random.default_rng(0)
    >>> cache = sa.PagedKVCache(num_pages=100, page_size=16, num_kv_heads=2, head_dim=8)
    >>> prompt = cache.allocate()
    >>> k, v = rng.standard_normal((2, 2, 40, 8), dtype=np.float32)
    >>> cache.append(prompt, k, v)
    >>> answers = [cache.fork(prompt) for _ in range(3)]
    >>> cache.num_free_pages
    97
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        value_dim: int | None = None,
        dtype: Any = "float32",
        window: int | None = None,
        buffer: Any = None,
    ) -> None:
        layout = _layout(num_pages, page_size, num_kv_heads, head_dim, value_dim, dtype)
        self.num_pages, self.num_kv_heads, self.page_size = layout.blocks, layout.heads, layout.slots
        self.head_dim, self.value_dim = layout.head_dim, layout.value_dim
        self.window = None if window is None else count("PagedKVCache", "window", window, least=0)
        self._store = Store("PagedKVCache", layout, buffer)
        self._lock = SharedLock()
        self._table = PageTable(self.num_pages, self.page_size)
        self._rows: dict[int, int] = {}  # of live sequences
        self._next = 0

    @staticmethod
    def buffer_size(
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        value_dim: int | None = None,
        dtype: Any = "float32",
        window: int | None = None,
    ) -> int:
        """Return the bytes that a buffer for such a cache must have; the window does not matter."""
        return _layout(num_pages, page_size, num_kv_heads, head_dim, value_dim, dtype).nbytes()

    def __repr__(self) -> str:
        return (
            f"PagedKVCache(num_pages={self.num_pages}, page_size={self.page_size}, num_kv_heads={self.num_kv_heads}, "
            f"head_dim={self.head_dim}, value_dim={self.value_dim}, dtype={self._store.name!r}, window={self.window})"
        )

    @property
    def num_free_pages(self) -> int:
        """Pages that no sequence has."""
        return len(self._table.free_pages)

    @property
    def sequences(self) -> tuple[int, ...]:
        """The ids of the live sequences, oldest first."""
        return tuple(self._rows)

    def allocate(self) -> int:
        """Return the id of a new, empty sequence. Ids are never used again."""
        with self._lock.writing:
            return self._name(self._table.add_row())

    def length(self, sequence: int) -> int:
        """Return how many tokens a sequence has."""
        return self._table.lengths[self._row("length", sequence)]

    def append(self, sequence: int, k: ArrayLike, v: ArrayLike) -> None:
        """Append T tokens to a sequence.

        Parameters
        ----------
        sequence : int
        k : array_like, shape (num_kv_heads, T, head_dim)
        v : array_like, shape (num_kv_heads, T, value_dim)
            Of one floating dtype; rounded to the storage type.

        Raises
        ------
        MemoryError
            There are not enough free pages. Every sequence is as it was; so it is after any other error.
        """
        k, v = (as_array("append", name, x) for name, x in (("k", k), ("v", v)))
        for name, x, width in (("k", k, self.head_dim), ("v", v, self.value_dim)):
            wanted = (self.num_kv_heads, k.shape[1] if k.ndim == 3 else 0, width)
            if x.shape != wanted:
                raise ValueError(f"append: {name} has shape {x.shape}, but this cache and call need {wanted}")
        self._run("append", (sequence,), k.shape[1], lambda step: _core.append("append", step.core, k[None], v[None]))

    def fork(self, sequence: int) -> int:
        """Return the id of a new sequence that starts as a copy of this one and shares its pages."""
        with self._lock.writing:
            return self._name(self._table.fork(self._row("fork", sequence)))

    def truncate(self, sequence: int, length: int) -> None:
        """Take back the newest tokens, so that `length` remain; pages without tokens are released."""
        length = count("truncate", "length", length, least=0)
        with self._lock.writing:
            row, table = self._row("truncate", sequence), self._table
            old, start = table.lengths[row], table.starts[row]
            if length > old:
                raise ValueError(f"truncate: length is {length}, but sequence {sequence} has {old} tokens")
            if self.window is not None and length > 0 and start > max(length - self.window, 0):
                raise ValueError(
                    f"truncate: length is {length}, but sequence {sequence} has no tokens before {start} any more, of "
                    f"which a window of {self.window} would see some"
                )
            table.shorten(row, length)

    def free(self, sequence: int) -> None:
        """End a sequence; pages that no other shares become free."""
        with self._lock.writing:
            self._table.remove_row(self._row("free", sequence))
            del self._rows[sequence]

    def _name(self, row: int) -> int:
        self._next += 1
        self._rows[self._next - 1] = row
        return self._next - 1

    def _row(self, function: str, sequence: Any) -> int:
        known = isinstance(sequence, (int, np.integer)) and not isinstance(sequence, bool)
        row = self._rows.get(int(sequence)) if known else None
        if row is None:
            raise ValueError(f"{function}: sequence {sequence!r} is not live")
        return row

    def _begin(self, function: str, sequences: Any, tokens: int) -> Step:
        if sequences is None:
            raise ValueError(f"{function}: sequences is missing: a PagedKVCache needs one id per row of q")
        rows = [self._row(function, s) for s in _ids(function, sequences)]
        table = self._table
        moves: list[Move] = []
        if tokens and rows:
            if len(set(rows)) < len(rows):
                raise ValueError(
                    f"{function}: sequences holds {list(sequences)}, but tokens can be appended to each once"
                )
            needed, copied = table.missing(rows, tokens)
            if needed > len(table.free_pages):
                raise MemoryError(f"{function}: {needed} pages are needed, but {len(table.free_pages)} are free")
            if needed:
                try:
                    table.reserve(rows, tokens, copied, moves)
                    for move in moves[: len(copied)]:
                        for array in self._store.arrays():
                            array[move.new] = array[move.old]
                except BaseException:
                    table.take_back(moves)
                    raise
        before = [table.lengths[row] for row in rows]
        lengths = np.array(before, np.int64)
        starts = None if self.window is None else np.array([table.starts[row] for row in rows], np.int64)
        core = (*self._store.core, self.page_size, table.table, np.array(rows, np.int64), lengths, starts)
        return Step(core, (rows, tokens, moves, before))

    def _commit(self, step: Step) -> None:
        rows, tokens, _, _ = step.state
        table = self._table
        for row in rows if tokens else ():
            if self.window is not None:
                # What the tokens just appended see stays, so that they can be taken back.
                table.forget(row, max(table.lengths[row] - self.window, 0))
            table.lengths[row] += tokens

    def _bounds(self, step: Step) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return step.core[-2:]

    def _roll_back(self, step: Step) -> None:
        rows, _, moves, before = step.state
        for row, length in zip(rows, before, strict=True):
            self._table.lengths[row] = length
        self._table.take_back(moves)

    def _common_tokens(self, step: Step) -> int:
        return self._table.common(step.state[0]) * self.page_size


def _ids(function: str, sequences: Any) -> list[int]:
    if isinstance(sequences, (list, tuple)) and not sequences:
        return []
    ids = integers(function, "sequences", sequences)
    if ids.ndim != 1:
        raise ValueError(f"{function}: sequences has shape {ids.shape}, but one id per row is needed")
    return ids.tolist()  # type: ignore[no-any-return]


def _layout(num_pages: Any, page_size: Any, num_kv_heads: Any, head_dim: Any, value_dim: Any, dtype: Any) -> Layout:
    function = "PagedKVCache"
    name = storage_name(function, dtype)
    pages, size = count(function, "num_pages", num_pages), count(function, "page_size", page_size)
    heads, width = count(function, "num_kv_heads", num_kv_heads), count(function, "head_dim", head_dim)
    return Layout(
        name, pages, heads, size, width, width if value_dim is None else count(function, "value_dim", value_dim)
    )
