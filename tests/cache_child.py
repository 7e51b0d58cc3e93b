"""The child processes of `test_cache_sharing`: whoever knows a token's number knows what it must hold."""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np

import selfattn as sa

BATCH, HEADS, DIM, CAPACITY, PAGE = 2, 2, 8, 4096, 16
PAGES = CAPACITY // PAGE


def token(numbers: Any, head: int) -> Any:
    """Return the keys of these tokens; their values are the keys with the other sign."""
    return (np.asarray(numbers)[:, np.newaxis] * 16 + head + np.arange(DIM) / 16).astype(np.float32)


def tokens(first: int, count: int) -> tuple[Any, Any]:
    """Return k and v of the tokens from `first` on, (Hkv, count, D)."""
    k = np.stack([token(np.arange(first, first + count), head) for head in range(HEADS)])
    return k, -k


def open_contiguous(buffer: Any) -> sa.KVCache:
    return sa.KVCache(BATCH, HEADS, DIM, CAPACITY, buffer=buffer)


def open_paged(buffer: Any) -> sa.PagedKVCache:
    return sa.PagedKVCache(PAGES, PAGE, HEADS, DIM, buffer=buffer)


def batch(first: int, count: int) -> list[Any]:
    return [np.broadcast_to(x, (BATCH, *x.shape)) for x in tokens(first, count)]


def append(cache: Any, count: int) -> None:
    """Go on where the cache ends."""
    if isinstance(cache, sa.KVCache):
        cache.append(*batch(int(cache.lengths[0]), count))
        return
    for name in cache.sequences:
        cache.append(name, *tokens(cache.length(name), count))


def append_without_end(path: str, kind: str, seed: int) -> None:
    """Append to a cache in a file, start again when it is full, until somebody ends the process."""
    rng = np.random.default_rng(seed)
    memory = np.memmap(path, np.uint8, "r+")
    cache: Any = open_contiguous(memory) if kind == "contiguous" else open_paged(memory)
    if kind == "paged" and not cache.sequences:
        cache.allocate()
    print("ready", flush=True)
    while True:
        count = int(rng.choice([1, 1, 2, 17, 300]))
        length = int(cache.lengths[0]) if kind == "contiguous" else cache.length(cache.sequences[0])
        if length + count > CAPACITY - PAGE:
            shorter = int(rng.integers(0, 50))
            if kind == "contiguous":
                cache.truncate(shorter)
            else:
                cache.truncate(cache.sequences[0], shorter)
            continue
        step = rng.random()
        if kind == "paged" and step < 0.2:
            twin = cache.fork(cache.sequences[0])
            if cache.num_free_pages:
                cache.append(twin, *tokens(cache.length(twin), 1))
            cache.free(twin)
        elif step < 0.4:
            new = batch(length, count) if kind == "contiguous" else [x[np.newaxis] for x in tokens(length, count)]
            named = {} if kind == "contiguous" else {"sequences": cache.sequences[:1]}
            sa.attention_with_kvcache(new[0], cache, *new, num_threads=1, **named)
        else:
            append(cache, count)


def append_to_shared(name: str, kind: str, count: int) -> None:
    """Append to a cache in another process's shared memory."""
    from multiprocessing import resource_tracker, shared_memory

    if sys.version_info >= (3, 13):
        memory = shared_memory.SharedMemory(name, track=False)
    else:  # which would remove the block at this process's end
        memory = shared_memory.SharedMemory(name)
        resource_tracker.unregister(memory._name, "shared_memory")  # type: ignore[attr-defined]
    cache: Any = open_contiguous(memory.buf) if kind == "contiguous" else open_paged(memory.buf)
    append(cache, count)
    print(int(cache.lengths[0]) if kind == "contiguous" else cache.length(cache.sequences[0]), flush=True)
    os._exit(0)  # or Python would complain that the cache still uses the block
