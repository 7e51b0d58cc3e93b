"""Hostile calls of functions that compute gradients."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
from hostile_arrays import FLOATS, OUTPUTS, Call, floats, strided

import selfattn as sa

Optional = dict[str, Callable[[], Any]]


def some(rng: random.Random, optional: Optional, count: int) -> dict[str, Any]:
    return {name: optional[name]() for name in rng.sample(list(optional), rng.randrange(count))}


def targets(rng: random.Random, arrays: dict[str, Any]) -> Optional:
    """Return arguments for gradients to arrays, some of which the call overwrites or adds to."""
    names = rng.sample(list(arrays), rng.randrange(1, len(arrays) + 1))
    return {
        "wrt": lambda: tuple(names),
        "into": lambda: {name: strided(rng, arrays[name].shape, arrays[name].dtype, OUTPUTS) for name in names},
        "accumulate": lambda: True,
    }


def gradient_call(rng: random.Random) -> Call:
    dtype = rng.choice(FLOATS)
    heads, q_len, kv_len, dim = (rng.randrange(1, 6) for _ in range(4))
    q, out, grad_out = (floats(rng, dtype, 2, heads, q_len, dim) for _ in range(3))
    k, v = (floats(rng, dtype, 2, 1, kv_len, dim) for _ in "kv")
    lse = floats(rng, np.dtype(np.float64 if dtype == np.float64 else np.float32), 2, heads, q_len)
    optional: Optional = {
        **targets(rng, {"q": q, "k": k, "v": v}),
        "grad_lse": lambda: np.ones(lse.shape, lse.dtype),
        "grad_weights": lambda: np.ones((*lse.shape, kv_len), lse.dtype),
        "mask": lambda: np.ones((q_len, kv_len), bool),
        "bias": lambda: floats(rng, dtype, heads, q_len, kv_len),
        "causal": lambda: True,
        "kv_lens": lambda: np.full(2, kv_len),
        "sinks": lambda: floats(rng, dtype, heads),
        "dropout": lambda: 0.3,
        "seed": lambda: rng.randrange(1 << 64),
        "num_threads": lambda: 1,
    }
    return Call(sa.attention_backward, [grad_out, q, k, v, out, lse], some(rng, optional, 6))


def pulled_back(q: Any, k: Any, v: Any, grad_out: Any, **options: Any) -> Any:
    return sa.attention_vjp(q, k, v, **options)[1](grad_out)


def vjp_call(rng: random.Random) -> Call:
    dtype = rng.choice(FLOATS)
    heads, length, dim = (rng.randrange(1, 6) for _ in range(3))
    operands = [floats(rng, dtype, heads, length, dim) for _ in "qkvg"]
    optional: Optional = {
        "wrt": lambda: rng.sample(["q", "k", "v", "bias", "sinks", "scale"], 2),
        "bias": lambda: floats(rng, dtype, heads, 1, length),
        "sinks": lambda: floats(rng, dtype, heads),
        "scale": lambda: 0.5,
        "window": lambda: (rng.randrange(9), None),
        "dropout": lambda: 0.3,
        "seed": lambda: rng.randrange(1 << 64),
    }
    return Call(pulled_back, operands, some(rng, optional, 5))


def varlen_call(rng: random.Random) -> Call:
    dtype = rng.choice(FLOATS)
    lengths = [rng.randrange(5) for _ in range(rng.randrange(1, 4))]
    heads, dim, total = rng.randrange(1, 3), rng.randrange(1, 6), sum(lengths)
    q, k, v, out, grad_out = (floats(rng, dtype, total, heads, dim) for _ in range(5))
    lse = floats(rng, np.dtype(np.float64 if dtype == np.float64 else np.float32), heads, total)
    offsets = np.cumsum([0, *lengths])
    optional: Optional = {
        **targets(rng, {"q": q, "k": k, "v": v}),
        "grad_lse": lambda: np.ones(lse.shape, lse.dtype),
        "causal": lambda: True,
        "sinks": lambda: floats(rng, dtype, heads),
    }
    return Call(sa.attention_varlen_backward, [grad_out, q, k, v, out, lse, offsets, offsets], some(rng, optional, 5))


def relative_call(rng: random.Random) -> Call:
    dtype = rng.choice(FLOATS)
    heads, segment, memory, dim = (rng.randrange(1, 5) for _ in range(4))
    q, out, grad_out = (floats(rng, dtype, heads, segment, dim) for _ in range(3))
    k, v = (floats(rng, dtype, heads, memory + segment, dim) for _ in "kv")
    r = floats(rng, dtype, heads, rng.randrange(1, 9), dim)
    u, w = (floats(rng, dtype, heads, dim) for _ in "uw")
    lse = floats(rng, np.dtype(np.float64 if dtype == np.float64 else np.float32), heads, segment)
    optional: Optional = {
        **targets(rng, {"q": q, "k": k, "v": v, "r": r, "u": u, "w": w}),
        "grad_lse": lambda: np.ones(lse.shape, lse.dtype),
        "mem_len": lambda: memory,
    }
    return Call(sa.relative_attention_backward, [grad_out, q, k, v, r, u, w, out, lse], some(rng, optional, 5))


def layer_pulled_back(x: Any, grad_out: Any, **options: Any) -> Any:
    return sa.self_attention_vjp(x, **options)[1](grad_out)


def layer_call(rng: random.Random) -> Call:
    dtype = rng.choice(FLOATS)
    length, depth, heads, dim = (rng.randrange(1, 6) for _ in range(4))
    x, grad_out = floats(rng, dtype, 2, length, depth), floats(rng, dtype, 2, length, heads * dim)
    weights = {f"w_{name}": floats(rng, dtype, depth, heads * dim) for name in "qkv"}
    optional: Optional = {
        "wrt": lambda: rng.sample(["x", "w_q", "w_k", "w_v", "b_q"], 2),
        "b_q": lambda: floats(rng, dtype, heads * dim),
        "context": lambda: floats(rng, dtype, 2, 4, depth),
        "rope": lambda: True,
        "causal": lambda: True,
        "mask": lambda: np.ones((length, length), bool),
    }
    return Call(layer_pulled_back, [x, grad_out], {**weights, "num_heads": heads, **some(rng, optional, 4)})


MAKERS = [gradient_call, gradient_call, vjp_call, varlen_call, relative_call, layer_call]
