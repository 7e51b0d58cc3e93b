"""Options converted to dense masks and biases, for peers that support nothing else."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .numbers import numpy_dtype
from .workload import Array, Arrays, Workload


def range_mask(workload: Workload) -> NDArray[np.bool_] | None:
    """Return the mask of causal, window and kv_lens, shape (batch or 1, 1, q_len, kv_len).

    None if they hide nothing. The workload's own mask array is not included.
    """
    first, after_last = workload.key_ranges()
    if (first == 0).all() and (after_last == workload.kv_len).all():
        return None
    if (first == first[:1]).all() and (after_last == after_last[:1]).all():
        first, after_last = first[:1], after_last[:1]
    keys = np.arange(workload.kv_len)
    visible = (keys >= first[..., None]) & (keys < after_last[..., None])
    return visible[:, None]


def square_causal(workload: Workload) -> bool:
    """Whether `causal` is the only option that hides keys, and top-left alignment gives the same mask as ours."""
    options = workload.options
    others = options.window or options.kv_lens or options.bias or options.alibi or options.mask != "none"
    return options.causal and not others and workload.q_len == workload.kv_len


def alibi_bias(workload: Workload, slopes: Array) -> Array:
    """-slope |i + offset - j|, shape (batch or 1, num_heads, q_len, kv_len)."""
    offsets = np.unique(workload.offsets())
    if len(offsets) > 1:
        offsets = workload.offsets()
    position = np.arange(workload.q_len) + offsets[:, None]
    distance = np.abs(position[:, None, :, None] - np.arange(workload.kv_len))
    bias: Array = -slopes[:, None, None] * distance
    return bias.astype(numpy_dtype(workload.dtype))


def dense_mask(workload: Workload, arrays: Arrays) -> NDArray[np.bool_] | None:
    """Return one boolean mask of everything that hides pairs; None if nothing does."""
    ranges, mask = range_mask(workload), arrays.get("mask")
    if ranges is None or mask is None:
        return mask if ranges is None else ranges
    return ranges & mask


def dense_bias(workload: Workload, arrays: Arrays) -> Array | None:
    """Return bias and ALiBi as one additive array; None if there is neither."""
    bias = arrays.get("bias")
    if "alibi_slopes" in arrays:
        alibi = alibi_bias(workload, arrays["alibi_slopes"])
        bias = alibi if bias is None else bias + alibi
    return bias


def additive_mask(workload: Workload, arrays: Arrays) -> Array | None:
    """Return masks and biases as one additive array, with -inf for hidden pairs; None if there are none."""
    mask, bias = dense_mask(workload, arrays), dense_bias(workload, arrays)
    if mask is None:
        return bias
    dtype = numpy_dtype(workload.dtype)
    added = dtype.type(0) if bias is None else bias
    return np.where(mask, added, dtype.type(-np.inf)).astype(dtype, copy=False)
