"""The memory of a layer's cache: tensors, or a `KVCache` for tokens that are not stored in the model's type."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import selfattn

from .._cache import KVCache
from .._elements import ELEMENT_TYPES
from .._foreign import BITS, converted
from ._deferred import Deferred
from ._tensors import bfloat16, name_of, to_array


class Plain:
    """Keys and values in two tensors (B, heads, capacity, width), in the model's type."""

    def __init__(self, like: tuple[torch.Tensor, torch.Tensor], capacity: int) -> None:
        self.dtype, self.capacity, self.batch = like[0].dtype, capacity, len(like[0])
        with torch.inference_mode(False):  # inference tensors cannot be changed elsewhere
            self.keys, self.values = (x.new_empty((*x.shape[:2], capacity, x.shape[3])) for x in like)

    def extend(
        self, start: int, at: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write tokens to the places from `at` on, and return the part from `start` to their end."""
        end = at + keys.shape[2]
        own_keys, own_values = self.keys, self.values
        own_keys[:, :, at:end] = keys
        own_values[:, :, at:end] = values
        return own_keys[:, :, start:end], own_values[:, :, start:end]

    def part(self, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return views of the tokens from `start` to `end`."""
        return self.keys[:, :, start:end], self.values[:, :, start:end]

    def moved(self, capacity: int, start: int, end: int, sequences: Any = slice(None)) -> Plain:
        """Return new memory that begins with these tokens of these sequences."""
        keys, values = self.keys[sequences, :, start:end], self.values[sequences, :, start:end]
        new = Plain((keys, values), capacity)
        new.extend(0, 0, keys, values)
        return new

    def reorder(self, index: torch.Tensor, end: int) -> None:
        """Replace the first `end` tokens of each sequence b by the tokens of sequence index[b]."""
        changed = torch.nonzero(index != torch.arange(len(index)))[:, 0]
        for tokens in (self.keys, self.values):
            tokens[changed, :, :end] = tokens[index[changed], :, :end]


class Stored:
    """Keys and values in a `KVCache`, whose storage type is not the model's."""

    def __init__(self, like: tuple[torch.Tensor, torch.Tensor], capacity: int, storage: Any) -> None:
        (batch, heads, _, width), value_dim = like[0].shape, like[1].shape[3]
        self.dtype, self.capacity, self.batch = like[0].dtype, capacity, batch
        if storage == "bfloat16":
            bfloat16()  # before this call, NumPy may not know bfloat16
        self.cache = KVCache(batch, heads, width, capacity, value_dim=value_dim, dtype=storage)

    def extend(
        self, start: int, at: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[StoredTokens, StoredTokens]:
        """Write tokens to the places from `at` on, and return the part from `start` to their end."""
        if self.cache.lengths[0] != at:
            self.cache.truncate(at)
        self.cache.append(to_array(keys), to_array(values))
        return self.part(start, at + keys.shape[2])

    def part(self, start: int, end: int) -> tuple[StoredTokens, StoredTokens]:
        """Return descriptions of the tokens from `start` to `end`."""
        return StoredTokens.pair(self.cache, start, end, self.dtype)

    def moved(self, capacity: int, start: int, end: int, sequences: Any = slice(None)) -> Stored:
        """Return new memory that begins with these tokens of these sequences."""
        if isinstance(sequences, torch.Tensor):
            sequences = to_array(sequences)
        arrays = [array[sequences, :, start:end] for array in self.cache._store.arrays()]
        widths = (self.cache.head_dim, self.cache.value_dim)
        like = [torch.empty((*arrays[0].shape[:2], 0, width), dtype=self.dtype) for width in widths]
        new = Stored((like[0], like[1]), capacity, self.cache._store.name)
        for store, array in zip(new.cache._store.arrays(), arrays, strict=True):
            store[:, :, : end - start] = array
        new.cache._set(np.full(new.batch, end - start), np.zeros(new.batch, np.int64))
        return new

    def reorder(self, index: torch.Tensor, end: int) -> None:
        """Replace each sequence b by sequence index[b]."""
        self.cache.reorder(to_array(index))


class StoredTokens(Deferred):
    """Keys or values (B, heads, tokens, width) in a `KVCache`: the tokens from `start` to `end` of each sequence.

    `attend_stored` reads them in place. Every other operation gets tokens that are converted to the model's type.
    """

    cache: KVCache
    start: int
    end: int

    @staticmethod
    def pair(cache: KVCache, start: int, end: int, dtype: torch.dtype) -> tuple[StoredTokens, StoredTokens]:
        """Return descriptions of the keys and values in a cache."""
        store = cache._store
        keys, values = (
            StoredTokens.without_memory((cache.batch, cache.num_kv_heads, end - start, width), dtype)
            for width in (cache.head_dim, cache.value_dim)
        )
        for described, tokens, scales in ((keys, store.k, store.k_scales), (values, store.v, store.v_scales)):
            described.cache, described.start, described.end, described.made = cache, start, end, None
            words, row_scales = tokens[:, :, start:end], None if scales is None else scales[:, :, start:end]
            described.make = partial(_converted, store.name, words, row_scales, described.shape[3], dtype)
        return keys, values


def _converted(
    name: str, words: NDArray[Any], scales: NDArray[np.float32] | None, width: int, dtype: torch.dtype
) -> torch.Tensor:
    return torch.from_numpy(ELEMENT_TYPES[name].numbers(words, scales, width)).to(dtype)


def can_attend(q_len: int, k: Any, v: Any, options: dict[str, Any]) -> bool:
    """Whether these are the newest tokens of one cache, and the queries are the last of these tokens."""
    if type(k) is not StoredTokens or type(v) is not StoredTokens:
        return False
    if "key_indices" in options or "block_indices" in options:  # which caches do not take
        return False
    if not (k.cache is v.cache and k.start == v.start and k.end == v.end == k.cache.lengths[0]):
        return False
    if not _suits(k.cache._store.name, k.dtype) or k.start % options.get("chunk", 1):  # chunks count from token 0
        return False
    return bool(options.get("q_offset", k.shape[2] - q_len) == k.shape[2] - q_len)


def _suits(storage: str, dtype: torch.dtype) -> bool:
    """Whether queries of a dtype can attend to stored tokens, which must have the same type or a narrower one."""
    own = name_of(dtype)
    return storage == own or ELEMENT_TYPES[storage].element_bytes < ELEMENT_TYPES[own].element_bytes


def attend_stored(q: NDArray[Any], k: StoredTokens, out: NDArray[Any], options: dict[str, Any]) -> Any:
    """Attend to stored tokens with the options of `selfattn.attention`, and return what that function would return."""
    kv_len, hidden = k.end - k.start, k.start
    options = {"causal": False, **options}
    options.pop("q_offset", None)
    if "bias" in options and options["bias"].dtype == BITS:
        options["bias"] = converted(options["bias"], np.dtype(np.float32))
    starts = options.pop("kv_starts", 0)
    if hidden or np.any(starts):  # the cache may hold older tokens, which no query sees
        options["kv_starts"] = np.broadcast_to(starts + hidden, k.cache.lengths.shape)
    visible = _visible(options, kv_len)
    if visible is not None:
        numbers = np.where(visible, np.float32(0), np.float32(-np.inf))
        options["bias"] = numbers + options["bias"].astype(np.float32) if "bias" in options else numbers
    if hidden and "bias" in options:  # it has no numbers for older tokens
        bias = options["bias"]
        older = np.zeros((*bias.shape[:-1], hidden), bias.dtype)
        options["bias"] = np.concatenate((older, np.broadcast_to(bias, (*bias.shape[:-1], kv_len))), axis=-1)
    results = selfattn.attention_with_kvcache(q, k.cache, out=out, **options)
    if hidden and "return_weights" in options:
        return *results[:-1], results[-1][..., hidden:]
    return results


def _visible(options: dict[str, Any], kv_len: int) -> NDArray[np.bool_] | None:
    """Return which keys mask and kv_lens leave visible, broadcasting to (B, H, Sq, Sk); remove the two."""
    visible: NDArray[np.bool_] | None = options.pop("mask", None)
    lengths = options.pop("kv_lens", None)
    if lengths is None:
        return visible
    inside: NDArray[np.bool_] = (np.arange(kv_len) < lengths[:, None])[:, None, None, :]
    return inside if visible is None else visible & inside
