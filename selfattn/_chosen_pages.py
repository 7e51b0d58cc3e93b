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
    def count(self) -> int:
        """Number of blocks, which is also an index that no block has."""
        return -(-self.kv_len // self.size)


class Chosen:
    """The chosen blocks of some rows of indices (rows, n) whose queries see the keys in `ranges` (queries, 2).

    Each row serves an equal number of queries. For the core it is a sequence: `pages` are its blocks, ascending and
    each once. Its tokens are from `starts` to `lengths`, so that those that no query sees are not read. A query may see
    fewer keys than another query of its row. Only then is `uneven` True.
    """

    def __init__(self, indices: NDArray[Any], ranges: Indices, blocks: Blocks) -> None:
        self._blocks = blocks
        self._rows, self._queries = len(indices), len(ranges) // len(indices)
        size = blocks.size
        begin, end = np.moveaxis(ranges.reshape(self._rows, self._queries, 2), -1, 0)
        sees = begin < end
        first = np.where(sees, begin, blocks.kv_len).min(axis=-1)
        last = np.where(sees, end, 0).max(axis=-1)
        chosen = np.sort(indices.astype(np.int64), axis=-1)
        kept = ((chosen + 1) * size > first[:, None]) & (chosen * size < last[:, None])  # which -1 never is
        kept[:, 1:] &= chosen[:, 1:] != chosen[:, :-1]
        chosen[~kept] = blocks.count
        if not kept.all():
            chosen.sort(axis=-1)
        counts = kept.sum(axis=-1)
        self._chosen = chosen = chosen[:, : max(int(counts.max()), 1)]
        lowest = np.maximum(chosen[:, 0] * size, first)
        final = np.take_along_axis(chosen, np.maximum(counts - 1, 0)[:, None], axis=-1)[:, 0]
        highest = np.minimum((final + 1) * size, last)
        some = counts > 0
        self.starts = np.where(some, lowest - chosen[:, 0] * size, 0)
        self.lengths = np.where(some, (counts - 1) * size + highest - final * size, 0)
        self._ranges = begin[..., None], end[..., None]
        self.uneven = bool(np.any(some[:, None] & ((begin > lowest[:, None]) | (end < highest[:, None]))))
        # The core reads the pages of one row after another.
        self.pages = np.ascontiguousarray(np.where(chosen < blocks.count, chosen, 0), np.int32)

    def keys(self) -> Indices:
        """Return the index of each token of the pages (rows, tokens); kv_len or more: there is no such key."""
        keys = self._chosen[:, :, None] * self._blocks.size + np.arange(self._blocks.size)
        return keys.reshape(self._rows, -1)[:, : max(int(self.lengths.max()), 1)]

    def visible(self, keys: Indices) -> NDArray[np.bool_]:
        """Return which of the keys each query may see, (rows, queries of a row, tokens)."""
        begin, end = self._ranges
        return (keys[:, None] >= begin) & (keys[:, None] < end)

    def by_row(self, array: NDArray[Any]) -> NDArray[Any]:
        """View an array (heads, queries, width) as (heads, rows, queries of a row, width)."""
        heads, _, width = array.shape
        return array.reshape(heads, self._rows, self._queries, width)


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
        self._last_key = shape[-1] - 1
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
        keys = chosen.keys()
        visible = chosen.visible(keys)
        keys = np.minimum(keys, self._last_key)[:, None]
        distances = self._positions[place.entry][place.queries].reshape(len(keys), -1, 1) - keys
        parts: list[Any] = []
        omitted: Any = 0.0
        if self._bias is not None:
            parts.append(_of_keys(self._bias, place, chosen, keys).astype(np.float64))
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
