"""Attention as the documentation of flash-attn describes it, one score at a time, and operands of it."""

from __future__ import annotations

from typing import Any

import numpy as np

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (3, 2)},
    "left window": {"window_size": (2, -1), "softmax_scale": 0.5},
    "causal window": {"causal": True, "window_size": (4, 4)},
    "softcap": {"softcap": 2.0},
    "slopes": {"alibi_slopes": np.array([0.5, 0.25, 1.0, 0.1], np.float32), "softcap": 3.0},
    "slopes of rows": {"alibi_slopes": np.linspace(0.1, 1, 12, dtype=np.float32).reshape(3, 4), "causal": True},
}


def plain(q: Any, k: Any, v: Any, b: int = 0, **options: Any) -> Any:
    """Attention of one sequence, (tokens, heads, size), as documented: one score at a time, in float64."""
    options = {"softmax_scale": None, "causal": False, "window_size": (-1, -1), "softcap": 0.0, "alibi_slopes": None,
               **options}  # fmt: skip
    scale = q.shape[-1] ** -0.5 if options["softmax_scale"] is None else options["softmax_scale"]
    k, v = (np.repeat(x.astype(np.float64), q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    scores = np.einsum("qhd,khd->hqk", q.astype(np.float64), k) * scale
    if options["softcap"]:
        scores = options["softcap"] * np.tanh(scores / options["softcap"])
    place, key = np.arange(len(q))[:, None] + len(k) - len(q), np.arange(len(k))
    if options["alibi_slopes"] is not None:
        slopes = options["alibi_slopes"].astype(np.float64)
        slopes = slopes[b] if slopes.ndim == 2 else slopes
        scores -= slopes[:, None, None] * abs(place - key)
    left, right = options["window_size"]
    hidden = np.zeros(scores.shape[1:], bool)
    hidden |= (key > place) & options["causal"]
    hidden |= (key < place - left) & (left >= 0)
    hidden |= (key > place + right) & (right >= 0)
    scores[:, hidden] = -np.inf
    with np.errstate(divide="ignore"):
        lse = np.log(np.sum(np.exp(scores), axis=-1))
    weights = np.exp(scores - np.where(np.isneginf(lse), 0, lse)[..., None])
    return np.einsum("hqk,khd->qhd", weights, v), lse, weights


def close(found: Any, expected: Any, tolerance: float = 3e-6) -> None:
    assert type(found) is np.ndarray
    assert found.shape == expected.shape
    assert np.allclose(found.astype(np.float64), expected, rtol=0, atol=tolerance)


def paged(k: Any, lengths: Any, rng: Any, page_size: int = 4, spare: int = 3) -> Any:
    """Scatter sequences (count, tokens, heads, size) over pages in a random order; unused entries are invalid."""
    runs = -(-k.shape[1] // page_size)
    pages = np.full((len(k) * runs + spare, page_size, *k.shape[2:]), np.nan, k.dtype)
    table = rng.permutation(len(pages))[: len(k) * runs].reshape(len(k), runs).astype(np.int32)
    for b, length in enumerate(lengths):
        for t in range(length):
            pages[table[b, t // page_size], t % page_size] = k[b, t]
        table[b, -(-length // page_size) :] = 999
    return pages, table
