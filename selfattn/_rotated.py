"""Queries and keys rotated by `attention(rope=)`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _core
from ._apply_rope import tokens_first
from ._errors import refusal
from ._masked import Arrays, with_positions
from ._rope import places_for, positions_for, rope_or_none
from ._typing import Layout

_NAME = "attention"
Integers = NDArray[np.int64]


def rotated(arrays: Arrays, rope: Any, positions: Any, layout: Layout, options: _core.Options) -> Arrays:
    """Return q and k rotated by their positions, and v.

    Keys are rotated once, not in each of the blocks that the kernels read: see decision 21.
    """
    description = rope_or_none(_NAME, rope)
    if description is None:
        if positions is not None:
            raise refusal(ValueError, _NAME, "positions", " is given without ", "rope", "")
        return arrays
    q, k, v = arrays
    # The key that each query is aligned with, (..., Sq).
    aligned = _core.visible_keys(q, k, v, with_positions(options))[..., 0]
    core = description.for_core(_NAME, q.shape[-1])
    tokens = tokens_first(k, layout)
    of_keys = None
    if positions is not None:
        of_keys = positions_for(_NAME, positions, tokens.shape[:-2], description)
    if not aligned.size or not tokens.size:  # no scores
        return arrays
    first = aligned.reshape(-1, aligned.shape[-1])[0]
    if np.all(aligned == first):
        aligned = first
    of_queries = places_for(description, aligned)
    if of_keys is not None:
        _check_aligned(aligned, tokens.shape[-3], options.q_lens)
        of_queries = _at(of_keys, aligned, tokens.shape[-3], coordinates=description.axes is not None)
    q = _with_batch(q, of_queries.shape[description.axes is not None : -1])
    return (
        _rotate(q, of_queries, core, layout, options.num_threads),
        _rotate(k, of_keys, core, layout, options.num_threads),
        v,
    )


def _check_aligned(aligned: Integers, kv_len: int, q_lens: Integers | None) -> None:
    """Refuse positions of keys if a valid query is aligned with a key that does not exist."""
    outside: NDArray[np.bool_] = (aligned < 0) | (aligned >= kv_len)
    if q_lens is not None:
        outside = outside & (np.arange(aligned.shape[-1]) < q_lens[..., None])
    if outside.any():
        *_, query = np.argwhere(outside)[0].tolist()
        key = np.broadcast_to(aligned, outside.shape)[outside][0]
        text = f" has the positions of keys 0 to {kv_len - 1}, but query {query} is aligned with key {key}"
        raise refusal(ValueError, _NAME, "positions", text)


def _at(of_keys: Integers, aligned: Integers, kv_len: int, *, coordinates: bool) -> Integers:
    """Return the positions of the queries, which are those of the keys that they are aligned with."""
    leading, own = of_keys.shape[: int(coordinates)], of_keys.shape[int(coordinates) : -1]
    batch = np.broadcast_shapes(own, aligned.shape[:-1])
    missing = (1,) * (len(batch) - len(own))  # batch axes, which come after the axis of coordinates
    keys = np.broadcast_to(of_keys.reshape(*leading, *missing, *own, kv_len), (*leading, *batch, kv_len))
    index = np.broadcast_to(np.clip(aligned, 0, kv_len - 1), (*leading, *batch, aligned.shape[-1]))
    return np.take_along_axis(keys, index, axis=-1)


def _with_batch(q: NDArray[Any], batch: tuple[int, ...]) -> NDArray[Any]:
    """Return queries for every batch entry if their positions differ between entries."""
    whole = np.broadcast_shapes(q.shape[:-3], batch)
    return q if whole == q.shape[:-3] else np.broadcast_to(q, (*whole, *q.shape[-3:]))


def _rotate(
    x: NDArray[Any], positions: Integers | None, rope: _core.Rope, layout: Layout, threads: int
) -> NDArray[Any]:
    out = np.empty(x.shape, x.dtype)
    _core.apply_rope(tokens_first(x, layout), positions, tokens_first(out, layout), rope, False, threads)
    return out
