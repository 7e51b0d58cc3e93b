"""Attention with a mask that is an expression: by options of the core, or for one block of queries after another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import _core
from ._errors import refusal
from ._mask_lowering import lowered
from ._mask_nodes import TILE_KEYS, Bools, Grid, Mask

Arrays = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]
# The rest of the error for key_indices and block_indices.
NOT_WITH_CHOSEN = (" cannot be used with this ", "mask", ": pass ", "mask", ".array(q_len, kv_len)")
BLOCK_QUERIES = 256  # enough rows that the core need not divide the keys between threads


class Block(NamedTuple):
    """Queries, and for each batch entry the keys that they may see."""

    queries: range
    begin: NDArray[np.int64]  # (...), as end: no query of the entry sees a key outside
    end: NDArray[np.int64]
    mask: Bools | None  # (..., queries, keys), valid until the next block; None: the limits alone hide keys


class Masked(NamedTuple):
    """A call with the options that say what they can of its mask, and the rest of the mask."""

    arrays: Arrays
    options: _core.Options
    rest: Mask | None
    grid: Grid
    ranges: NDArray[np.int64]  # what `_core.visible_keys` returns for the options; empty without a rest

    def blocks(self) -> Iterator[Block]:
        return blocks(self.rest, self.grid, self.ranges) if self.rest is not None else iter(())


def masked(function: str, arrays: Arrays, mask: Mask, options: _core.Options) -> Masked:
    """Return the call whose options have no mask yet."""
    if min(x.ndim for x in arrays) < 2:
        _core.visible_keys(*arrays, options)  # which says what is wrong
    q, k, _ = arrays
    q_len, kv_len = (x.shape[_row_axis(x, options)] for x in (q, k))
    own, rest = lowered(mask, options, (q_len, kv_len))
    if rest is None:
        return Masked(arrays, own, None, Grid(function, q_len, kv_len, np.array(0)), np.empty((0, 3), np.int64))
    ranges = _core.visible_keys(*arrays, with_positions(own) if rest.positional else own)
    grid = Grid(function, q_len, kv_len, _offset(ranges))
    rest.check(grid)
    _check_leading(rest, grid, (*ranges.shape[:-2], _heads(q, options)))
    return Masked(arrays, own, rest if ranges.size and kv_len else None, grid, ranges)  # no pairs: nothing to hide


def with_positions(options: _core.Options) -> _core.Options:
    """Return options for which positions matter: the core refuses them if lengths leave open what positions are."""
    own = options.copy()
    if own.window_right < 0:
        own.window_right = np.iinfo(np.int64).max  # hides nothing
    return own


def _row_axis(array: NDArray[Any], options: _core.Options) -> int:
    return -3 if options.layout == _core.LAYOUTS["bshd"] and array.ndim > 2 else -2


def _heads(q: NDArray[Any], options: _core.Options) -> int:
    return 1 if q.ndim == 2 else q.shape[-5 - _row_axis(q, options)]


def _offset(ranges: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the offset as a number if all batch entries have the same, else with an axis for the heads."""
    if not ranges.size:
        return np.array(0)
    offset = ranges[..., 0, 0]
    return np.array(offset.flat[0]) if np.all(offset == offset.flat[0]) else offset[..., None]


def _check_leading(mask: Mask, grid: Grid, wanted: tuple[int, ...]) -> None:
    try:
        found = mask.visible(range(0), range(0), grid).shape[:-2]
        fits = np.broadcast_shapes(found, wanted) == wanted
    except ValueError:  # the parts of the mask do not fit each other
        found, fits = None, False
    if not fits:
        which = "parts for different" if found is None else found
        text = f" has {which} batch entries and heads, but those of the call are {wanted}"
        raise refusal(ValueError, grid.function, "mask", text)


def blocks(mask: Mask, grid: Grid, ranges: NDArray[np.int64]) -> Iterator[Block]:
    """Yield the blocks of a call whose limits show each query the keys from ranges[..., 1] to ranges[..., 2]."""
    memory: Bools | None = None
    tile = np.arange(0, grid.kv_len, TILE_KEYS)
    for first in range(0, grid.q_len, BLOCK_QUERIES):
        queries = range(first, min(first + BLOCK_QUERIES, grid.q_len))
        some, every = mask.seen(queries, grid)
        begin, end = _keys_of(some, grid.kv_len, ranges[..., queries.start : queries.stop, 1:])
        by_entry: Bools = np.asarray((tile < end[..., None]) & (tile + TILE_KEYS > begin[..., None]))
        inside = by_entry[..., None, :] if by_entry.ndim > 1 else by_entry  # an axis for the heads
        own = None
        if np.any(inside & ~every):
            if memory is None:
                memory = np.zeros((*every.shape[:-1], min(BLOCK_QUERIES, grid.q_len), grid.kv_len), bool)
            own = memory[..., : len(queries), :]
            known = np.repeat(every, TILE_KEYS, axis=-1)[..., None, : grid.kv_len]
            for keys in _runs(inside, grid.kv_len):
                own[_at(-1, keys)] = known[_at(-1, keys)]
            for keys in _runs(inside & some & ~every, grid.kv_len):  # here it depends on the pair
                own[_at(-1, keys)] = mask.visible(queries, keys, grid)
        yield Block(queries, begin, end, own)


def _keys_of(some: Bools, kv_len: int, ranges: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the begin and the end of the keys that queries may see, by their limits and by their tiles."""
    limits = ranges[..., 0] < ranges[..., 1]
    begin = np.where(limits, ranges[..., 0], kv_len).min(axis=-1)
    end = np.where(limits, ranges[..., 1], 0).max(axis=-1)
    tiles: Bools = some if some.ndim == 1 else np.any(some, axis=-2)
    begin = np.maximum(begin, np.where(tiles.any(axis=-1), tiles.argmax(axis=-1) * TILE_KEYS, kv_len))
    end = np.minimum(end, (tiles.shape[-1] - tiles[..., ::-1].argmax(axis=-1)) * TILE_KEYS)
    empty = begin >= end
    return np.where(empty, 0, begin), np.where(empty, 0, end)


def _runs(tiles: Bools, kv_len: int) -> Iterator[range]:
    """Yield the keys of adjacent tiles that are True in a batch entry or head."""
    any_entry = tiles.reshape(-1, tiles.shape[-1]).any(axis=0)
    edges = np.flatnonzero(np.diff(any_entry, prepend=False, append=False)) * TILE_KEYS
    for begin, end in edges.reshape(-1, 2).tolist():
        yield range(begin, min(end, kv_len))


def options_of(call: Masked, block: Block) -> _core.Options:
    """Return the options of a block, whose keys are those of the whole call, so that no position changes."""
    own, given = call.options.copy(), call.options
    first, count = block.queries.start, len(block.queries)
    own.q_offset = np.asarray(call.ranges[..., 0, 0] + first)
    own.first_query = given.first_query + first
    own.kv_starts, own.kv_lens = block.begin, block.end
    if given.q_lens is not None:
        own.q_lens = np.asarray(np.clip(given.q_lens - first, 0, count))
    if given.bias is not None and given.bias.ndim > 1 and given.bias.shape[-2] != 1:
        own.bias = given.bias[_at(-2, block.queries)]
    own.mask = block.mask
    return own


def rows_of(q: NDArray[Any], block: Block, options: _core.Options) -> tuple[Any, ...]:
    """Return the index of a block's queries in q."""
    return _at(_row_axis(q, options), block.queries)


def _at(axis: int, part: range) -> tuple[Any, ...]:
    """Return the index of a part of an axis, which is counted from the last one."""
    return (..., slice(part.start, part.stop), *[slice(None)] * (-1 - axis))


def attend_in_blocks(call: Masked, out: NDArray[Any] | None) -> Any:
    """Return what `attention` returns for a call with a rest of its mask."""
    q, k, v = call.arrays
    mass = call.options.return_key_mass
    results: list[NDArray[Any]] = []
    for block in call.blocks():
        own = options_of(call, block)
        found = _core.attention(q[rows_of(q, block, own)], k, v, None, own)
        parts = [found] if isinstance(found, np.ndarray) else list(found)
        axes = [_row_axis(parts[0], own), *[-1] * own.return_lse, *[-2] * own.return_weights]
        if not results:
            results = [_longer(x, axis, call.grid.q_len) for x, axis in zip(parts, axes, strict=False)]
            results += [np.zeros_like(parts[-1], np.float64)] * mass
        for whole, x, axis in zip(results, parts, axes, strict=False):
            whole[_at(axis, block.queries)] = x
        if mass:
            results[-1] += parts[-1]
    if mass:
        results[-1] = results[-1].astype(parts[-1].dtype)
    if out is not None:
        _core.check_out("attention", out, results[0], "q")
        out[...] = results[0]  # only now, since it may be one of the operands
        results[0] = out
    return results[0] if len(results) == 1 else tuple(results)


def _longer(array: NDArray[Any], axis: int, length: int) -> NDArray[Any]:
    shape = list(array.shape)
    shape[axis] = length
    return np.empty(shape, array.dtype)
