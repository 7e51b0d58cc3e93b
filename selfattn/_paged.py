"""A cache of keys and values in pages that sequences share."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._any_cache import AnyCache, Step
from ._arguments import as_array, integers
from ._core import PagedRow
from ._errors import refusal
from ._keywords import hinted
from ._lock import SharedLock
from ._pages import NUMBER, Growth, PageTable, is_count
from ._store import Layout, Store, count, storage_name
from ._typing import StorageType


@hinted
class PagedKVCache(AnyCache):
    """Keys and values of any number of sequences, in pages of a fixed number of tokens.

    A sequence takes a page when it needs one and releases it when it ends, so no memory is reserved for tokens that may
    never come. Forks share the pages of their common prefix until one of them writes to it.

    Parameters
    ----------
    num_pages, page_size : int
        Number of pages, and number of tokens per page.
    num_kv_heads, head_dim : int
        Number of heads of k and v, and size of k's heads.
    value_dim : int, optional
        Size of v's heads; default head_dim.
    dtype : {"float32", "float16", "bfloat16", "int8", "float64"} or dtype
        Storage type of the tokens, see `KVCache`.
    window : int, optional
        The largest distance, in tokens, that any query will look to the left. Appending releases the pages that no
        query can see any more.
    buffer : buffer, optional
        Writeable memory of at least ``PagedKVCache.buffer_size(...)`` bytes for the tokens. The page table is kept in
        this object, not in the buffer.

    Attributes
    ----------
    num_pages, page_size, num_kv_heads, head_dim, value_dim, window : int
    nbytes : int

    Notes
    -----
    Calls from several threads are synchronized: many readers or one writer. Paged caches are due to Kwon et al.,
    "Efficient memory management for large language model serving with PagedAttention" (2023).

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

    _made_with = ("num_pages", "page_size", "num_kv_heads", "head_dim", "value_dim", "window")
    _made = ("_store", "_lock", "_table", "_next")

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        value_dim: int | None = None,
        dtype: StorageType = "float32",
        window: int | None = None,
        buffer: Any = None,
    ) -> None:
        layout = _layout(num_pages, page_size, num_kv_heads, head_dim, value_dim, dtype)
        self.num_pages, self.num_kv_heads, self.page_size = layout.blocks, layout.heads, layout.slots
        self.head_dim, self.value_dim = layout.head_dim, layout.value_dim
        self.window = None if window is None else count("PagedKVCache", "window", window, least=0)
        self._store = Store("PagedKVCache", layout, self.window, buffer)
        self._lock = SharedLock()
        self._table = PageTable(self.num_pages, self.page_size)
        self._next = 0  # the id of the next sequence

    def _make(self, **arguments: Any) -> None:
        PagedKVCache.__init__(self, **arguments)

    def _contents(self) -> dict[str, Any]:
        rows = {name: (row.length, row.start, self._table.held(row).tolist()) for name, row in self._table.rows.items()}
        pages = sorted({page for _, _, held in rows.values() for page in held})
        tokens = [array[pages] for array in self._store.arrays()]
        return {"next": self._next, "sequences": rows, "pages": np.array(pages, np.int64), "tokens": tokens}

    def _load(self, contents: dict[str, Any]) -> None:
        after, sequences, pages = (contents[name] for name in ("next", "sequences", "pages"))
        if not isinstance(sequences, dict) or not is_count(after):
            raise self._damaged("no sequences by id")
        pages = self._integers("pages", pages, len(pages))
        there = set(pages.tolist())
        if len(there) != len(pages) or not all(0 <= page < self.num_pages for page in there):
            raise self._damaged(f"pages that are not different numbers in 0..{self.num_pages - 1}")
        for name, description in sequences.items():
            if not is_count(name) or name >= after:
                raise self._damaged(f"the id {name!r}, but the next one is {after}")
            row = self._table.row_of(description, there)
            if row is None or (self.window is None and row.start):
                raise self._damaged(f"a sequence {name} that is impossible")
            self._table.rows[name] = row
        self._fill(pages, contents["tokens"])
        self._table.recount()
        self._next = after

    @staticmethod
    def buffer_size(
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        value_dim: int | None = None,
        dtype: StorageType = "float32",
        window: int | None = None,
    ) -> int:
        """Return the bytes that a buffer for such a cache must have; the window does not matter."""
        return _layout(num_pages, page_size, num_kv_heads, head_dim, value_dim, dtype).nbytes()

    @property
    def num_free_pages(self) -> int:
        """Number of pages that belong to no sequence."""
        return len(self._table.free_pages)

    @property
    def sequences(self) -> tuple[int, ...]:
        """The ids of the live sequences, oldest first."""
        return tuple(sorted(self._table.rows))

    def allocate(self) -> int:
        """Return the id of a new, empty sequence. Ids are never reused."""
        with self._lock.writing:
            name = self._new_id()
            self._table.put({name: PagedRow(pages=array(NUMBER), start=0, length=0)})
            return name

    def length(self, sequence: int) -> int:
        """Return how many tokens a sequence has."""
        return self._named("length", sequence)[1].length

    def append(self, sequence: int, k: ArrayLike, v: ArrayLike) -> None:
        """Append T tokens to a sequence.

        Parameters
        ----------
        sequence : int
        k : array_like, shape (num_kv_heads, T, head_dim)
        v : array_like, shape (num_kv_heads, T, value_dim)
            Both in one floating dtype. Tokens are rounded to the storage type.

        Raises
        ------
        MemoryError
            There are not enough free pages. This error, like any other, leaves all sequences unchanged.
        """
        k, v = (as_array("append", name, x) for name, x in (("k", k), ("v", v)))
        for name, x, width in (("k", k, self.head_dim), ("v", v, self.value_dim)):
            wanted = (self.num_kv_heads, k.shape[1] if k.ndim == 3 else 0, width)
            if x.shape != wanted:
                raise refusal(
                    ValueError, "append", name, f" has shape {x.shape}, but this cache and call need {wanted}"
                )
        self._run("append", (sequence,), k.shape[1], lambda step: self._append(step, k[None], v[None]))

    def fork(self, sequence: int) -> int:
        """Return the id of a new sequence that starts as a copy of this one and shares its pages."""
        with self._lock.writing:
            name, _ = self._named("fork", sequence)
            self._table.settle()
            twin = self._new_id()
            self._table.fork(name, twin)
            return twin

    def truncate(self, sequence: int, length: int) -> None:
        """Remove the newest tokens, so that `length` remain; pages without tokens are released."""
        length = count("truncate", "length", length, least=0)
        with self._lock.writing:
            name, row = self._named("truncate", sequence)
            if length > row.length:
                raise refusal(
                    ValueError, "truncate", "length", f" is {length}, but sequence {sequence} has {row.length} tokens"
                )
            if self.window is not None and length > 0 and row.start > max(length - self.window, 0):
                raise refusal(
                    ValueError,
                    "truncate",
                    "length",
                    f" is {length}, but a window of {self.window} would then see tokens before {row.start}, which "
                    f"sequence {sequence} no longer holds",
                )
            self._table.settle()
            self._table.shorten(name, length)

    def free(self, sequence: int) -> None:
        """Delete a sequence; pages that no other sequence shares become free."""
        with self._lock.writing:
            name, _ = self._named("free", sequence)
            self._table.settle()
            self._table.remove(name)

    def _new_id(self) -> int:
        self._next += 1  # done first: after an interrupt here, the id is skipped rather than given out twice
        return self._next - 1

    def _row(self, function: str, sequence: int) -> PagedRow:
        row = self._table.rows.get(sequence)
        if row is None:
            raise refusal(ValueError, function, "sequence", f" {sequence} is not live")
        return row

    def _named(self, function: str, sequence: Any) -> tuple[int, PagedRow]:
        """Return the id and the row that a user's argument means."""
        if not isinstance(sequence, (int, np.integer)) or isinstance(sequence, bool):
            raise refusal(ValueError, function, "sequence", f" {sequence!r} is not live")
        return int(sequence), self._row(function, int(sequence))

    def _begin(self, function: str, sequences: Any, tokens: int) -> Step:
        if sequences is None:
            raise refusal(ValueError, function, "sequences", " is missing: a PagedKVCache needs one id per row of q")
        names = _ids(function, sequences)
        rows = [self._row(function, name) for name in names]
        if not tokens or not rows:
            return Step(rows, None)
        if len(names) > 1 and len(set(names)) < len(names):
            raise refusal(ValueError, function, "sequences", f" holds {names}, but tokens can be appended to each once")
        self._table.settle()
        growth = self._table.grow(function, names, tokens, self.window)
        overwritten = self._copy_pages(growth) if growth.copies or growth.reused else ()
        return Step(list(growth.rows.values()), (growth, overwritten))

    def _copy_pages(self, growth: Growth) -> list[NDArray[Any]]:
        """Copy shared pages for the rows that will write to them; return the page contents needed to undo the step."""
        arrays = self._store.arrays()
        overwritten = [store[growth.reused] for store in arrays] if growth.reused else []
        try:
            for old, new in growth.copies:
                for store in arrays:
                    store[new] = store[old]
        except BaseException:
            self._write_back(growth, overwritten)
            raise
        return overwritten

    def _write_back(self, growth: Growth, overwritten: Sequence[NDArray[Any]]) -> None:
        for store, old in zip(self._store.arrays(), overwritten, strict=False):
            store[growth.reused] = old

    def _claim(self, step: Step) -> None:
        if step.state is not None:
            self._table.claim(step.state[0])

    def _commit(self, step: Step) -> None:
        if step.state is not None:
            self._table.commit(step.state[0])

    def _roll_back(self, step: Step) -> None:
        if step.state is not None:
            growth, overwritten = step.state
            self._table.undo(growth)
            self._write_back(growth, overwritten)

    def _common_tokens(self, step: Step) -> int:
        return self._table.common(step.sequences) * self.page_size  # type: ignore[arg-type]


def _ids(function: str, sequences: Any) -> list[int]:
    if type(sequences) in (list, tuple) and set(map(type, sequences)) == {int}:
        return list(sequences)
    ids = integers(function, "sequences", sequences)
    if ids.ndim != 1:
        raise refusal(ValueError, function, "sequences", f" has shape {ids.shape}, but one id per row is needed")
    return ids.tolist()  # type: ignore[no-any-return]


def _layout(num_pages: Any, page_size: Any, num_kv_heads: Any, head_dim: Any, value_dim: Any, dtype: Any) -> Layout:
    function = "PagedKVCache"
    name = storage_name(function, dtype)
    pages, size = count(function, "num_pages", num_pages), count(function, "page_size", page_size)
    heads, width = count(function, "num_kv_heads", num_kv_heads), count(function, "head_dim", head_dim)
    value_width = width if value_dim is None else count(function, "value_dim", value_dim)
    return Layout(name, pages, heads, size, width, value_width)
