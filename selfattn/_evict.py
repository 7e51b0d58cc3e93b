"""How caches evict tokens: the tokens that stay move together, and new lengths or pages are chosen for them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import _core
from ._any_cache import AnyCache
from ._apply_rope import apply_rope
from ._arguments import integers
from ._elements import ELEMENT_TYPES
from ._errors import refusal
from ._foreign import BITS
from ._rope import RoPE, rope_or_none
from ._store import Store

_NAME = "evict"
Indices = NDArray[np.int64]


def evict_arguments(cache: AnyCache, keep: Any, batch: tuple[int, ...], rope: Any) -> tuple[Indices, RoPE | None]:
    """Return `keep` as (sequences, heads or 1, n) and the rope by which keys are rotated, checked without the lengths.

    `batch`: the leading axes of `keep`.
    """
    if cache.window is not None:
        raise ValueError(
            f"{_NAME}: the cache has a window of {cache.window} tokens, which counts positions: "
            "only a cache without a window can lose tokens from the middle"
        )
    heads = cache._store.k.shape[1]
    if not isinstance(keep, np.ndarray) and np.size(keep) == 0:  # without elements, NumPy takes a list for floats
        keep = np.zeros(np.shape(keep), np.int64)
    array = integers(_NAME, "keep", keep)
    shape = array.shape
    if array.ndim == len(batch) + 1:
        array = array[..., np.newaxis, :]
    if array.ndim != len(batch) + 2 or array.shape[:-2] != batch or array.shape[-2] not in (1, heads):
        first = "".join(f"{size}, " for size in batch)
        wanted = f"({first}n)" if batch else "(n,)"
        raise refusal(ValueError, _NAME, "keep", f" has shape {shape}, but {wanted} or ({first}{heads}, n) is needed")
    return array.reshape(math.prod(batch), *array.shape[-2:]), _rotation(cache, rope)


def _rotation(cache: AnyCache, given: Any) -> RoPE | None:
    rope = rope_or_none(_NAME, given)
    if rope is None:
        return None
    reason = None
    if ELEMENT_TYPES[cache._store.name].codes:
        reason = f"the cache holds {cache._store.name}: codes are moved, but cannot be rotated"
    elif cache.values != "own":
        reason = "values are a part of keys, and would be rotated too"
    elif rope.axes is not None:
        reason = "it has axes: a place in the cache is one number, but its positions have several coordinates"
    if reason is not None:
        raise refusal(ValueError, _NAME, "rope", f" is given, but {reason}")
    rope.for_core(_NAME, cache.head_dim)  # checks the number of rotated elements
    return replace(rope, attention_scaling=1.0)  # the stored keys have been scaled already


def kept_rows(keep: Indices, lengths: Any, names: Any) -> list[Indices]:
    """Return the checked indices (heads or 1, n) of each sequence, without padding; `names` is for error messages."""
    ends = np.asarray(lengths)[:, np.newaxis, np.newaxis]
    for b, head, i in np.argwhere((keep < -1) | (keep >= ends))[:1]:
        text = f" holds {keep[b, head, i]}, but sequence {names[b]} has {lengths[b]} tokens"
        raise refusal(ValueError, _NAME, "keep", text)
    before, after = keep[..., :-1], keep[..., 1:]
    for b, head, i in np.argwhere((after >= 0) & ((before < 0) | (after <= before)))[:1]:
        text = f" holds {before[b, head, i]} before {after[b, head, i]}, but indices ascend, and -1 only ends a row"
        raise refusal(ValueError, _NAME, "keep", text)
    counts = np.count_nonzero(keep >= 0, axis=-1)
    for b, head in np.argwhere(counts != counts[:, :1])[:1]:
        text = (
            f" has {counts[b, 0]} tokens for head 0 of sequence {names[b]}, but {counts[b, head]} for head {head}: "
            "all heads must keep the same number"
        )
        raise refusal(ValueError, _NAME, "keep", text)
    return [rows[:, :count] for rows, count in zip(keep, counts[:, 0], strict=True)]


def unmoved(kept: Indices) -> int:
    """Return how many of the first tokens stay where they are, in all heads."""
    return int(np.count_nonzero(np.all(kept == np.arange(kept.shape[-1]), axis=0)))


class _Move(NamedTuple):
    """Rows of one sequence that change places: where they are in arrays (pages, heads, slots, ...)."""

    origin: tuple[NDArray[Any], ...]
    target: tuple[NDArray[Any], ...]
    shift: Indices  # by how many tokens each row moves to the front


class Moves:
    """Tokens that change places in a cache. What they overwrite is kept, so that `undo` can restore it."""

    def __init__(self, store: Store, rope: RoPE | None) -> None:
        self._arrays, self._rope = store.arrays(), rope
        self._view = BITS if store.name == "bfloat16" else store.k.dtype
        self._heads, self._slots = store.k.shape[1:3]
        self._moves: list[_Move] = []
        self._overwritten: list[list[NDArray[Any]]] = []

    def add(self, kept: Indices, first: int, held: NDArray[Any], pages: NDArray[Any]) -> None:
        """Add the tokens `kept`, (heads or 1, n), from entry `first` on: from a sequence's pages to its new pages."""
        old, new = kept[:, first:], np.arange(first, kept.shape[-1])
        heads = np.arange(self._heads)[:, np.newaxis]
        origin, target = ((row[at // self._slots], heads, at % self._slots) for row, at in ((held, old), (pages, new)))
        self._moves.append(_Move(origin, target, old - new))
        self._overwritten.append([array[target] for array in self._arrays])

    def run(self, claim: Callable[[], None], commit: Callable[[], None], restore: Callable[[], None]) -> None:
        """Move all tokens between `claim` and `commit`. If anything fails, undo it, and `restore` lengths or pages."""
        try:
            claim()
            self.apply()
            commit()
        except BaseException:
            self.undo()
            restore()
            raise

    def apply(self) -> None:
        """Move all tokens. `rope` rotates the keys, which are the first array."""
        for move in self._moves:
            for i, array in enumerate(self._arrays):
                rows = array[move.origin]  # a copy
                array[move.target] = rows if i or self._rope is None else self._rotated(rows, move.shift, self._rope)

    def _rotated(self, rows: NDArray[Any], shift: Indices, rope: RoPE) -> NDArray[Any]:
        heads = rows.view(self._view)[:, np.newaxis]  # each has positions of its own
        return apply_rope(heads, shift, rope, inverse=True)[:, 0].view(rows.dtype)

    def undo(self) -> None:
        """Restore what `apply` has overwritten."""
        for move, overwritten in zip(self._moves, self._overwritten, strict=True):
            for array, rows in zip(self._arrays, overwritten, strict=True):
                array[move.target] = rows


class Repaging:
    """The pages of one sequence after an eviction.

    It keeps the leading pages whose tokens all stay where they are. For the others it prefers its own pages that no
    other sequence shares, then takes free pages.
    """

    def __init__(self, pool: _core.PagePool, num_pages: int, page_size: int, name: int) -> None:
        self._rows = {other: _core.sequence(pool, other) for other in _core.live_sequences(pool)}
        if name not in self._rows:
            raise refusal(ValueError, _NAME, "sequence", f" {name} is not live")
        self._num_pages, self._page_size, self._name = num_pages, page_size, name
        self._next_id = _core.next_id(pool)
        self.length, _, self.held = self._rows[name]

    def choose(self, kept: Indices) -> None:
        """Set `first`, the first token that is written to a chosen page, and `pages`, all pages of the sequence."""
        count, still, size = kept.shape[-1], unmoved(kept), self._page_size
        needed = -(-count // size)
        whole = needed if still == count else still // size
        taken = np.zeros(self._num_pages, bool)
        for name, (_, _, pages) in self._rows.items():
            if name != self._name:
                taken[pages] = True
        own = self.held[whole:]
        own = own[~taken[own]]
        taken[self.held] = True
        usable = np.concatenate([own, np.flatnonzero(~taken).astype(np.int32)])
        if needed - whole > len(usable):
            raise MemoryError(f"{_NAME}: {needed - whole} pages are needed, but {len(usable)} are free")
        self.pages = np.concatenate([self.held[:whole], usable[: needed - whole]])
        self.first = whole * size

    def pool(self, count: int) -> _core.PagePool:
        """Return a pool in which the sequence has `count` tokens in its new pages, and all others are as they were."""
        pool = _core.make_page_pool(self._num_pages, self._page_size, self._next_id)
        for name, row in {**self._rows, self._name: (count, 0, self.pages)}.items():
            _core.put_sequence(pool, name, *row)
        _core.recount_pages(pool)
        return pool
