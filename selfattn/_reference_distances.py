"""The part of the specification that depends on the distance of query and key."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


def per_batch(values: ArrayLike | None, batch: tuple[int, ...]) -> NDArray[np.int64] | None:
    """Lengths or offsets as (*batch, 1, 1, 1), to broadcast against (..., H, Sq, Sk)."""
    if values is None:
        return None
    array = np.asarray(values, dtype=np.int64)
    return np.broadcast_to(array if batch else array.reshape(()), batch)[..., None, None, None]


def distances(
    q_len: int,
    kv_len: int,
    batch: tuple[int, ...],
    q_offset: ArrayLike | None,
    q_lens: ArrayLike | None,
    kv_lens: ArrayLike | None,
) -> NDArray[np.int64]:
    """j - (i + offset) for every pair, (*batch, 1, Sq, Sk) or broadcastable to it."""
    offset = per_batch(q_offset, batch)
    if offset is None:
        queries, keys = per_batch(q_lens, batch), per_batch(kv_lens, batch)
        offset = (np.int64(kv_len) if keys is None else keys) - (np.int64(q_len) if queries is None else queries)
    return np.asarray(np.arange(kv_len) - (np.arange(q_len)[:, None] + offset))


def relative_products(
    q: NDArray[Any], k: NDArray[Any], distance: NDArray[np.int64], relative: tuple[Any, ...]
) -> tuple[NDArray[Any], NDArray[Any]]:
    """(q + u) . k + (q + w) . r, and the sum of the absolute values; gathers a vector of r for every pair."""
    r, u, w = (np.asarray(x, dtype=q.dtype) for x in relative[:3])
    row = np.clip(distance + relative[3], 0, r.shape[-2] - 1)[..., 0, :, :]
    vectors = r[np.arange(len(r))[:, None, None], row[..., None, :, :]] if r.ndim == 3 else r[row][..., None, :, :, :]
    for_keys, for_vectors = q + u[:, None], q + w[:, None]
    products = np.matmul(for_keys, k.swapaxes(-1, -2)) + np.einsum("...id,...ijd->...ij", for_vectors, vectors)
    sizes = np.matmul(abs(for_keys), abs(k).swapaxes(-1, -2))
    return products, sizes + np.einsum("...id,...ijd->...ij", abs(for_vectors), abs(vectors))


def t5_terms(t5: Any, distance: NDArray[np.int64]) -> NDArray[Any]:
    """The bias of each head and pair."""
    table = np.asarray(t5.table, dtype=np.float64)
    return np.moveaxis(table[t5_buckets(t5, distance)][..., 0, :, :, :], -1, -3)


def t5_buckets(t5: Any, distance: NDArray[np.int64]) -> NDArray[np.int64]:
    """The row of the table for each distance."""
    buckets = len(np.asarray(t5.table)) // (2 if t5.bidirectional else 1)
    exact = buckets // 2

    def bucket(t: int) -> int:
        side = buckets if t5.bidirectional and t < 0 else 0
        t = abs(t) if t5.bidirectional else max(t, 0)
        far = exact + int(np.log(max(t, exact) / exact) / np.log(t5.max_distance / exact) * (buckets - exact))
        return side + (t if t < exact else min(far, buckets - 1))

    distances, place = np.unique(distance, return_inverse=True)
    return np.array([bucket(int(t)) for t in distances], dtype=np.int64)[place].reshape(distance.shape)
