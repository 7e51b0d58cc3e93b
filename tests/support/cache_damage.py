"""Buffers with damaged bytes: opened and used in a separate process, which must survive."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from hostile_run import limit_memory

import selfattn as sa

DOCUMENTED = (TypeError, ValueError, MemoryError, BufferError)


def use(cache: sa.KVCache) -> None:
    """Call every method; results may be anything."""
    q = np.ones((cache.batch, cache.num_kv_heads, 1, cache.head_dim), np.float32)
    near: dict[str, Any] = {} if cache.window is None else {"window": (cache.window, 0)}
    attempts: list[Callable[[], Any]] = [
        lambda: sa.attention_with_kvcache(q, cache, **near),
        lambda: sa.attention_with_kvcache(q, cache, q, q, **near),
        lambda: cache.append(q, q),
        lambda: cache.reorder([0] * cache.batch),
        lambda: cache.truncate(max(int(cache.lengths.min()) - 3, 0)),
    ]
    for attempt in attempts:
        try:
            attempt()
        except DOCUMENTED:
            continue


def run(window: int | None) -> None:
    """Damage up to four bytes, most of them in front of the tokens, many times."""
    limit_memory(2 << 30)
    rng = np.random.default_rng(3)
    shape: tuple[int, ...] = (2, 1, 4, 8)
    good = np.zeros(sa.KVCache.buffer_size(*shape, window=window), np.uint8)
    sa.KVCache(*shape, window=window, buffer=good).append(*np.ones((2, 2, 1, 5, 4), np.float32))
    header = len(good) - 2 * 2 * 8 * 4 * 4
    opened = 0
    for _ in range(20_000):
        buffer = good.copy()
        places = rng.integers(0, header, rng.integers(1, 5))
        buffer[places] = rng.choice([0, 1, 3, 0x7F, 0x80, 0xFF], len(places))
        try:
            damaged = sa.KVCache(*shape, window=window, buffer=buffer)
        except DOCUMENTED:
            continue
        opened += 1
        use(damaged)
    assert opened > 500, "nearly every damage was noticed at once: damage less"
