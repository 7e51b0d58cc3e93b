"""The part of the specification that says which keys a query sees."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._reference_distances import distances, per_batch


def visibility(
    q_len: int,
    kv_len: int,
    batch: tuple[int, ...] = (),
    num_heads: int = 1,
    *,
    mask: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    causal: bool = False,
    q_offset: ArrayLike | None = None,
    window: tuple[int | None, int | None] | None = None,
    q_lens: ArrayLike | None = None,
    kv_lens: ArrayLike | None = None,
    kv_starts: ArrayLike | None = None,
    chunk: int | None = None,
    prefix_lens: ArrayLike | None = None,
) -> NDArray[np.bool_]:
    """Return which keys each query sees, as booleans of shape ``(*batch, H, Sq, Sk)``.

    >>> from selfattn import reference
    >>> reference.visibility(2, 3, causal=True).astype(int).tolist()
    [[[1, 1, 0], [1, 1, 1]]]
    """
    visible = np.ones((*batch, num_heads, q_len, kv_len), dtype=bool)
    distance = distances(q_len, kv_len, batch, q_offset, q_lens, kv_lens)
    if causal:
        visible &= distance <= 0
    left, right = window or (None, None)
    if left is not None:
        visible &= distance >= -left
    if right is not None:
        visible &= distance <= right
    prefix = per_batch(prefix_lens, batch)
    if prefix is not None:
        visible |= np.arange(kv_len) < prefix
    if chunk is not None:
        keys_at = np.arange(kv_len)
        visible &= keys_at // chunk == (keys_at - distance) // chunk
    keys, queries = per_batch(kv_lens, batch), per_batch(q_lens, batch)
    if keys is not None:
        visible &= np.arange(kv_len) < keys
    starts = per_batch(kv_starts, batch)
    if starts is not None:
        visible &= np.arange(kv_len) >= starts
    if queries is not None:
        visible &= np.arange(q_len)[:, None] < queries
    if mask is not None:
        visible &= np.asarray(mask)
    if bias is not None:
        visible &= np.asarray(bias) != -np.inf
    return visible
