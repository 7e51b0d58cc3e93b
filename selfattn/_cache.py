"""A cache of keys and values in one array, with a row of slots per sequence."""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _core
from ._any_cache import AnyCache
from ._arguments import as_array, integers
from ._errors import refusal
from ._evict import Moves, evict_arguments, kept_rows, unmoved
from ._keywords import hinted
from ._ledger import Ledger, header_bytes
from ._lock import SharedLock
from ._rope import RoPE
from ._store import Layout, Store, count, storage_name, values_width
from ._typing import StorageType, Values


@hinted
class KVCache(AnyCache):
    """Keys and values of a batch of sequences that grow in place up to a capacity.

    Parameters
    ----------
    batch, num_kv_heads, head_dim : int
        Number of sequences, number of heads of k and v, and size of k's heads.
    capacity : int
        Maximum number of tokens per sequence.
    value_dim : int, optional
        Size of v's heads; default head_dim.
    dtype : {"float32", "float16", "bfloat16", "int8", "int4", "float64"} or dtype
        Storage type of the tokens. "int8": int8 codes with a float32 scale per token and head, ``x ≈ code · scale``
        with ``scale = max|x| / 127``. "int4": 32 numbers share 17 bytes, and each row has a scale (see Notes).
    values : {"own", "prefix"}
        "prefix": the values are the first value_dim numbers of the keys, and are not stored again, as in DeepSeek's
        latent attention. `append` and `attention_with_kvcache` then take k only.
    window : int, optional
        The largest distance, in tokens, that any query will look to the left. With a window the cache is a ring:
        sequences grow without limit, and a token is overwritten once no query can see it. At most ``capacity − window``
        tokens can be appended at once.
    buffer : buffer, optional
        Writeable memory of at least ``KVCache.buffer_size(...)`` bytes, such as a `numpy.memmap` or the `buf` of a
        `multiprocessing.shared_memory.SharedMemory`. If it is all zeros, it becomes a new cache. If it holds a cache
        with the same parameters, that cache is opened with its contents.

    Attributes
    ----------
    batch, num_kv_heads, head_dim, value_dim, capacity, window : int
    values : str
    nbytes : int

    Raises
    ------
    TypeError, ValueError
        A size out of range, an unknown dtype, a window that the capacity does not exceed, or a buffer that is too small
        or holds another cache. A method that raises leaves the cache unchanged.

    Notes
    -----
    Calls from several threads are synchronized: many readers or one writer. If several processes share a buffer, only
    one of them may write at a time, and the others must not use the cache until it is done. If a process is killed
    while it appends, the cache holds the tokens of all complete appends; if it is killed while it evicts, each sequence
    holds at least the tokens before its first evicted one.

    An int4 cache stores 32 numbers of a row as 16 bytes of codes c from 0 to 15 and one byte with a multiple m and a
    zero z: ``x ≈ scale · m · (c − z)``. `k` and `v` are then views of these bytes.

    Examples
    --------
    >>> import numpy as np
    >>> import selfattn as sa
    >>> rng = np.random.default_rng(0)
    >>> cache = sa.KVCache(2, num_kv_heads=1, head_dim=8, capacity=100)
    >>> k, v = rng.standard_normal((2, 2, 1, 5, 8), dtype=np.float32)
    >>> cache.append(k, v)
    >>> cache.lengths
    array([5, 5])
    >>> cache.truncate([5, 3])
    >>> cache.lengths
    array([5, 3])
    """

    _made_with = ("batch", "num_kv_heads", "head_dim", "capacity", "value_dim", "window", "values")
    _made = ("_store", "_lock", "_idle", "_ledger")

    def __init__(
        self,
        batch: int,
        num_kv_heads: int,
        head_dim: int,
        capacity: int,
        *,
        value_dim: int | None = None,
        dtype: StorageType = "float32",
        window: int | None = None,
        values: Values = "own",
        buffer: Any = None,
    ) -> None:
        layout = _layout((batch, num_kv_heads, head_dim, capacity), value_dim, dtype, window, values)
        self.batch, self.num_kv_heads, self.capacity = layout.pages, layout.heads, layout.slots
        self.head_dim, self.value_dim, self.values = layout.head_dim, layout.value_dim, values
        self.window = window
        self._store = Store("KVCache", layout, window, buffer)
        self._lock, self._idle = SharedLock(), deque()
        self._ledger = Ledger(self._store.memory, layout, window, self)

    def _make(self, **arguments: Any) -> None:
        KVCache.__init__(self, **arguments)

    def _contents(self) -> dict[str, Any]:
        lengths, starts = self._ledger.state()
        tokens = [array[:, :, : self._used(lengths)] for array in self._store.arrays()]
        return {"lengths": lengths, "starts": starts, "tokens": tokens}

    def _load(self, contents: dict[str, Any]) -> None:
        lengths, starts = (self._integers(name, contents[name], self.batch) for name in ("lengths", "starts"))
        if not self._ledger.are_possible(lengths, starts):
            raise self._damaged("lengths that are impossible")
        self._fill((slice(None), slice(None), slice(self._used(lengths))), contents["tokens"])
        self._set(lengths, starts)

    def _set(self, lengths: NDArray[np.int64], starts: NDArray[np.int64]) -> None:
        """Set the lengths and starts of sequences whose tokens are in the store already."""
        state = np.array((lengths, starts), np.int64)
        _core.set_lengths(self._store.core, self._ledger.core, *state)

    def _used(self, lengths: NDArray[np.int64]) -> int:
        """Return how many slots hold tokens, including the tokens that a ring no longer needs."""
        return min(int(np.max(lengths, initial=0)), self.capacity)

    @staticmethod
    def buffer_size(
        batch: int,
        num_kv_heads: int,
        head_dim: int,
        capacity: int,
        *,
        value_dim: int | None = None,
        dtype: StorageType = "float32",
        window: int | None = None,
        values: Values = "own",
    ) -> int:
        """Return the bytes that a buffer for such a cache must have."""
        return _layout((batch, num_kv_heads, head_dim, capacity), value_dim, dtype, window, values).nbytes()

    @property
    def lengths(self) -> NDArray[np.int64]:
        """The current number of tokens of each sequence, (batch,)."""
        with self._lock.reading:
            view: NDArray[np.int64] = self._ledger.state()[0]
        view.flags.writeable = False
        return view

    @property
    def k(self) -> NDArray[Any]:
        """The stored keys, (batch, num_kv_heads, capacity, head_dim), read-only; codes if the storage is int8.

        If the storage is int4, the last axis has the bytes of a row: 17 for 32 numbers.
        """
        return self._store.view(self._store.k)

    @property
    def v(self) -> NDArray[Any]:
        """The stored values, (batch, num_kv_heads, capacity, value_dim), read-only."""
        return self._store.view(self._store.v)

    @property
    def k_scales(self) -> NDArray[np.float32] | None:
        """The scales of int8 or int4 keys, (batch, num_kv_heads, capacity), or None."""
        return None if self._store.k_scales is None else self._store.view(self._store.k_scales)

    @property
    def v_scales(self) -> NDArray[np.float32] | None:
        """The scales of int8 or int4 values, (batch, num_kv_heads, capacity), or None."""
        return None if self._store.v_scales is None else self._store.view(self._store.v_scales)

    def append(self, k: ArrayLike, v: ArrayLike | None = None) -> None:
        """Append T tokens to every sequence.

        Parameters
        ----------
        k : array_like, shape (batch, num_kv_heads, T, head_dim)
        v : array_like, shape (batch, num_kv_heads, T, value_dim)
            None if values are a prefix of the keys. Both are in one floating dtype. Tokens are rounded to the storage
            type (float64 via float32).

        Raises
        ------
        ValueError
            The shape is wrong, or there is no room for T tokens. The cache is unchanged.
        """
        k = as_array("append", "k", k)
        v = self._values_of("append", k, v)
        tokens = k.shape[2] if k.ndim == 4 else 0
        self._run("append", None, tokens, lambda step: _core.append("append", step, k, v))

    def truncate(self, lengths: ArrayLike) -> None:
        """Remove the newest tokens, for example the tokens of a rejected draft.

        Parameters
        ----------
        lengths : int or integer array, shape (batch,)
            Number of tokens to keep in each sequence, at most its current length.
        """
        new = np.array(integers("truncate", "lengths", lengths))
        if new.shape not in ((), (self.batch,)):
            raise refusal(
                ValueError,
                "truncate",
                "lengths",
                f" has shape {new.shape}, but ({self.batch},) or one integer is needed",
            )
        new = np.ascontiguousarray(np.broadcast_to(new, (self.batch,)))
        with self._lock.writing:
            _core.truncate(self._store.core, self._ledger.core, new)

    def reorder(self, index: ArrayLike) -> None:
        """Replace sequence b by a copy of sequence index[b], as in beam search.

        Parameters
        ----------
        index : integer array, shape (batch,)
            Indices of sequences; each may occur any number of times.
        """
        index = np.array(integers("reorder", "index", index))
        if index.shape != (self.batch,):
            raise refusal(ValueError, "reorder", "index", f" has shape {index.shape}, but ({self.batch},) is needed")
        for i in np.flatnonzero((index < 0) | (index >= self.batch))[:1]:
            raise refusal(ValueError, "reorder", "index", f" holds {index[i]}, which is outside 0..{self.batch - 1}")
        with self._lock.writing:
            _core.reorder(self._store.core, self._ledger.core, index)

    def evict(self, keep: ArrayLike, rope: RoPE | bool | None = None) -> None:
        """Remove tokens anywhere in the sequences. The others keep their order and move together.

        Parameters
        ----------
        keep : integer array, shape (batch, n) or (batch, num_kv_heads, n)
            Ascending indices of the tokens that stay. Heads may keep different tokens, but equally many. If sequences
            keep different numbers, -1 fills the ends of rows.
        rope : RoPE or True, optional
            The rotation of the stored keys, which are then rotated further, to their new indices. Default: keys do not
            change.

        Raises
        ------
        TypeError, ValueError
            Wrong indices, a cache with a window, or `rope` for codes, for keys that contain the values, or with `axes`.

        Notes
        -----
        Without `rope`, later calls of `attention_with_kvcache` need ``positions=``: a token's place in the text is no
        longer its index. All options but `rope` count indices: causal limits, windows, `alibi_slopes`, `bias`, ...

        Examples
        --------
        >>> import numpy as np
        >>> import selfattn as sa
        >>> cache = sa.KVCache(2, num_kv_heads=1, head_dim=1, capacity=8)
        >>> cache.append(*[np.arange(10, dtype=np.float32).reshape(2, 1, 5, 1)] * 2)
        >>> cache.evict([[0, 3, 4], [1, 2, -1]])
        >>> cache.lengths, cache.k[0, 0, :3, 0]
        (array([3, 2]), array([0., 3., 4.], dtype=float32))
        """
        indices, rotation = evict_arguments(self, keep, (self.batch,), rope)
        with self._lock.writing:
            lengths, starts = self._ledger.state()
            kept = kept_rows(indices, lengths, range(self.batch))
            still, moves = np.array([unmoved(row) for row in kept]), Moves(self._store, rotation)
            for b, (row, first) in enumerate(zip(kept, still.tolist(), strict=True)):
                moves.add(row, first, np.array([b]), np.array([b]))
            # If the process is killed halfway, its buffer has the tokens that stay where they are.
            before, between, after = (
                partial(self._set, x, starts) for x in (lengths, still, np.array([row.shape[-1] for row in kept]))
            )
            moves.run(between, after, before)

    def _step(self, function: str, sequences: Any) -> _core.Step:
        if sequences is not None:
            raise refusal(
                ValueError, function, "sequences", " is for a PagedKVCache; a KVCache has all of its batch in order"
            )
        return self._step_on(self._ledger.core)


def _layout(sizes: tuple[Any, Any, Any, Any], value_dim: Any, dtype: Any, window: Any, values: Any) -> Layout:
    function = "KVCache"
    name = storage_name(function, dtype)
    names = ("batch", "num_kv_heads", "head_dim", "capacity")
    batch, num_kv_heads, head_dim, capacity = (count(function, *size) for size in zip(names, sizes, strict=True))
    value_dim, prefix = values_width(function, head_dim, value_dim, values, name)
    if window is not None and count(function, "window", window, least=0) >= capacity:
        raise refusal(ValueError, function, "window", f" is {window}, but it must be less than the capacity {capacity}")
    return Layout(name, batch, num_kv_heads, capacity, head_dim, value_dim, header_bytes(batch), prefix)
