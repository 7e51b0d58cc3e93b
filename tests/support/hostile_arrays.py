"""Arrays of any shape, strides and type, and other values that are not valid arguments."""

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


def hostile(rng: random.Random, x: Any) -> Any:
    """Return something other than x: sometimes similar, sometimes anything."""
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
    # Rarely the same twice: two operands that agree on such a length would be a valid call that never ends.
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
