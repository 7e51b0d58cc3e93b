"""JAX's attention function on arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .._arguments import as_array, flag, integers, real
from .._attention import attention
from .._keywords import hinted
from .._typing import Array, No, Yes
from ._checks import arrays, is_integer, own_names

if TYPE_CHECKING:
    from typing_extensions import Unpack

_NAME = "dot_product_attention"


class _Options(TypedDict, total=False):
    scale: float | None
    is_causal: bool
    query_seq_lengths: ArrayLike | None
    key_value_seq_lengths: ArrayLike | None
    local_window_size: int | tuple[int, int] | None
    implementation: Literal["xla"] | None


# fmt: off
@overload
def dot_product_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, bias: ArrayLike | None = ..., mask: ArrayLike | None = ..., *,
    return_residual: No = ..., **options: Unpack[_Options]
) -> Array: ...
@overload
def dot_product_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, bias: ArrayLike | None = ..., mask: ArrayLike | None = ..., *,
    return_residual: Yes, **options: Unpack[_Options]
) -> tuple[Array, Array]: ...
@overload
def dot_product_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, bias: ArrayLike | None = ..., mask: ArrayLike | None = ..., *,
    return_residual: bool = ..., **options: Unpack[_Options]
) -> Any: ...
# fmt: on
@hinted
@own_names(
    _NAME, q="query", k="key", v="value", window="local_window_size", q_lens="query_seq_lengths",
    kv_lens="key_value_seq_lengths",
)  # fmt: skip
def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: Literal["xla"] | None = None,
    return_residual: bool = False,
) -> Any:
    """Compute ``jax.nn.dot_product_attention`` on arrays.

    Parameters
    ----------
    query : array_like, shape (B, T, N, H) or (T, N, H)
    key : array_like, shape (B, S, K, H) or (S, K, H)
    value : array_like, shape (B, S, K, H) or (S, K, H)
        All in one dtype: float32, float64, float16 or bfloat16. K divides N.
    bias : array_like, broadcasting to (B, N, T, S), optional
        Added to the scores.
    mask : array_like of bool, broadcasting to (B, N, T, S), optional
        True = attend.
    scale : float, optional
        Default ``1 / sqrt(H)``.
    is_causal : bool, default False
        Query i sees the keys up to i (top-left alignment).
    query_seq_lengths, key_value_seq_lengths : integer array (B,), optional
        Number of valid queries and keys of each batch entry.
    local_window_size : int or (left, right), optional
        Number of keys that a query sees on each side of its own position; a single number applies to both sides.
    implementation : {None, "xla"}
        Ignored: both values have the same effect.
    return_residual : bool, default False
        Also return the log-sum-exps.

    Returns
    -------
    out : ndarray, of query's shape
        In query's dtype.
    residual : ndarray, shape (B, T, N) or (T, N)
        Only with `return_residual`, in query's dtype.

    Notes
    -----
    =====================  ======================================  =========================================
    argument or case       JAX                                     here
    =====================  ======================================  =========================================
    a row without keys     the mean of all values                  0; residual −inf
    query_seq_lengths      rows beyond give 0                      the same; residual −inf
    −inf in bias           NaN if the whole row is −inf            hides the key, as False in mask does
    softmax of float64     in float32                              in float64
    16-bit weights         rounded before the product with values  float32 (bfloat16 on units that need it)
    implementation         "cudnn": NVIDIA's kernel                ValueError
    arrays                 traced, differentiated, on devices      NumPy, or anything convertible to it;
                                                                   in `jax.jit`: selfattn.integrations.jax
    =====================  ======================================  =========================================

    Examples
    --------
    >>> import numpy as np
    >>> from selfattn.compat import dot_product_attention
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 10, 4, 8), dtype=np.float32)
    >>> dot_product_attention(q, k, v, is_causal=True, local_window_size=4).shape
    (2, 10, 4, 8)
    """
    check_implementation(implementation)
    query, key, value = arrays(_NAME, query=query, key=key, value=value)
    check_operands(query, key, value)
    batched = query.ndim == 4
    return_residual = flag(_NAME, "return_residual", return_residual)
    count = len(query) if batched else 1
    shape = (count, query.shape[-2], query.shape[-3], key.shape[-3])
    result = attention(
        *(x if batched else x[None] for x in (query, key, value)),
        bias=_score_operand("bias", bias, shape),
        mask=_score_operand("mask", mask, shape),
        causal=flag(_NAME, "is_causal", is_causal),
        q_offset=0,
        window=window_sides(local_window_size),
        q_lens=_lengths("query_seq_lengths", query_seq_lengths, count),
        kv_lens=_lengths("key_value_seq_lengths", key_value_seq_lengths, count),
        scale=None if scale is None else real(_NAME, "scale", scale),
        layout="bshd",
        return_lse=return_residual,
    )
    out, residual = result if return_residual else (result, None)
    if not batched:
        out = out[0]
    if residual is None:
        return out
    rows = residual.swapaxes(1, 2).astype(query.dtype)
    return out, rows if batched else rows[0]


# The checks are for arrays of any library: selfattn.integrations.jax shares them.


def check_implementation(implementation: Any) -> None:
    if implementation is not None and not (isinstance(implementation, str) and implementation == "xla"):
        raise ValueError(f"{_NAME}: implementation is {implementation!r}, but selfattn has its own: pass None")


def check_operands(query: Any, key: Any, value: Any) -> None:
    for name, array in (("query", query), ("key", key), ("value", value)):
        if array.ndim != query.ndim or array.ndim not in (3, 4):
            raise ValueError(f"{_NAME}: {name} has shape {array.shape}, but 3 or 4 dimensions are needed, as query has")
    if value.shape != key.shape:
        raise ValueError(f"{_NAME}: value has shape {value.shape} but key has {key.shape}")
    if query.shape[:-3] != key.shape[:-3]:
        raise ValueError(f"{_NAME}: key has a batch of {key.shape[0]} but query has {query.shape[0]}")


def _score_operand(name: str, value: ArrayLike | None, shape: tuple[int, ...]) -> NDArray[Any] | None:
    if value is None:
        return None
    array = as_array(_NAME, name, value)
    check_score_operand(name, array, shape)
    return array


def check_score_operand(name: str, array: Any, shape: tuple[int, ...]) -> None:
    """Raise unless a mask or bias broadcasts to the shape of the scores."""
    if name == "mask" and array.dtype != np.bool_:
        raise TypeError(f"{_NAME}: mask has dtype {array.dtype}, but bool is needed: pass numbers to add as bias")
    try:
        fits = np.broadcast_shapes(array.shape, shape) == shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"{_NAME}: {name} has shape {array.shape}, which does not broadcast to {shape}")


def window_sides(value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    pair = (value, value) if is_integer(value) else value
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(is_integer(side) for side in pair):
        raise TypeError(f"{_NAME}: local_window_size is {value!r}, but an integer or a pair of them is needed")
    if min(pair) < 0:
        raise ValueError(f"{_NAME}: local_window_size is {value!r}, but it cannot be negative")
    return int(pair[0]), int(pair[1])


def _lengths(name: str, value: ArrayLike | None, count: int) -> NDArray[np.int64] | None:
    if value is None:
        return None
    lengths = integers(_NAME, name, value)
    check_lengths(name, lengths, count)
    return lengths


def check_lengths(name: str, lengths: Any, count: int) -> None:
    if lengths.shape != (count,):
        raise ValueError(f"{_NAME}: {name} has shape {lengths.shape}, but ({count},) is needed")
