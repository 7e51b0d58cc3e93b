"""Position biases that models add to their scores."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._arguments import ACCEPTED, as_array, is_float


def _positive(function: str, name: str, value: Any, least: int = 1) -> int:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{function}: {name} is {value!r}, but an integer is needed")
    if value < least:
        raise ValueError(f"{function}: {name} is {value}, but it must be at least {least}")
    return int(value)


def alibi_slopes(num_heads: int) -> NDArray[np.float32]:
    """Return the slopes of ALiBi (Press, Smith and Lewis, 2022): ``2^(−8 h / n)`` for head h = 1..n.

    Parameters
    ----------
    num_heads : int
        n. Where it is no power of two, the slopes of the power below it are followed by every other slope of the
        power above it, as in the paper's code.

    Returns
    -------
    ndarray of float32, shape (num_heads,)
        For `attention`'s ``alibi_slopes``.

    Examples
    --------
    >>> import selfattn as sa
    >>> sa.alibi_slopes(4).tolist()
    [0.25, 0.0625, 0.015625, 0.00390625]
    """
    n = _positive("alibi_slopes", "num_heads", num_heads)
    below = 1 << (n.bit_length() - 1)
    slopes = np.exp2(-8.0 * np.arange(1, below + 1) / below)
    between = np.exp2(-8.0 * np.arange(1, 2 * below, 2) / (2 * below))
    return np.concatenate([slopes, between])[:n].astype(np.float32)


def t5_bias(
    table: ArrayLike,
    q_len: int,
    kv_len: int,
    *,
    bidirectional: bool = True,
    max_distance: int = 128,
    q_offset: int = 0,
) -> NDArray[Any]:
    """Return the relative position bias of T5 (Raffel et al., 2020), for `attention`'s ``bias``.

    Half of the buckets hold one distance each, the other half grow logarithmically up to `max_distance`, and the last
    one takes everything beyond. T5 scales its scores by 1: pass ``scale=1.0``.

    Parameters
    ----------
    table : array_like, shape (num_buckets, H)
        The learned bias of each bucket and head, of any dtype that `attention` takes.
    q_len, kv_len : int
        Sq and Sk, in tokens.
    bidirectional : bool, default True
        Encoder: half of the buckets for keys behind, half for keys ahead of the query. False (decoder): keys ahead
        share the bucket of distance 0.
    max_distance : int, default 128
        In tokens.
    q_offset : int, default 0
        Position of the first query.

    Returns
    -------
    ndarray, shape (H, Sq, Sk)
        In table's dtype.

    Examples
    --------
    >>> import numpy as np
    >>> import selfattn as sa
    >>> sa.t5_bias(np.zeros((32, 8), dtype=np.float32), 5, 7).shape
    (8, 5, 7)
    """
    function = "t5_bias"
    array = as_array(function, "table", table)
    if not is_float(array.dtype):
        raise TypeError(f"{function}: table has dtype {array.dtype}, but {ACCEPTED}")
    sides = 2 if bidirectional else 1
    if array.ndim != 2 or array.shape[0] < 2 * sides or array.shape[0] % sides:
        raise ValueError(
            f"{function}: table has shape {array.shape}, but (num_buckets, H) is needed, with at least "
            f"{2 * sides} buckets" + (", an even number" if bidirectional else "")
        )
    buckets = array.shape[0] // sides
    exact = buckets // 2
    if _positive(function, "max_distance", max_distance) <= exact:
        raise ValueError(f"{function}: max_distance is {max_distance}, but it must be greater than {exact}")
    queries = np.arange(_positive(function, "q_len", q_len, 0))[:, None] + int(q_offset)
    ahead = np.arange(_positive(function, "kv_len", kv_len, 0)) - queries
    distance = abs(ahead) if bidirectional else np.maximum(-ahead, 0)
    steps = np.log(np.maximum(distance, exact) / exact) / np.log(max_distance / exact)
    far = np.minimum(exact + (steps * (buckets - exact)).astype(np.int64), buckets - 1)
    bucket = np.where(distance < exact, distance, far)
    if bidirectional:
        bucket += np.where(ahead > 0, buckets, 0)
    return np.ascontiguousarray(array[bucket].transpose(2, 0, 1))
