"""What keys receive: the sums of attention weights over queries."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _core


def attend_with_key_mass(
    arrays: tuple[NDArray[Any], NDArray[Any], NDArray[Any]], out: NDArray[Any] | None, options: _core.Options
) -> Any:
    """Return the results of `attention` for these options, and the key mass as the last of them."""
    asked = options.copy()
    asked.return_lse = True
    others = [array for name in _core.ARRAY_OPTIONS if (array := getattr(options, name)) is not None]
    target = out
    if out is not None and any(np.may_share_memory(out, array) for array in (*arrays, *others)):
        target = np.empty_like(out)  # the operands are read again after the first pass
    result, lse, *weights = _core.attention(*arrays, target, asked)
    mass = _received(arrays[0], arrays[1], lse, options)
    if out is not None and out is not target:
        out[...] = result
        result = out
    return (result, *([lse] if options.return_lse else []), *weights, mass)


def _received(q: NDArray[Any], k: NDArray[Any], lse: NDArray[Any], options: _core.Options) -> NDArray[Any]:
    """Sum the weights of each query head over the queries, one block of weights at a time.

    The gradient of the values is Pᵀ · grad_out, where P are the weights. So if values have one dim per head of a group,
    and the gradient of out is 1 in the dim of its head and 0 in the others, the gradient of the values is the key mass.
    """
    flat = q.ndim == 2
    heads_first = options.layout != _core.LAYOUTS["bshd"]
    heads, kv_heads = (1, 1) if flat else (x.shape[-3 if heads_first else -2] for x in (q, k))
    group = heads // kv_heads
    own = np.tile(np.eye(group, dtype=q.dtype), (kv_heads, 1))  # (heads, group)
    rows = q.shape[-2] if heads_first else q.shape[-3]
    batch = lse.shape[:-2]
    shape = (rows, group) if flat else (*batch, heads, rows, group) if heads_first else (*batch, rows, heads, group)
    if heads_first and not flat:
        own = own[:, None]
    values = np.broadcast_to(np.zeros((), k.dtype), (*k.shape[:-1], group))
    given = _core.GradientInputs(
        grad_out=np.broadcast_to(own, shape), out=np.broadcast_to(np.zeros((), q.dtype), shape), lse=lse
    )
    exact = options.copy()
    exact.return_weights = exact.return_lse = False
    exact.exact = True
    mass = _core.attention_backward("attention", (q, k, values), given, ("v",), exact)["v"]
    if flat:
        return mass[..., 0]
    if not heads_first:
        mass = np.swapaxes(mass, -3, -2)
    return np.ascontiguousarray(np.swapaxes(mass, -2, -1)).reshape(*batch, heads, mass.shape[-2])
