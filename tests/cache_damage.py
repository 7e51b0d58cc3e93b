"""Buffers with damaged bytes: opened and used in a process of its own, which must survive."""

from __future__ import annotations

from typing import Any

import numpy as np
from hostile_run import limit_memory

import selfattn as sa

DOCUMENTED = (TypeError, ValueError, MemoryError, BufferError)


def use(cache: Any) -> None:
    """Call what there is; answers may be anything."""
    if isinstance(cache, sa.KVCache):
        q = np.ones((cache.batch, cache.num_kv_heads, 1, cache.head_dim), np.float32)
        attempts: list[Any] = [
            lambda: sa.attention_with_kvcache(q, cache),
            lambda: cache.append(q, q),
            lambda: cache.reorder([0] * cache.batch),
            lambda: cache.truncate(0),
        ]
    else:
        q = np.ones((1, cache.num_kv_heads, 1, cache.head_dim), np.float32)
        names: list[int] = []
        attempts = [
            lambda: names.extend(cache.sequences[:3]),
            lambda: [sa.attention_with_kvcache(q, cache, sequences=[name]) for name in names],
            lambda: [cache.append(name, q[0], q[0]) for name in names],
            lambda: [cache.fork(name) for name in names],
            lambda: [cache.free(name) for name in names],
            lambda: cache.num_free_pages,
        ]
    for attempt in attempts:
        try:
            attempt()
        except DOCUMENTED:
            continue


def run(kind: str) -> None:
    """Damage up to four bytes of what is not data, many times."""
    limit_memory(2 << 30)
    rng = np.random.default_rng(3)
    if kind == "contiguous":
        shape, size = (2, 1, 4, 8), sa.KVCache.buffer_size(2, 1, 4, 8)
        make: Any = sa.KVCache
    else:
        shape, size = (6, 4, 1, 4), sa.PagedKVCache.buffer_size(6, 4, 1, 4)
        make = sa.PagedKVCache
    good = np.zeros(size, np.uint8)
    cache = make(*shape, buffer=good)
    if kind == "paged":
        for _ in range(2):
            cache.append(cache.allocate(), *np.ones((2, 1, 5, 4), np.float32))
    else:
        cache.append(*np.ones((2, 2, 1, 5, 4), np.float32))
    opened = 0
    for _ in range(3000):
        buffer = good.copy()
        places = rng.integers(0, len(buffer), rng.integers(1, 5))
        buffer[places] = rng.choice([0, 1, 0x7F, 0x80, 0xFF], len(places))
        try:
            damaged = make(*shape, buffer=buffer)
        except DOCUMENTED:
            continue
        opened += 1
        use(damaged)
    assert opened > 100, "nearly every damage was noticed at once: damage less"
