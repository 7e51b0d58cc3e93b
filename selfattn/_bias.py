"""Position biases that models add to their scores."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._arguments import flag, floats, whole_number
from ._errors import refusal
from ._keywords import hinted


@hinted
def alibi_slopes(num_heads: int) -> NDArray[np.float32]:
    """Return the slopes of ALiBi (Press, Smith and Lewis, 2022): ``2^(−8 h / n)`` for head h = 1..n.

    Parameters
    ----------
    num_heads : int
        n. If n is not a power of two, the slopes for the next smaller power of two are followed by every other slope
        for the next larger one, as in the paper's code.

    Returns
    -------
    ndarray of float32, shape (num_heads,)
        For `attention`'s ``alibi_slopes``.

    Raises
    ------
    TypeError, ValueError
        `num_heads` is not an integer above 0.

    Examples
    --------
    >>> import selfattn as sa
    >>> sa.alibi_slopes(4).tolist()
    [0.25, 0.0625, 0.015625, 0.00390625]
    """
    n = whole_number("alibi_slopes", "num_heads", num_heads, 1)
    below = 1 << (n.bit_length() - 1)
    slopes = np.exp2(-8.0 * np.arange(1, below + 1) / below)
    between = np.exp2(-8.0 * np.arange(1, 2 * below, 2) / (2 * below))
    return np.concatenate([slopes, between])[:n].astype(np.float32)


@hinted
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

    Half of the buckets hold one distance each. The other half hold ranges of distances that grow logarithmically up to
    `max_distance`, and the last bucket also holds all larger distances. T5 scales its scores by 1: pass ``scale=1.0``.

    Parameters
    ----------
    table : array_like, shape (num_buckets, H)
        The learned bias of each bucket and head, in any dtype that `attention` accepts.
    q_len, kv_len : int
        Sq and Sk, in tokens.
    bidirectional : bool, default True
        Encoder: half of the buckets for keys before, half for keys after the query. False (decoder): keys after the
        query share the bucket of distance 0.
    max_distance : int, default 128
        In tokens.
    q_offset : int, default 0
        Position of the first query.

    Returns
    -------
    ndarray, shape (H, Sq, Sk)
        In table's dtype.

    Raises
    ------
    TypeError, ValueError
        A table of another shape or dtype, or a length or distance out of range.

    Examples
    --------
    >>> import numpy as np
    >>> import selfattn as sa
    >>> sa.t5_bias(np.zeros((32, 8), dtype=np.float32), 5, 7).shape
    (8, 5, 7)
    """
    function = "t5_bias"
    bias = _Buckets.check(function, table, bidirectional, max_distance)
    first = whole_number(function, "q_offset", q_offset, -(1 << 60))
    queries = np.arange(first, first + whole_number(function, "q_len", q_len, 0))
    distance = queries[:, None] - np.arange(whole_number(function, "kv_len", kv_len, 0))
    row = np.clip(distance + bias.origin, 0, len(bias.bucket) - 1)
    return np.ascontiguousarray(bias.table[bias.bucket[row]].transpose(2, 0, 1))


@hinted
@dataclass(frozen=True, eq=False)
class T5Bias:
    """The relative position bias of T5 (Raffel et al., 2020), for ``t5`` of `attention`: added inside the kernel.

    `t5_bias` materializes the bias of every pair; this class lets the kernel look it up by distance, for one block of
    keys at a time. T5 scales its scores by 1: pass ``scale=1.0``.

    Parameters
    ----------
    table : array_like, shape (num_buckets, H)
        The learned bias of each bucket and head, in any dtype that `attention` accepts.
    bidirectional : bool, default True
        Encoder: half of the buckets for keys before, half for keys after the query. False (decoder): keys after the
        query share the bucket of distance 0.
    max_distance : int, default 128
        In tokens, at most 2²⁰; the last bucket holds all larger distances.

    Raises
    ------
    TypeError, ValueError
        A table of another shape or dtype, or `max_distance` is below 1.

    Notes
    -----
    The position of query i is ``i + offset``, as for `causal`.

    Examples
    --------
    >>> import numpy as np
    >>> import selfattn as sa
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 8, 50, 64), dtype=np.float32)
    >>> table = rng.standard_normal((32, 8), dtype=np.float32)
    >>> out = sa.attention(q, k, v, t5=sa.T5Bias(table), scale=1.0)
    >>> again = sa.attention(q, k, v, bias=sa.t5_bias(table, 50, 50), scale=1.0)
    >>> bool(np.allclose(out, again, rtol=0, atol=1e-5))
    True
    """

    table: ArrayLike
    bidirectional: bool = True
    max_distance: int = 128
    _core: tuple[NDArray[np.float64], int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        bias = _Buckets.check("T5Bias", self.table, self.bidirectional, self.max_distance)
        by_distance = np.ascontiguousarray(bias.table.astype(np.float64)[bias.bucket].T)
        object.__setattr__(self, "_core", (by_distance, bias.origin))

    def __reduce__(self) -> tuple[Any, ...]:
        # The arrays computed from the table are left out: they are larger than the table.
        return type(self), (self.table, self.bidirectional, self.max_distance)

    def gradient(self, by_distance: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the gradient of the table, given the gradients for each head and distance, (H, count)."""
        buckets = _Buckets.check("T5Bias", self.table, self.bidirectional, self.max_distance)
        total = np.zeros(buckets.table.shape)
        np.add.at(total, buckets.bucket, by_distance.T)
        return total

    def for_core(self) -> tuple[NDArray[np.float64], int]:
        """Return the bias of each head and distance, (H, count), and the index of distance 0."""
        return self._core


class _Buckets(NamedTuple):
    """A checked table, and the bucket of each distance i − j from −origin on. Beyond an end, its bucket is used."""

    table: NDArray[Any]
    bucket: NDArray[np.int64]
    origin: int

    @classmethod
    def check(cls, function: str, table: ArrayLike, bidirectional: bool, max_distance: int) -> _Buckets:
        array = floats(function, "table", table)
        sides = 2 if flag(function, "bidirectional", bidirectional) else 1
        if array.ndim != 2 or array.shape[0] < 2 * sides or array.shape[0] % sides:
            even = ", an even number" if bidirectional else ""
            text = f" has shape {array.shape}, but (num_buckets, H) is needed, with at least {2 * sides} buckets{even}"
            raise refusal(ValueError, function, "table", text)
        buckets = array.shape[0] // sides
        exact = buckets // 2
        farthest = whole_number(function, "max_distance", max_distance, 1)
        if not exact < farthest <= 1 << 20:
            raise refusal(
                ValueError,
                function,
                "max_distance",
                f" is {max_distance}, but it must be greater than {exact} and at most {1 << 20}",
            )
        distance = np.arange(farthest + 1)
        steps = np.log(np.maximum(distance, exact) / exact) / np.log(farthest / exact)
        far = np.minimum(exact + (steps * (buckets - exact)).astype(np.int64), buckets - 1)
        bucket = np.where(distance < exact, distance, far)
        if not bidirectional:
            return cls(array, bucket, 0)
        return cls(array, np.concatenate([bucket[:0:-1] + buckets, bucket]), farthest)
