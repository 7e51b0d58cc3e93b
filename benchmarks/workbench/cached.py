"""Workloads whose keys and values come from a cache: fills the cache, and makes calls that read it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

import selfattn
from selfattn._bench.numbers import numpy_dtype
from selfattn._bench.options import Cache
from selfattn._bench.peer import Own, Run
from selfattn._bench.workload import Array, Arrays, Workload

# Each step lengthens its cache, so the cache is cut back after this many steps. The average number of keys is that of
# the first step plus 63.
STEPS = 127


class Filled:
    """A cache with a workload's keys and values, except the last token if the call appends it.

    Attributes
    ----------
    cache : KVCache or PagedKVCache
    sequences : list of int or None
        The ids of its sequences if it is paged.
    """

    def __init__(self, workload: Workload, arrays: Arrays) -> None:
        assert workload.cache is not None
        self.description = workload.cache
        later = int(self.description.step)
        self.lengths = [int(length) - later for length in workload.kv_lens()]
        self.cache: Any
        self.sequences: list[int] | None = None
        if self.description.page_size:
            self.cache, self.sequences = _paged(workload, arrays, self.lengths)
        else:
            self.cache = _contiguous(workload, arrays, self.lengths)

    def rewind(self) -> None:
        """Remove the tokens that steps have appended."""
        if self.sequences is None:
            self.cache.truncate(self.lengths)
        else:
            for sequence, length in zip(self.sequences, self.lengths, strict=True):
                self.cache.truncate(sequence, length)


def _description(workload: Workload) -> Cache:
    assert workload.cache is not None
    return workload.cache


def _given(workload: Workload) -> str:
    """Return the names of the arrays that are appended."""
    return "kv" if _description(workload).values == "own" else "k"


def _contiguous(workload: Workload, arrays: Arrays, lengths: list[int]) -> selfattn.KVCache:
    held = max(lengths)
    cache = selfattn.KVCache(
        workload.batch,
        workload.num_kv_heads,
        workload.head_dim,
        held + STEPS * _description(workload).step,
        value_dim=workload.value_dim,
        dtype=_description(workload).storage(workload.dtype),
        values=_description(workload).values,
    )
    # Also write the rows after the end of shorter sequences: untouched memory would be faster to read.
    cache.append(*(arrays[name][:, :, :held] for name in _given(workload)))
    if min(lengths) < held:
        cache.truncate(lengths)
    return cache


def _paged(workload: Workload, arrays: Arrays, lengths: list[int]) -> tuple[selfattn.PagedKVCache, list[int]]:
    description = _description(workload)
    size, shared = description.page_size, description.shared
    own = [-(-(length - shared + STEPS * description.step) // size) + 1 for length in lengths]
    cache = selfattn.PagedKVCache(
        shared // size + sum(own),
        size,
        workload.num_kv_heads,
        workload.head_dim,
        value_dim=workload.value_dim,
        dtype=description.storage(workload.dtype),
        values=description.values,
    )
    _scatter(cache, workload, arrays)
    prompt = cache.allocate()
    if shared:
        cache.append(prompt, *(arrays[name][0, :, :shared] for name in _given(workload)))
    sequences = [cache.fork(prompt) for _ in lengths]
    for b, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
        cache.append(sequence, *(arrays[name][b, :, shared:length] for name in _given(workload)))
    cache.free(prompt)
    return cache, sequences


def _scatter(cache: selfattn.PagedKVCache, workload: Workload, arrays: Arrays) -> None:
    """Allocate all pages and free them in random order, so that they will be reused in that order."""
    token = [arrays[name][0, :, :1] for name in _given(workload)]
    sequences = [cache.allocate() for _ in range(cache.num_pages)]
    for sequence in sequences:
        cache.append(sequence, *token)
    for index in np.random.default_rng(0).permutation(len(sequences)):
        cache.free(sequences[index])


def contiguous(workload: Workload) -> Workload:
    """Return the same workload on a KVCache that is only read."""
    return replace(workload, cache=Cache(_description(workload).dtype, values=_description(workload).values))


def stored(workload: Workload, arrays: Arrays) -> Arrays:
    """Return the workload's arrays with k and v as stored in its cache; if they are rounded there, as float64."""
    if workload.cache is None or workload.cache.storage(workload.dtype) == workload.dtype:
        return arrays
    numpy_dtype("bfloat16")  # makes the name known to NumPy
    cache = Filled(contiguous(workload), arrays).cache
    held = {"k": cache.k.astype(np.float64), "v": cache.v.astype(np.float64)}
    if cache.k_scales is not None:
        held = {"k": held["k"] * cache.k_scales[..., None], "v": held["v"] * cache.v_scales[..., None]}
    return {**arrays, **held}


def cached_call(workload: Workload, arrays: Arrays, threads: int) -> Callable[..., Any]:
    """Return selfattn's call on a cache; it accepts `out`."""
    filled = Filled(workload, arrays)
    if filled.description.step:
        return _step(filled, arrays, threads)
    options: dict[str, Any] = {"num_threads": threads}
    if filled.sequences is not None:
        options |= {"sequences": filled.sequences, "cascade": filled.description.cascade}
    return partial(selfattn.attention_with_kvcache, arrays["q"], filled.cache, **options)


class OwnOnCaches(Own):
    """selfattn, with keys and values from arrays or a cache."""

    def held(self, workload: Workload, arrays: Arrays) -> Arrays:
        """See `Peer.held`."""
        return stored(workload, arrays)

    def prepare(self, workload: Workload, arrays: Arrays, threads: int) -> Run:
        """See `Peer.prepare`."""
        if workload.cache is None:
            return super().prepare(workload, arrays, threads)
        return cached_call(workload, arrays, threads)


def last_token(arrays: Arrays) -> tuple[Array, Array]:
    """Return k and v of the token that a step appends."""
    return arrays["k"][:, :, -1:].copy(), arrays["v"][:, :, -1:].copy()


def _step(filled: Filled, arrays: Arrays, threads: int) -> Callable[..., Any]:
    """Return a call that appends and attends, written so that little besides the call is timed."""
    q, cache, sequences = arrays["q"], filled.cache, filled.sequences
    k, v = last_token(arrays)
    attend = selfattn.attention_with_kvcache
    target = np.empty((*q.shape[:-1], v.shape[-1]), q.dtype)
    left = STEPS

    def step(out: Array = target) -> Any:
        nonlocal left
        if not left:
            filled.rewind()
            left = STEPS
        left -= 1
        return attend(q, cache, k, v, sequences=sequences, out=out, num_threads=threads)

    return step
