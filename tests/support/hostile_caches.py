"""Calls of caches and of packed sequences, for `hostile_calls`: each cache is new, small and holds a few tokens."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
from hostile_arrays import FLOATS, OUTPUTS, Call, floats, strided

import selfattn as sa

STORAGE = ["float32", "float64", "float16", "bfloat16", "int8", "int4"]
CAPACITY, PAGE = 8, 2


def some(rng: random.Random, optional: dict[str, Callable[[], Any]], most: int) -> dict[str, Any]:
    return {name: optional[name]() for name in rng.sample(list(optional), rng.randrange(most))}


def varlen_call(rng: random.Random) -> Call:
    dtype, kv_heads = rng.choice(FLOATS), rng.choice((1, 2))
    heads, dim = kv_heads * rng.choice((1, 2)), rng.randrange(1, 9)
    q_lens, kv_lens = ([rng.randrange(6) for _ in range(3)] for _ in "qk")
    q = floats(rng, dtype, sum(q_lens), heads, dim)
    k, v = (floats(rng, dtype, sum(kv_lens), kv_heads, dim) for _ in "kv")
    optional: dict[str, Callable[[], Any]] = {
        "mask": lambda: [None, np.ones((q_lens[1], kv_lens[1]), bool), None],
        "bias": lambda: [floats(rng, dtype, 1, n) for n in kv_lens],
        "causal": lambda: True,
        "q_offset": lambda: np.arange(3),
        "window": lambda: (rng.randrange(9), None),
        "alibi_slopes": lambda: floats(rng, dtype, 3, heads),
        "sinks": lambda: floats(rng, dtype, heads),
        "return_lse": lambda: True,
        "return_weights": lambda: True,
        "out": lambda: strided(rng, q.shape, dtype, OUTPUTS),
    }
    ends = [np.cumsum([0, *lens]) for lens in (q_lens, kv_lens)]
    if rng.random() < 0.2:
        lists = [np.split(x, end[1:-1]) for x, end in ((q, ends[0]), (k, ends[1]), (v, ends[1]))]
        return Call(sa.attention_varlen, [*lists], some(rng, {"causal": optional["causal"]}, 2))
    return Call(sa.attention_varlen, [q, k, v, *ends], some(rng, optional, 5))


def description(rng: random.Random, paged: bool) -> tuple[list[int], dict[str, Any]]:
    kv_heads, dim = rng.choice((1, 2)), rng.randrange(1, 6)
    shape = [6, PAGE, kv_heads, dim] if paged else [rng.randrange(1, 4), kv_heads, dim, CAPACITY]
    optional: dict[str, Callable[[], Any]] = {
        "value_dim": lambda: rng.randrange(1, 6),
        "dtype": lambda: rng.choice(STORAGE),
        "window": lambda: rng.randrange(4),
    }
    return shape, some(rng, optional, 4)


def filled(rng: random.Random, paged: bool) -> tuple[Any, list[int]]:
    """Return a cache that holds a few tokens, and the ids of its sequences."""
    shape, named = description(rng, paged)
    cache: Any = (sa.PagedKVCache if paged else sa.KVCache)(*shape, **named)
    count = rng.randrange(4)
    k, v = (np.ones((cache.num_kv_heads, count, n), np.float32) for n in (cache.head_dim, cache.value_dim))
    if not paged:
        cache.append(*(np.broadcast_to(x, (cache.batch, *x.shape)) for x in (k, v)))
        return cache, list(range(cache.batch))
    names = [cache.allocate()]
    cache.append(names[0], k, v)
    return cache, [*names, cache.fork(names[0])][: rng.randrange(1, 3)]


def new_cache_call(rng: random.Random) -> Call:
    paged = rng.random() < 0.5
    shape, named = description(rng, paged)
    if rng.random() < 0.3:
        named["buffer"] = bytearray(1 << 16) if rng.random() < 0.5 else strided(rng, (64,), np.dtype("u1"))
    return Call(sa.PagedKVCache if paged else sa.KVCache, [*shape], named)


def cached_call(rng: random.Random) -> Call:
    cache, rows = filled(rng, rng.random() < 0.5)
    q_len, heads = rng.randrange(1, 4), cache.num_kv_heads * rng.choice((1, 2))
    dtype = rng.choice(FLOATS)
    q = floats(rng, dtype, len(rows), heads, q_len, cache.head_dim)
    tokens = [floats(rng, dtype, len(rows), cache.num_kv_heads, q_len, n) for n in (cache.head_dim, cache.value_dim)]
    optional: dict[str, Callable[[], Any]] = {
        "rope": lambda: sa.RoPE(rotary_dim=2),
        "mask": lambda: np.ones((q_len, q_len), bool),
        "bias": lambda: floats(rng, dtype, heads, q_len, 1),
        "causal": lambda: False,
        "cascade": lambda: True,
        "alibi_slopes": lambda: floats(rng, dtype, heads),
        "sinks": lambda: floats(rng, dtype, heads),
        "softcap": lambda: 2.0,
        "return_lse": lambda: True,
        "return_weights": lambda: True,
        "out": lambda: strided(rng, (len(rows), heads, q_len, cache.value_dim), dtype, OUTPUTS),
    }
    named = some(rng, optional, 4)
    if cache.window is not None:
        named["window"] = (cache.window, 0)
    if isinstance(cache, sa.PagedKVCache):
        named["sequences"] = rows
    return Call(sa.attention_with_kvcache, [q, cache, *(tokens if rng.random() < 0.7 else [])], named)


def method_call(rng: random.Random) -> Call:
    paged = rng.random() < 0.5
    cache, rows = filled(rng, paged)
    shape = (cache.num_kv_heads, rng.randrange(4)) if paged else (len(rows), cache.num_kv_heads, rng.randrange(4))
    tokens = [floats(rng, rng.choice(FLOATS[:2]), *shape, n) for n in (cache.head_dim, cache.value_dim)]
    calls = [(cache.append, [*rows[: int(paged)], *tokens])] * 2
    if paged:
        calls += [(cache.truncate, [rows[0], 0]), (cache.fork, rows[:1]), (cache.free, rows[:1]), (cache.allocate, [])]
    else:
        calls += [(cache.truncate, [np.zeros(len(rows), int)]), (cache.reorder, [np.zeros(len(rows), int)])]
    function, arguments = rng.choice(calls)
    return Call(function, list(arguments), {})


MAKERS = [varlen_call, new_cache_call, cached_call, cached_call, method_call]
