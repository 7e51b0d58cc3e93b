"""Attention to keys that are chosen by index: each query reads its own keys as pages of one key."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _core
from ._arguments import as_array
from ._backward import computed_in
from ._elements import ELEMENT_TYPES
from ._errors import refusal

_NAME = "attention"
_REFUSED = ("return_weights", "dropout")
_MOST_KEYS = np.iinfo(np.int32).max  # by which pages are numbered
Arrays = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]


def attend_to_chosen(arrays: Arrays, key_indices: ArrayLike, out: NDArray[Any] | None, options: _core.Options) -> Any:
    """Return what `attention` returns if each query sees only the keys that `key_indices` names."""
    for name in _REFUSED:
        if getattr(options, name):
            raise refusal(ValueError, _NAME, "key_indices", " cannot be used with ", name, "")
    ranges = _core.visible_keys(*arrays, options)
    flat = arrays[0].ndim == 2
    q, k, v = (_heads_first(x, options) for x in arrays)
    batch, q_len = ranges.shape[:-2], ranges.shape[-2]
    indices = _checked(key_indices, (*batch, q.shape[-3], q_len), k.shape[-3:-1], flat)
    result = np.empty((*batch, q.shape[-3], q_len, v.shape[-1]), q.dtype)
    if out is not None:
        _core.check_out(_NAME, out, np.broadcast_to(np.empty((), q.dtype), _user_shape(result, flat, options)), "q")
    lse = np.empty(result.shape[:-1], computed_in(q.dtype))
    q, k, v = (np.broadcast_to(x, (*batch, *x.shape[-3:])) for x in (q, k, v))
    terms = _Terms(options, (*batch, q.shape[-3], q_len, k.shape[-2]), ranges[..., 0])
    for entry in np.ndindex(batch):
        for heads, kv_heads, own in _groups(indices[entry], q.shape[-3], k.shape[-3]):
            chosen = _Chosen(own, ranges[entry][:, 1:])
            part = (q[entry][heads], k[entry][kv_heads], v[entry][kv_heads])
            added, omitted = terms.at(entry, heads, chosen)
            found, found_lse = _attend(part, chosen, _for_heads(options, heads, added, q.dtype))
            result[entry][heads], lse[entry][heads] = found, found_lse - omitted
    result = _in_layout(result, flat, options)
    if out is not None:
        out[...] = result
        result = out
    return (result, lse[0] if flat else lse) if options.return_lse else result


def _heads_first(array: NDArray[Any], options: _core.Options) -> NDArray[Any]:
    if array.ndim == 2:
        return array[None]
    return array if options.layout == _core.LAYOUTS["bhsd"] else array.swapaxes(-3, -2)


def _in_layout(result: NDArray[Any], flat: bool, options: _core.Options) -> NDArray[Any]:
    if not flat and options.layout == _core.LAYOUTS["bshd"]:
        return np.ascontiguousarray(result.swapaxes(-3, -2))
    own: NDArray[Any] = result[0] if flat else result
    return own


def _user_shape(result: NDArray[Any], flat: bool, options: _core.Options) -> tuple[int, ...]:
    *batch, heads, q_len, width = result.shape
    if flat:
        return q_len, width
    heads_first = bool(options.layout == _core.LAYOUTS["bhsd"])
    return (*batch, heads, q_len, width) if heads_first else (*batch, q_len, heads, width)


def _checked(given: ArrayLike, wanted: tuple[int, ...], keys: tuple[int, ...], flat: bool) -> NDArray[np.int64]:
    """Return the indices with the axes (*batch, 1, KV heads or heads, queries, n)."""
    kv_heads, kv_len = keys
    if kv_len > _MOST_KEYS:
        raise refusal(
            ValueError, _NAME, "k", f" has {kv_len} keys, but ", "key_indices", f" needs at most {_MOST_KEYS}"
        )
    array = as_array(_NAME, "key_indices", given)
    if array.dtype.kind not in "iu":
        raise refusal(TypeError, _NAME, "key_indices", f" has dtype {array.dtype}, but integers are needed")
    indices = array[None] if flat and array.ndim == 2 else array
    *batch, heads, q_len = wanted
    fits = (
        2 <= indices.ndim <= len(wanted) + 1
        and indices.shape[-2] == q_len
        and (indices.ndim < 3 or indices.shape[-3] in (1, kv_heads, heads))
        and all(n in (1, m) for n, m in zip(indices.shape[-4::-1], batch[::-1], strict=False))
    )
    if not fits:
        needed = f"(..., {heads}, {kv_heads} or 1, {q_len}, n)" if batch else f"({heads}, {kv_heads} or 1, {q_len}, n)"
        raise refusal(ValueError, _NAME, "key_indices", f" has shape {array.shape}, but {needed} is needed")
    if indices.size and (indices.min() < -1 or indices.max() >= kv_len):
        worst = int(indices.min()) if indices.min() < -1 else int(indices.max())
        raise refusal(
            ValueError, _NAME, "key_indices", f" holds {worst}, which is outside -1..{kv_len - 1} (-1: no key)"
        )
    own = indices if indices.ndim > 2 else indices[None]
    return np.broadcast_to(own, (*batch, *own.shape[-3:]))


def _groups(indices: NDArray[np.int64], heads: int, kv_heads: int) -> Any:
    """Yield the query heads and KV heads that share indices (queries, n), and these."""
    count = len(indices)
    if count == 1:
        yield slice(0, heads), slice(0, kv_heads), indices[0]
        return
    group = heads // kv_heads
    own = group if count == kv_heads else 1
    for i in range(count):
        kv_head = i * own // group
        yield slice(i * own, (i + 1) * own), slice(kv_head, kv_head + 1), indices[i]


class _Chosen:
    """The chosen keys that each query sees: ascending, each once, at the start of its row of `keys`."""

    def __init__(self, indices: NDArray[Any], ranges: NDArray[np.int64]) -> None:
        beyond = np.int64(_MOST_KEYS)  # no key has this index
        keys = np.sort(indices.astype(np.int64), axis=-1)
        kept = (keys >= ranges[:, :1]) & (keys < ranges[:, 1:])
        kept[:, 1:] &= keys[:, 1:] != keys[:, :-1]
        keys[~kept] = beyond
        if not kept.all():
            keys.sort(axis=-1)
        self.lengths = np.ascontiguousarray(kept.sum(axis=-1))
        keys = keys[:, : max(int(self.lengths.max(initial=0)), 1)]
        self.named = keys != beyond
        # The core reads the keys of one query after another.
        self.keys: NDArray[np.int32] = np.ascontiguousarray(np.where(self.named, keys, 0), np.int32)
        if not self.keys.shape[1]:
            self.keys, self.named = np.zeros((len(keys), 1), np.int32), np.zeros((len(keys), 1), bool)


class _Terms:
    """What is added to scores: bias, ALiBi and T5's bias of the chosen keys, with -inf where the mask hides one."""

    def __init__(self, options: _core.Options, shape: tuple[int, ...], positions: NDArray[np.int64]) -> None:
        self.options = options
        self.positions = positions
        self.mask = None if options.mask is None else np.broadcast_to(options.mask, shape)
        self.bias = None if options.bias is None else np.broadcast_to(options.bias, shape)
        slopes = options.alibi_slopes
        self.slopes = None if slopes is None else np.broadcast_to(slopes, shape[:-2])

    def at(self, entry: tuple[int, ...], heads: slice, chosen: _Chosen) -> tuple[NDArray[Any] | None, Any]:
        """Return the terms of some heads of a batch entry, (queries, heads, 1, keys), or None; and what is omitted.

        Terms are rounded to the type of computation. So ALiBi omits what a row's terms have in common, (heads,
        queries), which only lse depends on. With sinks, which get no terms, nothing is omitted.
        """
        omitted: Any = 0.0
        options, keys = self.options, chosen.keys[None].astype(np.int64)  # (1, queries, keys)
        terms: Any = None
        if self.bias is not None:
            terms = np.take_along_axis(self.bias[entry][heads], keys, axis=-1).astype(np.float64)
        distances = self.positions[entry][None, :, None] - keys
        if self.slopes is not None:
            far = np.where(chosen.named, abs(distances), np.iinfo(np.int64).max)
            least = np.where(chosen.named.any(axis=-1), far.min(axis=-1), 0)
            if options.sinks is not None:
                least[...] = 0
            slopes = self.slopes[entry][heads][:, None]
            omitted = slopes * least
            terms = -slopes[..., None] * (abs(distances) - least[..., None]) + (0 if terms is None else terms)
        if options.distance_bias is not None:
            table = np.atleast_2d(options.distance_bias)
            columns = np.clip(distances + options.distance_origin, 0, table.shape[1] - 1)
            own = table[heads] if len(table) > 1 else table
            terms = own[:, columns[0]] + (0 if terms is None else terms)
        if self.mask is not None:
            seen = np.take_along_axis(self.mask[entry][heads], keys, axis=-1)
            terms = np.where(seen, 0.0 if terms is None else terms, -np.inf)
        return None if terms is None else terms.swapaxes(0, 1)[:, :, None], omitted


class _Tokens(NamedTuple):
    """Keys or values (KV heads, keys, width) as pages of one token."""

    pages: NDArray[Any]
    width: int

    @classmethod
    def of(cls, array: NDArray[Any]) -> _Tokens:
        size = array.itemsize
        if array.strides[-1] != size or any(n % size for n in array.strides) or not array.flags.aligned:
            array = np.ascontiguousarray(array)
        memory = array.view(ELEMENT_TYPES[array.dtype.name].memory)
        return cls(memory.swapaxes(0, 1)[:, :, None], array.shape[-1])

    def for_core(self) -> _core.CacheTokens:
        return _core.CacheTokens(rows=self.pages, width=self.width)


def _for_heads(options: _core.Options, heads: slice, terms: NDArray[Any] | None, dtype: np.dtype[Any]) -> _core.Options:
    """Return the options that do not depend on the positions of keys, for some heads."""
    own = _core.Options()
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


def _attend(part: Arrays, chosen: _Chosen, options: _core.Options) -> tuple[Any, Any]:
    """Attend with some heads of a batch entry; each query is a sequence of the chosen keys."""
    q, k, v = part
    store = _core.make_cache_store(
        k=_Tokens.of(k).for_core(), v=_Tokens.of(v).for_core(), dtype=ELEMENT_TYPES[k.dtype.name].number, window=-1
    )
    table = _core.make_page_table(pages=chosen.keys, lengths=chosen.lengths, starts=None)
    inputs = _core.CacheInputs(q=q.swapaxes(0, 1)[:, :, None])
    out, lse = _core.attend_cache(_NAME, _core.Step(store=store, sequences=table), inputs, None, options)
    return out[:, :, 0].swapaxes(0, 1), lse[:, :, 0].swapaxes(0, 1)
