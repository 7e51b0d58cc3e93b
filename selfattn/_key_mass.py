"""What keys receive: the sums of attention weights over queries."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _core

Arrays = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]


def attend_with_key_mass(arrays: Arrays, out: NDArray[Any] | None, options: _core.Options) -> Any:
    """Return the results of `attention` for these options, and the key mass as the last of them."""
    asked = options.copy()
    # A lse in float64: an error of lse is a factor of all weights of a row.
    asked.return_lse = asked.exact = True
    exact, lse, *weights = _core.attention(*arrays, None, asked)
    result = exact.astype(arrays[0].dtype, copy=False)
    if out is not None:
        _core.check_out("attention", out, result, "q")
    mass = _received(arrays, lse, options)
    if out is not None:  # only now, since it may be one of the operands
        out[...] = result
        result = out
    wanted = [lse.astype(exact.dtype)] if options.return_lse else []
    return (result, *wanted, *weights, mass)


def _received(arrays: Arrays, lse: NDArray[np.float64], options: _core.Options) -> NDArray[Any]:
    """Sum the weights of each query head over the queries, one block of weights at a time.

    The gradient of the values is Pᵀ · grad_out, where P are the weights. So if values have one dim per head of a group,
    and the gradient of out is 1 in the dim of its head and 0 in the others, the gradient of the values is the key mass.
    """
    q, k, v = arrays
    flat = lse.ndim == 1
    heads_first = options.layout != _core.LAYOUTS["bshd"]
    heads, kv_heads = (1, 1) if flat else (x.shape[-3 if heads_first else -2] for x in (q, k))
    group = heads // kv_heads
    own = np.tile(np.eye(group, dtype=q.dtype), (kv_heads, 1))  # (heads, group)
    rows = q.shape[-2] if flat or heads_first else q.shape[-3]
    batch = lse.shape[:-2]
    shape = (rows, group) if flat else (*batch, heads, rows, group) if heads_first else (*batch, rows, heads, group)
    if heads_first and not flat:
        own = own[:, None]
    values = np.broadcast_to(np.zeros((), k.dtype), (*v.shape[:-1], group))
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
