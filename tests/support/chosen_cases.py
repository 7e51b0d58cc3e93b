"""Calls whose queries choose keys, compared with a mask that hides all other keys."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

import selfattn as sa
from selfattn import reference

BFLOAT = np.dtype(ml_dtypes.bfloat16)
TYPES = [np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float16), BFLOAT]
BATCH, HEADS, KV_HEADS, QUERIES, KEYS = 2, 6, 2, 23, 41
ROUNDING = {"float64": 2.0**-48, "float32": 2.0**-19, "float16": 2.0**-10, "bfloat16": 2.0**-7}

CASES: dict[str, Any] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (7, 2), "q_offset": 5},
    "lengths": {"kv_lens": np.array([17, 41]), "q_lens": np.array([11, 0])},
    "starts": {"kv_starts": np.array([3, 41])},
    "chunk": {"causal": True, "chunk": 7},
    "prefix": {"causal": True, "prefix_lens": np.array([9, 0])},
    "sinks": {"sinks": np.linspace(-1, 1, HEADS)},
    "sinks and lengths": {"sinks": np.linspace(-1, 1, HEADS), "q_lens": np.array([0, 11])},
    "softcap": {"softcap": 2.0, "scale": 0.7},
    "alibi": {"alibi_slopes": np.linspace(0.1, 1, HEADS), "causal": True},
    "alibi per entry": {"alibi_slopes": np.linspace(0.1, 1, 2 * HEADS).reshape(2, HEADS)},
    "t5": {"t5": sa.T5Bias(np.linspace(-2, 2, 32 * HEADS).reshape(32, HEADS)), "scale": 1.0},
    "mask": {"mask": np.random.default_rng(1).random((BATCH, 1, QUERIES, KEYS)) < 0.7},
    "mask per head": {"mask": np.random.default_rng(2).random((HEADS, QUERIES, KEYS)) < 0.5},
    "bias": {"bias": np.random.default_rng(3).standard_normal((HEADS, 1, KEYS)).astype("f4")},
}


def operands(normal: Any, dtype: Any) -> Any:
    keys, values = (normal(BATCH, KV_HEADS, KEYS, width, dtype=dtype) for width in (16, 5))
    return normal(BATCH, HEADS, QUERIES, 16, dtype=dtype), keys, values


def chosen_mask(indices: Any, block: tuple[int, int] = (1, 1), shape: tuple[int, int] = (QUERIES, KEYS)) -> Any:
    """Return which keys each query chooses (..., queries, keys), for blocks of this many queries and keys."""
    rows = np.asarray(indices, np.int64)
    chosen = np.zeros((*rows.shape[:-1], -(-shape[1] // block[1]) + 1), bool)
    np.put_along_axis(chosen, rows, True, axis=-1)  # -1 is the last column
    mask = np.repeat(chosen[..., :-1], block[1], axis=-1)[..., : shape[1]]
    return np.repeat(mask, shape[0] if rows.shape[-2] == 1 else block[0], axis=-2)[..., : shape[0], :]


def per_head(mask: Any, heads: int = HEADS) -> Any:
    """Repeat what is given per KV head for the query heads of its group."""
    return mask if mask.shape[1] in (1, heads) else np.repeat(mask, heads // mask.shape[1], axis=1)


def check(q: Any, k: Any, v: Any, chosen: Any, **options: Any) -> Any:
    """Compare a call with the reference, for which `chosen` says what `key_indices` or `block_indices` say."""
    found, lse = sa.attention(q, k, v, return_lse=True, **options)
    kept = {name: x for name, x in options.items() if name not in ("key_indices", "block_indices", "block_size")}
    kept["mask"] = per_head(chosen, q.shape[1]) & kept.get("mask", True)
    exact = reference.attention(*(x.astype(np.float64) for x in (q, k, v)), **kept)
    assert found.dtype == q.dtype
    allowed = ROUNDING[q.dtype.name] * max(exact.sigma / 16, 1) * exact.magnitude
    least = 2.0**-25 if q.dtype == np.float16 else 1e-40  # half of its smallest number
    assert np.all(abs(found.astype(np.float64) - exact.out) <= allowed + least)
    hidden = np.isinf(exact.lse)
    assert np.array_equal(lse[hidden], exact.lse[hidden])
    assert np.all(abs(lse[~hidden] - exact.lse[~hidden]) < 2e-5)
    return found
