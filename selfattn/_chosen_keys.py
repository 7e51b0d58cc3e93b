"""Attention to keys or blocks of keys that are chosen by index: pages of the core's paged attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import ArrayLike, NDArray

from . import _core
from ._arguments import as_array, whole_number
from ._backward import computed_in
from ._chosen_pages import Blocks, Chosen, Place, Terms
from ._elements import ELEMENT_TYPES
from ._errors import refusal
from ._masked import Arrays

_NAME = "attention"
_REFUSED = ("return_weights", "dropout")
_MOST_PAGES = np.iinfo(np.int32).max  # by which pages are numbered


class Choice(NamedTuple):
    """Which keys the queries choose, as the arguments of a call say it."""

    argument: str
    indices: ArrayLike
    queries: int  # in a block of queries, which has one row of indices
    keys: int  # in a block of keys


def choice_of(key_indices: ArrayLike | None, block_indices: ArrayLike | None, block_size: Any) -> Choice:
    """Return the choice of a call in which at least one of these arguments is not None."""
    if key_indices is not None:
        for name, value in (("block_indices", block_indices), ("block_size", block_size)):
            if value is not None:
                raise refusal(ValueError, _NAME, "key_indices", " cannot be used with ", name, "")
        return Choice("key_indices", key_indices, 1, 1)
    if block_indices is None:
        raise refusal(ValueError, _NAME, "block_size", " is given without ", "block_indices", "")
    if block_size is None:
        raise refusal(ValueError, _NAME, "block_indices", " needs ", "block_size", ", the number of keys in a block")
    pair = block_size if isinstance(block_size, (tuple, list)) else (1, block_size)
    if len(pair) != 2:
        text = f" is {block_size!r}, but an integer or a pair (queries, keys) is needed"
        raise refusal(TypeError, _NAME, "block_size", text)
    return Choice("block_indices", block_indices, *(whole_number(_NAME, "block_size", n, 1) for n in pair))


def attend_to_chosen(arrays: Arrays, choice: Choice, out: NDArray[Any] | None, options: _core.Options) -> Any:
    """Return what `attention` returns if each query sees only the keys that are chosen for it."""
    for name in _REFUSED:
        if getattr(options, name):
            raise refusal(ValueError, _NAME, choice.argument, " cannot be used with ", name, "")
    ranges = _core.visible_keys(*arrays, options)
    flat = arrays[0].ndim == 2
    q, k, v = (_heads_first(x, options) for x in arrays)
    batch, heads, q_len = ranges.shape[:-2], q.shape[-3], ranges.shape[-2]
    result = np.empty((*batch, *arrays[0].shape[-3:-1], v.shape[-1]), q.dtype)
    shown = _heads_first(result, options)
    lse = np.empty((*batch, heads, q_len), computed_in(q.dtype))
    blocks = Blocks(min(choice.keys, max(k.shape[-2], 1)), k.shape[-2])
    indices = _checked(choice, blocks, (*batch, heads, q_len), k.shape[-3], flat)
    if out is not None:
        _core.check_out(_NAME, out, result, "q")
    q, k, v = (np.broadcast_to(x, (*batch, *x.shape[-3:])) for x in (q, k, v))
    terms = Terms(options, (*batch, heads, q_len, k.shape[-2]), ranges[..., 0])
    for entry in np.ndindex(batch):
        for own_heads, kv_heads, own in _groups(indices[entry], heads, k.shape[-3]):
            store = _store(k[entry][kv_heads], v[entry][kv_heads], blocks)
            for queries, rows in _spans(q_len, choice.queries if len(own) > 1 else q_len):
                place = Place(entry, own_heads, queries)
                chosen = Chosen(own[rows], ranges[entry][queries, 1:], blocks)
                added, omitted = terms.at(place, chosen)
                paged = _for_pages(options, own_heads, chosen, added, q.dtype)
                found, found_lse = _attend(store, q[entry][own_heads, queries], chosen, paged)
                shown[entry][own_heads, queries] = found
                lse[entry][own_heads, queries] = found_lse - omitted
    if options.q_lens is not None:  # later queries have no sink either
        q_lens = np.broadcast_to(options.q_lens, batch or (1,)).reshape(*batch, 1, 1)
        np.copyto(lse, -np.inf, where=np.arange(q_len) >= q_lens)
    if out is not None:
        out[...] = result  # only now, since it may be one of the operands
        result = out
    return (result, lse[0] if flat else lse) if options.return_lse else result


def _heads_first(array: NDArray[Any], options: _core.Options) -> NDArray[Any]:
    """View q, k, v or the result as (..., heads, length, width)."""
    if array.ndim == 2:
        return array[None]
    return array if options.layout == _core.LAYOUTS["bhsd"] else array.swapaxes(-3, -2)


def _checked(
    choice: Choice, blocks: Blocks, wanted: tuple[int, ...], kv_heads: int, flat: bool
) -> NDArray[np.integer[Any]]:
    """Return the indices with the axes (*batch, 1, KV heads or heads, rows, n), where n is at least 1."""
    name, count = choice.argument, blocks.total
    if count > _MOST_PAGES:
        most = _MOST_PAGES * blocks.size
        raise refusal(ValueError, _NAME, "k", f" has {blocks.kv_len} keys, but ", name, f" needs at most {most}")
    array = as_array(_NAME, name, choice.indices)
    if array.dtype.kind not in "iu":
        raise refusal(TypeError, _NAME, name, f" has dtype {array.dtype}, but integers are needed")
    indices = array[None] if flat and array.ndim == 2 else array
    *batch, heads, q_len = wanted
    rows = -(-q_len // choice.queries)
    fits = (
        2 <= indices.ndim <= len(wanted) + 1
        and indices.shape[-2] in (1, rows)
        and (indices.ndim < 3 or indices.shape[-3] in (1, kv_heads, heads))
        and all(n in (1, m) for n, m in zip(indices.shape[-4::-1], batch[::-1], strict=False))
    )
    if not fits:
        needed = f"({'..., ' if batch else ''}{heads}, {kv_heads} or 1, {rows} or 1, n)"
        raise refusal(ValueError, _NAME, name, f" has shape {array.shape}, but {needed} is needed")
    own = indices if indices.ndim > 2 else indices[None]
    if own.shape[-1] == 0:
        own = np.full((*own.shape[:-1], 1), -1)
    elif own.strides[-1] == 0:  # any length, but it repeats one index, which counts once
        own = own[..., :1]
    if own.size and (own.min() < -1 or own.max() >= count):
        worst = int(own.min()) if own.min() < -1 else int(own.max())
        none = "key" if name == "key_indices" else "block"
        text = f" holds {worst}, which is outside -1..{count - 1} (-1: no {none})"
        raise refusal(ValueError, _NAME, name, text)
    return np.broadcast_to(own, (*batch, *own.shape[-3:]))


def _groups(indices: NDArray[Any], heads: int, kv_heads: int) -> Iterator[tuple[slice, slice, NDArray[Any]]]:
    """Yield the query heads and KV heads that share indices (rows, n), and these."""
    count = len(indices)
    if count == 1:
        yield slice(0, heads), slice(0, kv_heads), indices[0]
        return
    group = heads // kv_heads
    own = group if count == kv_heads else 1
    for i in range(count):
        kv_head = i * own // group
        yield slice(i * own, (i + 1) * own), slice(kv_head, kv_head + 1), indices[i]


def _spans(q_len: int, block: int) -> Iterator[tuple[slice, slice]]:
    """Yield queries and their rows of indices: first all whole blocks of queries, then the short one."""
    whole = q_len // block * block if block else 0
    for first, last in ((0, whole), (whole, q_len)):
        if first < last:
            yield slice(first, last), slice(first // block, -(-last // block))


def _store(k: NDArray[Any], v: NDArray[Any], blocks: Blocks) -> _core.CacheStore:
    """Describe keys and values (KV heads, keys, width) as a cache with a page for each block."""
    tokens = (_tokens(x, blocks) for x in (k, v))
    return _core.make_cache_store(k=next(tokens), v=next(tokens), dtype=ELEMENT_TYPES[k.dtype.name].number, window=-1)


def _tokens(array: NDArray[Any], blocks: Blocks) -> _core.CacheTokens:
    size = array.itemsize
    if array.strides[-1] != size or any(n % size for n in array.strides) or not array.flags.aligned:
        array = np.ascontiguousarray(array)
    memory = array.view(ELEMENT_TYPES[array.dtype.name].memory)
    heads, _, width = memory.shape
    head, key, item = memory.strides
    # The last page may end after the array. No sequence is long enough to reach that part.
    pages = as_strided(memory, (blocks.total, heads, blocks.size, width), (blocks.size * key, head, key, item))
    return _core.CacheTokens(rows=pages, width=array.shape[-1])


def _for_pages(
    options: _core.Options, heads: slice, chosen: Chosen, terms: NDArray[Any] | None, dtype: np.dtype[Any]
) -> _core.Options:
    """Return the options for some heads and the tokens of pages instead of all keys."""
    own = _core.Options()
    if chosen.causal is not None:
        own.causal = True
        own.q_offset, own.prefix_lens = chosen.causal
    for name in ("scale", "softcap", "precision", "num_threads"):
        setattr(own, name, getattr(options, name))
    if options.sinks is not None:
        own.sinks = options.sinks[heads]
    if terms is not None:
        computed = computed_in(dtype)
        most = np.finfo(computed).max / 2  # finite biases are clamped to it, as in the core
        own.bias = np.where(np.isinf(terms), terms, np.clip(terms, -most, most)).astype(computed)
    own.return_lse = True
    return own


def _attend(store: _core.CacheStore, q: NDArray[Any], chosen: Chosen, options: _core.Options) -> tuple[Any, Any]:
    """Attend with the queries of some heads (heads, queries, width); each row of indices is a sequence."""
    table = _core.make_page_table(pages=chosen.pages, lengths=chosen.lengths, starts=chosen.starts)
    inputs = _core.CacheInputs(q=chosen.by_row(q).swapaxes(0, 1))
    step = _core.Step(store=store, sequences=table)
    out, lse = _core.attend_cache(_NAME, step, inputs, None, options)
    return out.swapaxes(0, 1).reshape(*q.shape[:2], out.shape[-1]), lse.swapaxes(0, 1).reshape(q.shape[:2])
