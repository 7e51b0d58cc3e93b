"""Calls that nobody should make: well-formed ones with some arguments replaced by anything else.

`make(seed, index)` gives the same call in every run.
"""

from __future__ import annotations

import decimal
import fractions
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

import selfattn as sa

ARENA = 1 << 15
INPUTS = np.frombuffer(np.random.default_rng(1).standard_normal(ARENA // 8).tobytes(), np.uint8).copy()
OUTPUTS = np.full(ARENA, 0x5A, np.uint8)

FLOATS = [np.dtype(name) for name in ("f4", "f8", "f2", ml_dtypes.bfloat16)]
DTYPES = ["f4", "f8", "f4", "f8", "f2", "g", ">f4", ">f8", "?", "i1", "u8", "i8", "c8", "M8[s]", "S3", "V5"]
SCALARS: list[Any] = [
    *(None, True, False, 0, -1, 3, 2.5, -0.0, 1e39, -1e308, 5e-324, 1 << 31, 1 << 63, 1 << 70, -(1 << 63), 10**400),
    *(
        float("nan"),
        float("inf"),
        float("-inf"),
        1j,
        "",
        "bhsd",
        "bshd",
        "high",
        b"",
        bytearray(4),
        memoryview(b"abcd"),
    ),
    *((), [], {}, set(), (1, 2), (None, None), (0, 1 << 70), (-1, None), (2.0, 1), [1, 2], [[1.0]], [[1.0], [1, 2]]),
    *(range(3), object(), object, len, Ellipsis, NotImplemented, decimal.Decimal(1), fractions.Fraction(1, 3)),
    *(np.float32(1), np.float64("nan"), np.int8(-3), np.uint64(1 << 63), np.bool_(True), np.datetime64("NaT")),
    *(np.dtype("f4"), np.str_("bhsd"), np.array(None), np.array(["a", None], object), sa.RoPE(), sa.RoPE(rotary_dim=4)),
]


class Call(NamedTuple):
    function: Callable[..., Any]
    positional: list[Any]
    named: dict[str, Any]

    def __str__(self) -> str:
        named = {name: describe(x) for name, x in self.named.items()}
        return f"{self.function.__name__}({[describe(x) for x in self.positional]}, {named})"


def describe(x: Any) -> str:
    if isinstance(x, np.ndarray):
        return f"{type(x).__name__}<{x.dtype.str} {x.shape} strides {x.strides}>"
    return repr(x)[:60]


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


def hostile(rng: random.Random, x: Any) -> Any:
    """Return something else than x: sometimes near it, sometimes anything."""
    if isinstance(x, np.ndarray) and x.size < ARENA and not x.dtype.hasobject and rng.random() < 0.6:
        return rng.choice(DISTORTIONS)(rng, x)
    if rng.random() < 0.4:
        return strided(rng, random_shape(rng), np.dtype(rng.choice(DTYPES)))
    return rng.choice(SCALARS)


def random_shape(rng: random.Random) -> tuple[int, ...]:
    ndim = rng.choice((0, 1, 2, 3, 4, 4, 5, 9, 31))
    return tuple(rng.choice((0, 1, 1, 2, 3, 4, 7, 8) if ndim < 6 else (0, 1, 1, 1)) for _ in range(ndim))


def strided(rng: random.Random, shape: tuple[int, ...], dtype: Any, arena: Any = INPUTS) -> Any:
    """Return a view into the arena: of any strides, at any address, perhaps overlapping with itself."""
    style = rng.random()
    strides, step = [0] * len(shape), dtype.itemsize
    for axis in reversed(range(len(shape))):
        strides[axis] = step if style < 0.6 else rng.choice((0, 1, 3, step, -step, 2 * step, -dtype.itemsize))
        step *= max(shape[axis], 1)
    reach = [(n - 1) * s for n, s in zip(shape, strides, strict=True) if n > 0]
    low, high = sum(min(r, 0) for r in reach), sum(max(r, 0) for r in reach) + dtype.itemsize
    if high - low > ARENA // 2:
        strides, low, high = [0] * len(shape), 0, dtype.itemsize
    first = -low + (rng.randrange(ARENA // 2) if rng.random() < 0.3 else 64 * rng.randrange(ARENA // 128))
    return np.ndarray(shape, dtype, arena, first, tuple(strides))


def claimed(rng: random.Random, x: Any) -> Any:
    """Return a view that claims far more elements than any memory has."""
    if x.ndim == 0 or x.dtype == np.uint64:  # whose largest entry is searched for
        return x
    shape = list(x.shape)
    # Hardly ever twice the same: two operands that agree on such a length would be a valid call without an end.
    shape[rng.randrange(x.ndim)] = (1 << rng.randrange(44, 58)) + rng.randrange(1 << 20)
    try:
        return np.lib.stride_tricks.as_strided(x.ravel()[:1], shape, (0,) * x.ndim)
    except (ValueError, IndexError):
        return x


def other_shape(rng: random.Random, x: Any) -> Any:
    shape = list(x.shape)
    if not shape:
        return strided(rng, (1,), x.dtype)
    axis = rng.randrange(len(shape))
    shape[axis] = rng.choice((0, 1, shape[axis] + 1, max(shape[axis] - 1, 0), 2 * shape[axis]))
    if rng.random() < 0.3:
        shape.insert(axis, rng.choice((1, 2, 3)))
    return strided(rng, tuple(shape), x.dtype)


def read_only(rng: random.Random, x: Any) -> Any:
    y = x[...]
    y.flags.writeable = False
    return y


DISTORTIONS: list[Callable[[random.Random, Any], Any]] = [
    other_shape,
    other_shape,
    read_only,
    claimed,
    lambda rng, x: strided(rng, x.shape, np.dtype(rng.choice(DTYPES))),
    lambda rng, x: strided(rng, x.shape, x.dtype, OUTPUTS),
    lambda rng, x: strided(rng, x.shape, x.dtype),
    lambda rng, x: x[::-1] if x.ndim else x,
    lambda rng, x: x.T,
    lambda rng, x: np.ma.MaskedArray(x),
    lambda rng, x: np.asmatrix(x) if x.ndim <= 2 else x,
    lambda rng, x: x.astype(object),
    lambda rng, x: x.tolist(),
    lambda rng, x: memoryview(np.ascontiguousarray(x)) if x.dtype.kind not in "MV" else x,
]


def floats(rng: random.Random, dtype: Any, *shape: int) -> Any:
    return strided(rng, shape, dtype)


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
        "q_lens": lambda: np.full(batch, q_len),
        "kv_lens": lambda: np.full(batch, kv_len),
        "scale": lambda: 0.5,
        "softcap": lambda: 3.0,
        "alibi_slopes": lambda: floats(rng, dtype, heads),
        "sinks": lambda: floats(rng, dtype, heads),
        "layout": lambda: "bhsd",
        "return_lse": lambda: True,
        "return_weights": lambda: True,
        "out": lambda: strided(rng, (batch, heads, q_len, dim), dtype, OUTPUTS),
        "num_threads": lambda: 1,
    }
    named = {name: optional[name]() for name in rng.sample(list(optional), rng.randrange(6))}
    if "out" in named and rng.random() < 0.1:
        return Call(sa.attention, [q, k, v], {**named, "out": q})
    return Call(sa.attention, [q, k, v], named)


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
    if rng.random() < 0.5:
        named["out"] = strided(rng, shape, dtype, OUTPUTS)
    return Call(sa.apply_rope, [floats(rng, dtype, *shape)], named)


def explain_call(rng: random.Random) -> Call:
    return attention_call(rng)._replace(function=sa.explain)


MAKERS = [*[attention_call] * 4, layer_call, layer_call, rope_call, explain_call]
NAMES = ["is_causal", "q", "precision", *(sa.attention.__kwdefaults__ or {}), "w_o", "context", "positions", "rope", ""]
