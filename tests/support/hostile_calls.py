"""Hostile calls: well-formed ones with some arguments replaced by anything else.

`make(seed, index)` gives the same call in every run.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import hostile_caches
import hostile_gradients
import numpy as np
from hostile_arrays import FLOATS, OUTPUTS, Call, floats, hostile, strided

import selfattn as sa


def make(seed: int, index: int) -> Call:
    rng = random.Random(f"{seed} {index}")
    call = rng.choice(MAKERS)(rng)
    for _ in range(rng.randrange(4)):
        place = rng.randrange(len(call.positional) + len(call.named) + 1)
        if place < len(call.positional):
            call.positional[place] = hostile(rng, call.positional[place])
        elif place == len(call.positional) + len(call.named):
            call.named[rng.choice(NAMES)] = hostile(rng, None)
        else:
            name = list(call.named)[place - len(call.positional)]
            call.named[name] = hostile(rng, call.named[name])
    return call


def attention_call(rng: random.Random) -> Call:
    dtype = rng.choice(FLOATS)
    batch, kv_heads = rng.choice((1, 2, 3)), rng.choice((1, 2))
    q_len, kv_len, dim = (rng.randrange(1, 9) for _ in range(3))
    heads = kv_heads * rng.choice((1, 2))
    q = floats(rng, dtype, batch, heads, q_len, dim)
    k, v = (floats(rng, dtype, batch, kv_heads, kv_len, dim) for _ in "kv")
    optional: dict[str, Callable[[], Any]] = {
        "mask": lambda: np.ones((q_len, kv_len), bool),
        "bias": lambda: floats(rng, dtype, heads, q_len, kv_len),
        "causal": lambda: True,
        "q_offset": lambda: np.arange(batch),
        "window": lambda: (rng.randrange(9), None),
        "chunk": lambda: rng.randrange(1, 9),
        "q_lens": lambda: np.full(batch, q_len),
        "kv_lens": lambda: np.full(batch, kv_len),
        "kv_starts": lambda: np.full(batch, kv_len // 2),
        "prefix_lens": lambda: np.full(batch, kv_len // 2),
        "scale": lambda: 0.5,
        "softcap": lambda: 3.0,
        "alibi_slopes": lambda: floats(rng, dtype, heads),
        "sinks": lambda: floats(rng, dtype, heads),
        "layout": lambda: "bhsd",
        "return_lse": lambda: True,
        "return_weights": lambda: True,
        "out": lambda: strided(rng, (batch, heads, q_len, dim), dtype, OUTPUTS),
        "num_threads": lambda: 1,
        "dropout": lambda: 0.3,
        "seed": lambda: rng.randrange(1 << 64),
    }
    named = {name: optional[name]() for name in rng.sample(list(optional), rng.randrange(6))}
    if "out" in named and rng.random() < 0.1:
        return Call(sa.attention, [q, k, v], {**named, "out": q})
    return Call(sa.attention, [q, k, v], named)


def chosen_call(rng: random.Random) -> Call:
    """Make a call of attention that chooses keys, or blocks of keys for blocks of queries."""
    call = attention_call(rng)
    (batch, _, q_len, _), (_, kv_heads, kv_len, _) = (x.shape for x in call.positional[:2])
    queries, keys = rng.choice(((1, 1), (1, 3), (2, 3), (9, 2)))
    shape = rng.choice((batch, 1)), rng.choice((kv_heads, 1)), rng.choice((-(-q_len // queries), 1)), rng.randrange(4)
    indices = np.array([rng.randrange(-1, -(-kv_len // keys)) for _ in range(math.prod(shape))], int).reshape(shape)
    chosen = {"key_indices": indices} if keys == 1 else {"block_indices": indices, "block_size": (queries, keys)}
    kept = {name: x for name, x in call.named.items() if name not in ("return_weights", "dropout", "seed")}
    return call._replace(named={**kept, **chosen})


def relative_call(rng: random.Random) -> Call:
    dtype = rng.choice(FLOATS)
    heads, segment, memory, dim = (rng.randrange(1, 5) for _ in range(4))
    q, *kv = (floats(rng, dtype, heads, length, dim) for length in (segment, memory + segment, memory + segment))
    r = floats(rng, dtype, *rng.choice(((heads,), ())), rng.randrange(1, 9), dim)
    u, w = (floats(rng, np.dtype(np.float64), heads, dim) for _ in "uw")
    named: dict[str, Any] = {"mem_len": memory}
    if rng.random() < 0.3:
        named |= {"causal": False, "r_origin": rng.randrange(1, r.shape[-2] + 1)}
    if rng.random() < 0.3:
        named["out"] = strided(rng, (heads, segment, dim), dtype, OUTPUTS)
    return Call(sa.relative_attention, [q, *kv, r, u, w], named)


def t5_call(rng: random.Random) -> Call:
    heads, length = rng.randrange(1, 5), rng.randrange(1, 40)
    q, k, v = (floats(rng, np.dtype(np.float32), heads, length, 4) for _ in "qkv")
    table = floats(rng, rng.choice(FLOATS), 2 * rng.randrange(2, 9), heads)
    return Call(sa.attention, [q, k, v], {"t5": sa.T5Bias(table, rng.random() < 0.5, rng.randrange(9, 50))})


def layer_call(rng: random.Random) -> Call:
    dtype = rng.choice(FLOATS)
    length, depth, heads, dim = (rng.randrange(1, 6) for _ in range(4))
    named = {
        "x": floats(rng, dtype, 2, length, depth),
        **{f"w_{name}": floats(rng, dtype, depth, heads * dim) for name in "qkv"},
        "num_heads": heads,
    }
    optional: dict[str, Callable[[], Any]] = {
        "w_o": lambda: floats(rng, dtype, heads * dim, 3),
        "b_q": lambda: floats(rng, dtype, heads * dim),
        "b_v": lambda: floats(rng, dtype, heads * dim),
        "context": lambda: floats(rng, dtype, 2, 4, depth),
        "rope": lambda: True,
        "positions": lambda: np.arange(length),
        "num_kv_heads": lambda: heads,
        "return_lse": lambda: True,
        "out": lambda: strided(rng, (2, length, heads * dim), dtype, OUTPUTS),
    }
    named.update({name: optional[name]() for name in rng.sample(list(optional), rng.randrange(4))})
    return Call(sa.self_attention, [], named)


def rope_call(rng: random.Random) -> Call:
    dtype = rng.choice(FLOATS)
    shape = tuple(rng.randrange(1, 7) for _ in range(rng.choice((2, 3, 4))))
    named: dict[str, Any] = {"rope": sa.RoPE(rotary_dim=shape[-1] // 2 * 2 or None)}
    if rng.random() < 0.5:
        named["positions"] = np.arange(shape[-2])
    elif shape[-1] > 1 and rng.random() < 0.5:
        named["rope"] = sa.RoPE(inv_freq=[0.5] * (shape[-1] // 2), axes=[1] * (shape[-1] // 2))
        named["positions"] = np.zeros((2, shape[-2]), int)
    if rng.random() < 0.5:
        named["out"] = strided(rng, shape, dtype, OUTPUTS)
    return Call(sa.apply_rope, [floats(rng, dtype, *shape)], named)


def absorbed(q: Any, k: Any, v: Any, kv_len: Any, first: Any, out: Any = None, **options: Any) -> Any:
    state = sa.AttentionState(q, kv_len=kv_len, first=first, **options)
    state.absorb(k, v)
    return state.result(out)


def piece_call(rng: random.Random) -> Call:
    call = attention_call(rng)
    named = {
        name: x for name, x in call.named.items() if not name.startswith("return") and name not in ("mask", "bias")
    }
    length = call.positional[1].shape[2]
    first = rng.randrange(9)
    return Call(absorbed, [*call.positional, first + length + rng.randrange(9), first], named)


def explain_call(rng: random.Random) -> Call:
    return attention_call(rng)._replace(function=sa.explain)


MAKERS = [
    *[attention_call] * 4,
    chosen_call,
    layer_call,
    layer_call,
    relative_call,
    t5_call,
    rope_call,
    explain_call,
    piece_call,
    *hostile_caches.MAKERS,
    *hostile_gradients.MAKERS,
]
NAMES = [
    "is_causal",
    "q",
    "precision",
    *(sa.attention.__kwdefaults__ or {}),
    "w_o",
    "context",
    "positions",
    "rope",
    "",
    "mem_len",
    "r_origin",
]
NAMES += ["sequences", "cascade", "dtype", "buffer", "cu_seqlens_q", "wrt", "into", "accumulate", "grad_lse"]
