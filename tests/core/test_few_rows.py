"""Few query rows: every end of a pair, a vector, a bunch and a block of keys, and of the vectors along a row."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import selfattn as sa

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
types = pytest.mark.parametrize("dtype", [np.dtype(np.float32), np.dtype(np.float16), BFLOAT16], ids=str)
# Around pairs, vectors of 16, bunches of 32 and blocks of 512 keys.
LENGTHS = [1, 2, 3, 15, 16, 17, 31, 32, 33, 34, 47, 63, 64, 65, 511, 512, 513, 543, 545]
WIDTHS = [1, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 127, 128, 129, 160]


def operands(normal: Any, dtype: Any, rows: int, kv_len: int, width: int) -> tuple[Any, Any, Any]:
    """One query for each of `rows` heads that share keys and values."""
    q = normal(1, rows, 1, width, dtype=dtype)
    k, v = normal(1, 1, kv_len, width, dtype=dtype), normal(1, 1, kv_len, width, dtype=dtype)
    return q, k, v


@types
@pytest.mark.parametrize("kv_len", LENGTHS)
def test_every_length(isa: str, check: Any, normal: Any, dtype: Any, kv_len: int) -> None:
    for place, rows in enumerate((1, 2, 3, 4, 5, 7, 8)):
        q, k, v = operands(normal, dtype, rows, kv_len, WIDTHS[(kv_len + place) % len(WIDTHS)])
        check(q, k, v, trivial=kv_len == 1)


@types
@pytest.mark.parametrize("width", WIDTHS)
def test_every_width(isa: str, check: Any, normal: Any, dtype: Any, width: int) -> None:
    for rows in (1, 2, 4, 7):
        check(*operands(normal, dtype, rows, 37, width))


@types
@pytest.mark.parametrize("garbage", [np.nan, np.inf, 3e38, -1e-39])
def test_hidden_values_are_inert(isa: str, normal: Any, rng: Any, dtype: Any, garbage: float) -> None:
    for end in (1, 2, 15, 16, 17, 31, 33, 65, 511):
        q, k, v = operands(normal, dtype, 5, 600, 49)
        odd = rng.random(600) < 0.7
        for options in ({"kv_lens": [end]}, {"mask": np.arange(600) < end}, {"mask": odd}):
            hidden = ~options.get("mask", np.arange(600) < end)
            before = sa.attention(q, k, v, **options)
            with np.errstate(over="ignore"):
                spoiled = v.copy()
                spoiled[..., hidden, 5:] = garbage
            assert sa.attention(q, k, spoiled, **options).tobytes() == before.tobytes()


@types
def test_where_memory_starts_does_not_matter(isa: str, normal: Any, dtype: Any) -> None:
    q, k, v = operands(normal, dtype, 4, 545, 65)
    expected = sa.attention(q, k, v)
    for start in range(0, 64, dtype.itemsize * 3):
        moved = []
        for x in (k, v):
            memory = np.empty(x.nbytes + 128, np.uint8)
            first = -memory.ctypes.data % 64 + start
            view = memory[first : first + x.nbytes].view(dtype).reshape(x.shape)
            view[...] = x
            moved.append(view)
        assert sa.attention(q, *moved).tobytes() == expected.tobytes()
