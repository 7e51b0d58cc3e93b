"""PyTorch's attention function on arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .._arguments import as_array, flag
from .._attention import attention
from .._keywords import hinted
from .._typing import Array
from ._checks import arrays, no_dropout, own_names

_NAME = "scaled_dot_product_attention"
Shape = tuple[int, ...]


@hinted
def scaled_dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    attn_mask: ArrayLike | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Array:
    """Compute ``torch.nn.functional.scaled_dot_product_attention`` on arrays.

    Parameters
    ----------
    query : array_like, shape (..., H, L, E)
    key : array_like, shape (..., H, S, E)
    value : array_like, shape (..., H, S, Ev)
        All in one dtype: float32, float64, float16 or bfloat16. All dimensions before the last two broadcast.
    attn_mask : array_like, broadcasting to (..., H, L, S), optional
        bool (True = attend), or float32 or query's dtype (added to the scores).
    dropout_p : float
        Must be 0.
    is_causal : bool, default False
        Query i sees the keys up to i (top-left alignment); not together with `attn_mask`.
    scale : float, optional
        Default ``1 / sqrt(E)``.
    enable_gqa : bool, default False
        Allow fewer heads in key and value than in query; the number of query heads must be a multiple of their number.

    Returns
    -------
    ndarray, shape (..., H, L, Ev)
        In query's dtype.

    Notes
    -----
    =====================  ======================================  =========================================
    argument or case       PyTorch                                 here
    =====================  ======================================  =========================================
    dropout_p > 0          drops weights at random                 ValueError
    attn_mask, is_causal   an error is documented, but some        ValueError
    together               kernels apply both
    a row without keys     NaN or 0, depending on the version      0
    E = 0                  0/0 in the default scale                ValueError
    enable_gqa             some paths allow different numbers of   ValueError
                           heads in key and value
    accumulation           depends on the kernel                   float32 (float64 for float64)
    =====================  ======================================  =========================================

    Examples
    --------
    >>> import numpy as np
    >>> from selfattn.compat import scaled_dot_product_attention
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 4, 10, 8), dtype=np.float32)
    >>> scaled_dot_product_attention(q, k, v, is_causal=True).shape
    (2, 4, 10, 8)
    """
    no_dropout(_NAME, dropout_p)
    query, key, value = arrays(_NAME, query=query, key=key, value=value)
    mask = None if attn_mask is None else as_array(_NAME, "attn_mask", attn_mask)
    check_mask_type(None if mask is None else mask.dtype, query.dtype, np.dtype(bool), np.dtype(np.float32))
    is_causal, enable_gqa = flag(_NAME, "is_causal", is_causal), flag(_NAME, "enable_gqa", enable_gqa)
    check_mask(None if mask is None else mask.shape, is_causal)
    result_shape(query.shape, key.shape, value.shape, enable_gqa)
    return attend((query, key, value), mask, is_causal, scale, enable_gqa)


def check_mask_type(mask: Any, query: Any, boolean: Any, single: Any) -> None:
    """Raise unless the mask's dtype is one of these; works with the dtypes of PyTorch and NumPy."""
    if mask is not None and mask not in (boolean, single, query):
        raise TypeError(f"{_NAME}: attn_mask has dtype {mask}, but bool, float32 or query's {query} is needed")


def check_mask(shape: Shape | None, is_causal: bool) -> None:
    """Raise for a mask with fewer than two dimensions, and for a mask together with is_causal."""
    if shape is None:
        return
    if is_causal:
        raise ValueError(f"{_NAME}: attn_mask is given together with is_causal: put the causal limit into the mask")
    if len(shape) < 2:
        raise ValueError(f"{_NAME}: attn_mask has shape {tuple(shape)}, but 2 dimensions or more are needed")


def result_shape(
    query: Shape, key: Shape, value: Shape, enable_gqa: bool, broadcast: Callable[..., Any] = np.broadcast_shapes
) -> Shape:
    """Check the operands' shapes and return the result's shape.

    `broadcast` computes the broadcast shape. Lengths may be symbolic while a compiler traces.
    """
    for name, shape in (("query", query), ("key", key), ("value", value)):
        if len(shape) < 2:
            raise ValueError(f"{_NAME}: {name} has shape {tuple(shape)}, but 2 dimensions or more are needed")
    if query[-1] != key[-1]:
        raise ValueError(f"{_NAME}: key has head_dim {key[-1]} but query has {query[-1]}")
    if key[-2] != value[-2]:
        raise ValueError(f"{_NAME}: value has {value[-2]} positions but key has {key[-2]}")
    ends = 2
    if enable_gqa:
        _check_groups(query, key, value)
        ends = 3
    fronts = query[:-ends], key[:-ends], value[:-ends]
    front = fronts[0]
    if not fronts[0] == fronts[1] == fronts[2]:
        try:
            front = broadcast(*fronts)
        except (ValueError, RuntimeError):
            raise ValueError(
                f"{_NAME}: query {tuple(query)}, key {tuple(key)} and value {tuple(value)} do not broadcast"
                + ("" if enable_gqa else "; for grouped heads pass enable_gqa=True")
            ) from None
    return (*front, *query[-ends:-1], value[-1])


def _check_groups(query: Shape, key: Shape, value: Shape) -> None:
    if min(len(query), len(key), len(value)) < 3:
        raise ValueError(f"{_NAME}: enable_gqa needs a dimension of heads, but query has shape {tuple(query)}")
    heads, groups = query[-3], key[-3]
    if value[-3] != groups:
        raise ValueError(f"{_NAME}: value has {value[-3]} heads but key has {groups}")
    if groups == 0 or heads % groups != 0:
        raise ValueError(f"{_NAME}: key has {groups} heads, which do not divide query's {heads}")


@own_names(_NAME, q="query", k="key", v="value", mask="attn_mask", bias="attn_mask")
def attend(
    operands: tuple[NDArray[Any], NDArray[Any], NDArray[Any]],
    mask: NDArray[Any] | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    out: Array | None = None,
) -> Array:
    """Attend; the operands' shapes and dtypes have been checked already."""
    query, key, value = operands
    fronts = query.shape[:-2], key.shape[:-2], value.shape[:-2]
    if not enable_gqa and not fronts[0] == fronts[1] == fronts[2]:
        query, key, value = _broadcast(query, key, value)
    offset = 0 if is_causal else None
    if mask is None:
        return attention(query, key, value, causal=is_causal, q_offset=offset, scale=scale, out=out)
    hidden, added = (mask, None) if mask.dtype == np.bool_ else (None, mask)
    return attention(query, key, value, mask=hidden, bias=added, scale=scale, out=out)


def _broadcast(query: NDArray[Any], key: NDArray[Any], value: NDArray[Any]) -> list[NDArray[Any]]:
    """Return views with matching numbers of heads; if key and value have one head, it is kept for all query heads."""
    front = np.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    one = all(x.ndim == 2 or x.shape[-3] == 1 for x in (key, value))
    shared = (*front[:-1], 1) if one else front
    return [np.broadcast_to(x, (*lead, *x.shape[-2:])) for x, lead in ((query, front), (key, shared), (value, shared))]
