"""Chosen blocks of keys as pages of sequences, and what is added to the scores of their keys."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import _core

Indices = NDArray[np.int64]


class Blocks(NamedTuple):
    """How keys are divided into blocks. The last block may be short."""

    size: int  # at most max(kv_len, 1)
    kv_len: int

    @property
    def total(self) -> int:
        """The number of blocks, which is also an index that no block has."""
        return -(-self.kv_len // self.size)


class Chosen:
    """The chosen blocks of some rows of indices (rows, n) whose queries see the keys in `ranges` (queries, 2).

    All rows serve equally many queries. For the core, a row is a sequence: `pages` are its blocks, ascending and each
    once, and its queries see no tokens of them before `starts` or from `lengths` on. If a query sees fewer tokens than
    another of its row, but in each row as by a causal limit, then `causal` has the numbers of these limits, an offset
    and a prefix for each row: query i sees the tokens to i + offset, and those before the prefix. Otherwise `uneven` is
    True.
    """

    def __init__(self, indices: NDArray[Any], ranges: Indices, blocks: Blocks) -> None:
        self._blocks = blocks
        self._rows, self._queries = len(indices), len(ranges) // len(indices)
        begin, end = np.moveaxis(ranges.reshape(self._rows, self._queries, 2), -1, 0)
        self._chosen = _kept(indices, begin, end, blocks)
        # The core reads the pages of one row after another.
        self.pages = np.ascontiguousarray(np.where(self._chosen < blocks.total, self._chosen, 0), np.int32)
        self._begin, self._end = self._tokens_before(begin), self._tokens_before(end)
        sees = self._begin < self._end
        self.lengths = np.where(sees, self._end, 0).max(axis=-1)
        self.starts = np.where(sees, self._begin, self.lengths[:, None]).min(axis=-1)
        same = (self._begin == self.starts[:, None]) & (self._end == self.lengths[:, None])
        self.causal = None if same.all() else self._causal_limits()
        self.uneven = self.causal is None and not same.all()

    def _tokens_before(self, keys: Indices) -> Indices:
        """Return how many tokens of each row are before a key of each query (rows, queries of a row)."""
        size = self._blocks.size
        begun = np.count_nonzero(self._chosen[:, None] * size < keys[..., None], axis=-1)
        last = np.take_along_axis(self._chosen, np.maximum(begun - 1, 0), axis=-1)
        return np.where(begun > 0, (begun - 1) * size + np.minimum(keys - last * size, size), 0)

    def _causal_limits(self) -> tuple[Indices, Indices] | None:
        """Return the offset and the prefix of each row, with which a causal limit shows each query its tokens."""
        if np.any(self._begin > self.starts[:, None]):
            return None
        steps, prefixes = np.arange(self._queries), self._end[:, :1]
        rise = np.argmax(self._end > prefixes, axis=-1)[:, None]  # the first query that sees more than query 0
        ends = np.take_along_axis(self._end, rise, axis=-1) - rise
        if np.any(self._end != np.clip(ends + steps, prefixes, self.lengths[:, None])):
            return None
        return ends[:, 0] - 1, prefixes[:, 0]

    def keys(self) -> Indices:
        """Return the key of each token of the pages (rows, tokens); for tokens after a row's own, any key."""
        keys = self._chosen[:, :, None] * self._blocks.size + np.arange(self._blocks.size)
        named: Indices = keys.reshape(self._rows, -1)[:, : int(self.lengths.max())]
        return np.minimum(named, self._blocks.kv_len - 1)

    def visible(self) -> NDArray[np.bool_]:
        """Return which tokens each query sees (rows, queries of a row, tokens)."""
        tokens = np.arange(int(self.lengths.max()))
        return (tokens >= self._begin[..., None]) & (tokens < self._end[..., None])

    def by_row(self, array: NDArray[Any]) -> NDArray[Any]:
        """View an array (heads, queries, width) as (heads, rows, queries of a row, width)."""
        heads, _, width = array.shape
        return array.reshape(heads, self._rows, self._queries, width)


def _kept(indices: NDArray[Any], begin: Indices, end: Indices, blocks: Blocks) -> Indices:
    """Return the blocks with keys from a row's least `begin` to its largest `end`, at the start of each row."""
    sees = begin < end
    first = np.where(sees, begin, blocks.kv_len).min(axis=-1)[:, None]
    last = np.where(sees, end, 0).max(axis=-1)[:, None]
    chosen = np.sort(indices.astype(np.int64), axis=-1)
    kept = ((chosen + 1) * blocks.size > first) & (chosen * blocks.size < last)  # which -1 never is
    kept[:, 1:] &= chosen[:, 1:] != chosen[:, :-1]
    chosen[~kept] = blocks.total
    if not kept.all():
        chosen.sort(axis=-1)
    return chosen[:, : max(int(kept.sum(axis=-1).max()), 1)]


class Place(NamedTuple):
    """Some queries of some heads of a batch entry."""

    entry: tuple[int, ...]
    heads: slice
    queries: slice


class Terms:
    """What is added to scores: bias, ALiBi and T5's bias of chosen keys, with -inf where a key is hidden."""

    def __init__(self, options: _core.Options, shape: tuple[int, ...], positions: Indices) -> None:
        """Take the shape of all pairs (..., heads, q_len, kv_len), and the positions of queries (..., q_len)."""
        self._positions = positions
        self._mask = None if options.mask is None else np.broadcast_to(options.mask, shape)
        self._bias = None if options.bias is None else np.broadcast_to(options.bias, shape)
        slopes = options.alibi_slopes
        self._slopes = None if slopes is None else np.broadcast_to(slopes, shape[:-2])
        table = options.distance_bias
        self._table = None if table is None else np.broadcast_to(table, (shape[-3], np.shape(table)[-1]))
        self._origin = options.distance_origin
        self._sinks = options.sinks is not None

    def at(self, place: Place, chosen: Chosen) -> tuple[NDArray[Any] | None, Any]:
        """Return the terms (rows, heads or 1, queries of a row, tokens), or None; and what they omit (heads, queries).

        Terms are rounded to the type of computation. So ALiBi omits what the terms of a query have in common, which
        only lse depends on. With sinks, which get no terms, nothing is omitted.
        """
        given = any(x is not None for x in (self._mask, self._bias, self._slopes, self._table))
        if not chosen.lengths.any() or not (given or chosen.uneven):
            return None, 0.0
        keys, visible = chosen.keys()[:, None], chosen.visible()
        parts: list[Any] = []
        omitted: Any = 0.0
        if self._bias is not None:
            parts.append(_of_keys(self._bias, place, chosen, keys).astype(np.float64))
        if self._slopes is not None or self._table is not None:
            distances = self._positions[place.entry][place.queries].reshape(len(keys), -1, 1) - keys
        if self._slopes is not None:
            slopes = self._slopes[place.entry][place.heads][:, None, None]
            least = self._least(distances, visible)
            omitted = (slopes * least).reshape(len(slopes), -1)
            parts.append(-slopes[..., None] * (abs(distances) - least[..., None]))
        if self._table is not None:
            columns = np.clip(distances + self._origin, 0, self._table.shape[1] - 1)
            parts.append(self._table[place.heads][:, columns])
        shown = True if self._mask is None else _of_keys(self._mask, place, chosen, keys)
        if chosen.uneven:
            shown = visible & shown
        terms = np.where(shown, sum(parts), -np.inf)
        return terms.reshape(-1, *visible.shape).swapaxes(0, 1), omitted

    def _least(self, distances: Indices, visible: NDArray[np.bool_]) -> Indices:
        """Return the distance that ALiBi omits for each query (rows, queries of a row)."""
        if self._sinks:
            return np.zeros(visible.shape[:-1], np.int64)
        far = np.where(visible, abs(distances), np.iinfo(np.int64).max)
        return np.where(visible.any(axis=-1), far.min(axis=-1), 0)


def _of_keys(pairs: NDArray[Any], place: Place, chosen: Chosen, keys: Indices) -> NDArray[Any]:
    """Return what an array (..., heads, queries, keys) has for keys (rows, 1, tokens) of each query of a row."""
    own = chosen.by_row(pairs[place.entry][place.heads, place.queries])
    return np.take_along_axis(own, keys[None], axis=-1)
