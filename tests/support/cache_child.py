"""The child processes of `test_cache_sharing`: a token's number determines its contents."""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np

import selfattn as sa

BATCH, HEADS, DIM = 2, 2, 8
# A ring overwrites slots all the time.
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"capacity": 4096},
    "int8": {"capacity": 4096, "dtype": "int8"},
    "ring": {"capacity": 700, "window": 60},
}


def size_of(kind: str) -> int:
    return int(sa.KVCache.buffer_size(BATCH, HEADS, DIM, **KINDS[kind]))


def open_cache(kind: str, buffer: Any) -> sa.KVCache:
    return sa.KVCache(BATCH, HEADS, DIM, buffer=buffer, **KINDS[kind])


def tokens(first: int, count: int) -> tuple[Any, Any]:
    """Return k and v of the tokens from `first` on, (batch, heads, count, dim): all exact in float32."""
    numbers = np.arange(first, first + count)[:, np.newaxis] % (1 << 16)
    k = np.stack([(numbers * 16 + head + np.arange(DIM) / 16).astype(np.float32) for head in range(HEADS)])
    return np.broadcast_to(k, (BATCH, *k.shape)), np.broadcast_to(-k, (BATCH, *k.shape))


def length(cache: sa.KVCache) -> int:
    """Return the one length that all rows must have."""
    (found,) = set(cache.lengths.tolist())
    return int(found)


def append(cache: sa.KVCache, count: int) -> None:
    """Continue at the cache's end."""
    cache.append(*tokens(length(cache), count))


def append_without_end(path: str, kind: str, seed: int) -> None:
    """Append to a cache in a file, and start again when it is full, until the process is killed."""
    rng = np.random.default_rng(seed)
    cache = open_cache(kind, np.memmap(path, np.uint8, "r+"))
    print("ready", flush=True)
    while True:
        count = int(rng.choice([1, 1, 2, 17, 300, 600]))
        if cache.window is None and length(cache) + count > cache.capacity - 1:
            cache.truncate(int(rng.integers(0, 50)))
        elif rng.random() < 0.3:
            k, v = tokens(length(cache), count)
            near = {} if cache.window is None else {"window": (cache.window, 0)}
            sa.attention_with_kvcache(k, cache, k, v, num_threads=1, **near)
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
    cache = open_cache(kind, memory.buf)
    append(cache, count)
    print(length(cache), flush=True)
    os._exit(0)  # or Python would complain that the cache still uses the block
