"""A cache of keys and values in pages that sequences share."""

from __future__ import annotations

from array import array
from collections import deque
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _core
from ._any_cache import AnyCache
from ._arguments import as_array, integers
from ._errors import refusal
from ._evict import Moves, Repaging, evict_arguments, kept_rows
from ._keywords import hinted
from ._lock import SharedLock
from ._rope import RoPE
from ._store import Layout, Store, count, storage_name, values_width
from ._typing import StorageType, Values


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
    dtype : {"float32", "float16", "bfloat16", "int8", "int4", "float64"} or dtype
        Storage type of the tokens, see `KVCache`.
    values : {"own", "prefix"}
        "prefix": the values are the first value_dim numbers of the keys, and are not stored again, as in DeepSeek's
        latent attention. `append` and `attention_with_kvcache` then take k only.
    window : int, optional
        The largest distance, in tokens, that any query will look to the left. Appending releases the pages that no
        query can see any more.
    buffer : buffer, optional
        Writeable memory of at least ``PagedKVCache.buffer_size(...)`` bytes for the tokens. The page table is kept in
        this object, not in the buffer.

    Attributes
    ----------
    num_pages, page_size, num_kv_heads, head_dim, value_dim, window : int
    values : str
    nbytes : int

    Raises
    ------
    TypeError, ValueError
        A size out of range, an unknown dtype, or a buffer that is too small or holds another cache. A method that
        raises leaves the cache unchanged: a ValueError for an id that is not live, a MemoryError if there are too few
        free pages.

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

    _made_with = ("num_pages", "page_size", "num_kv_heads", "head_dim", "value_dim", "window", "values")
    _made = ("_store", "_lock", "_idle", "_pool")

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
        values: Values = "own",
        buffer: Any = None,
    ) -> None:
        layout = _layout((num_pages, page_size, num_kv_heads, head_dim), value_dim, dtype, values)
        self.num_pages, self.num_kv_heads, self.page_size = layout.pages, layout.heads, layout.slots
        self.head_dim, self.value_dim, self.values = layout.head_dim, layout.value_dim, values
        self.window = None if window is None else count("PagedKVCache", "window", window, least=0)
        self._store = Store("PagedKVCache", layout, self.window, buffer)
        self._lock, self._idle = SharedLock(), deque()
        self._pool = _core.make_page_pool(self.num_pages, self.page_size, 0)

    def _make(self, **arguments: Any) -> None:
        PagedKVCache.__init__(self, **arguments)

    def _contents(self) -> dict[str, Any]:
        rows = {}
        for name in self.sequences:
            length, start, held = _core.sequence(self._pool, name)
            rows[name] = (length, start, held.tolist())
        pages = sorted({page for _, _, held in rows.values() for page in held})
        tokens = [array[pages] for array in self._store.arrays()]
        after = _core.next_id(self._pool)
        return {"next": after, "sequences": rows, "pages": np.array(pages, np.int64), "tokens": tokens}

    def _load(self, contents: dict[str, Any]) -> None:
        after, sequences, pages = (contents[name] for name in ("next", "sequences", "pages"))
        if not isinstance(sequences, dict) or not _is_count(after):
            raise self._damaged("no sequences by id")
        pages = self._integers("pages", pages, len(pages))
        held: set[int] = set()
        pool = _core.make_page_pool(self.num_pages, self.page_size, after)
        for name, description in sequences.items():
            if not _is_count(name) or name >= after:
                raise self._damaged(f"the id {name!r}, but the next one is {after}")
            row = self._row_of(description)
            if row is None or not _core.put_sequence(pool, name, *row):  # which checks the numbers of the pages
                raise self._damaged(f"a sequence {name} that is impossible")
            held.update(row[2].tolist())
        if pages.tolist() != sorted(held):
            raise self._damaged("pages that are not those of its sequences")
        self._fill(pages, contents["tokens"])
        _core.recount_pages(pool)
        self._pool = pool

    def _row_of(self, description: Any) -> tuple[int, int, NDArray[np.int32]] | None:
        """Return (length, start, pages) from a pickle; None if they are not numbers or are impossible."""
        try:
            length, start, held = description
            pages = array("i", held)
        except (TypeError, ValueError, OverflowError):
            return None
        sound = _is_count(length) and _is_count(start)
        lost = sound and start > 0 and self.window is None
        return (length, start, np.array(pages, np.int32)) if sound and not lost else None

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
        values: Values = "own",
    ) -> int:
        """Return the bytes that a buffer for such a cache must have; the window does not matter."""
        return _layout((num_pages, page_size, num_kv_heads, head_dim), value_dim, dtype, values).nbytes()

    @property
    def num_free_pages(self) -> int:
        """Number of pages that belong to no sequence."""
        return _core.num_free_pages(self._pool)

    @property
    def sequences(self) -> tuple[int, ...]:
        """The ids of the live sequences, oldest first."""
        return _core.live_sequences(self._pool)

    def allocate(self) -> int:
        """Return the id of a new, empty sequence. Ids are never reused."""
        with self._lock.writing:
            return _core.add_sequence(self._pool)

    def length(self, sequence: int) -> int:
        """Return how many tokens a sequence has."""
        return _core.length_of(self._pool, _id("length", sequence))

    def append(self, sequence: int, k: ArrayLike, v: ArrayLike | None = None) -> None:
        """Append T tokens to a sequence.

        Parameters
        ----------
        sequence : int
        k : array_like, shape (num_kv_heads, T, head_dim)
        v : array_like, shape (num_kv_heads, T, value_dim)
            None if values are a prefix of the keys. Both are in one floating dtype. Tokens are rounded to the storage
            type.

        Raises
        ------
        MemoryError
            There are not enough free pages. This error, like any other, leaves all sequences unchanged.
        """
        k = as_array("append", "k", k)
        v = self._values_of("append", k, v)
        tokens = k.shape[1] if k.ndim == 3 else 0
        self._run("append", (sequence,), tokens, lambda step: _core.append("append", step, k, v))

    def fork(self, sequence: int) -> int:
        """Return the id of a new sequence that starts as a copy of this one and shares its pages."""
        with self._lock.writing:
            return _core.fork_sequence(self._pool, _id("fork", sequence))

    def truncate(self, sequence: int, length: int) -> None:
        """Remove the newest tokens, so that `length` remain; pages without tokens are released."""
        length = count("truncate", "length", length, least=0)
        with self._lock.writing:
            window = -1 if self.window is None else self.window
            _core.truncate_sequence(self._pool, _id("truncate", sequence), length, window)

    def evict(self, sequence: int, keep: ArrayLike, rope: RoPE | bool | None = None) -> None:
        """Remove tokens anywhere in a sequence. The others keep their order and move together.

        Other sequences do not change: a sequence that shares pages gets pages of its own from the first one whose
        tokens move. Pages that are no longer needed are released.

        Parameters
        ----------
        sequence : int
        keep : integer array, shape (n,) or (num_kv_heads, n)
            The indices of the tokens that stay, ascending, as in `KVCache.evict`.
        rope : RoPE or True, optional
            Rotate the kept keys for their new indices, as in `KVCache.evict`.

        Raises
        ------
        MemoryError
            There are not enough free pages. This error, like any other, leaves all sequences unchanged.
        """
        name = _id("evict", sequence)
        indices, rotation = evict_arguments(self, keep, (), rope)
        with self._lock.writing:
            before, plan = self._pool, Repaging(self._pool, self.num_pages, self.page_size, name)
            (kept,) = kept_rows(indices, [plan.length], [name])
            plan.choose(kept)
            after, moves = plan.pool(kept.shape[-1]), Moves(self._store, rotation)
            moves.add(kept, plan.first, plan.held, plan.pages)
            moves.run(lambda: None, partial(setattr, self, "_pool", after), partial(setattr, self, "_pool", before))

    def free(self, sequence: int) -> None:
        """Delete a sequence; pages that no other sequence shares become free."""
        with self._lock.writing:
            _core.free_sequence(self._pool, _id("free", sequence))

    def _step(self, function: str, sequences: Any) -> _core.Step:
        if sequences is None:
            raise refusal(ValueError, function, "sequences", " is missing: a PagedKVCache needs one id per row of q")
        return self._step_on(self._pool, _ids(function, sequences))


def _is_count(value: Any) -> bool:
    """Whether a value from a pickle can be a length or an id."""
    return type(value) is int and 0 <= value < 1 << 61


def _id(function: str, sequence: Any) -> int:
    if not isinstance(sequence, (int, np.integer)) or isinstance(sequence, bool):
        raise refusal(ValueError, function, "sequence", f" {sequence!r} is not live")
    return int(sequence)


def _ids(function: str, sequences: Any) -> list[int]:
    if type(sequences) in (list, tuple) and set(map(type, sequences)) == {int}:
        return list(sequences)
    ids = integers(function, "sequences", sequences)
    if ids.ndim != 1:
        raise refusal(ValueError, function, "sequences", f" has shape {ids.shape}, but one id per row is needed")
    return ids.tolist()  # type: ignore[no-any-return]


def _layout(sizes: tuple[Any, Any, Any, Any], value_dim: Any, dtype: Any, values: Any) -> Layout:
    function = "PagedKVCache"
    name = storage_name(function, dtype)
    names = ("num_pages", "page_size", "num_kv_heads", "head_dim")
    pages, size, heads, width = (count(function, *given) for given in zip(names, sizes, strict=True))
    value_width, prefix = values_width(function, width, value_dim, values, name)
    return Layout(name, pages, heads, size, width, value_width, prefix=prefix)
