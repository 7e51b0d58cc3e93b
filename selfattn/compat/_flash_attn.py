"""The functions of flash-attn 2 on arrays: token axis before head axis, causal limits aligned with the last key."""

from __future__ import annotations

from typing import Any, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .._arguments import flag, integers, real, reals
from .._attention import attention
from .._keywords import hinted
from .._typing import Array, No, Yes
from .._varlen import attention_varlen
from ._checks import arrays, dimensions, is_integer, no_dropout, own_names
from ._pages import Pages

Window = tuple[int, int]


# fmt: off
@overload
def flash_attn_func(
    q: ArrayLike, k: ArrayLike, v: ArrayLike,
    dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: Window = ..., softcap: float = ..., alibi_slopes: ArrayLike | None = ..., deterministic: bool = ...,
    return_attn_probs: No = ...,
) -> Array: ...
@overload
def flash_attn_func(
    q: ArrayLike, k: ArrayLike, v: ArrayLike,
    dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: Window = ..., softcap: float = ..., alibi_slopes: ArrayLike | None = ..., deterministic: bool = ...,
    *, return_attn_probs: Yes,
) -> tuple[Array, Array, Array]: ...
@overload
def flash_attn_func(
    q: ArrayLike, k: ArrayLike, v: ArrayLike,
    dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: Window = ..., softcap: float = ..., alibi_slopes: ArrayLike | None = ..., deterministic: bool = ...,
    return_attn_probs: bool = ...,
) -> Any: ...
# fmt: on
@hinted
@own_names("flash_attn_func", window="window_size", scale="softmax_scale")
def flash_attn_func(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: ArrayLike | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Compute the same as ``flash_attn.flash_attn_func``, on arrays.

    Parameters
    ----------
    q : array_like, shape (B, Sq, H, D)
    k : array_like, shape (B, Sk, Hkv, D)
    v : array_like, shape (B, Sk, Hkv, Dv)
        All of the same dtype: float32, float64, float16 or bfloat16. Hkv divides H.
    dropout_p : float
        Must be 0.
    softmax_scale : float, optional
        Default ``1 / sqrt(D)``.
    causal : bool, default False
        The last query is aligned with the last key.
    window_size : (left, right)
        Number of keys that a query sees to each side of its own position; negative = unbounded.
    softcap : float
        0 = none.
    alibi_slopes : array_like, shape (H,) or (B, H), optional
    deterministic : bool
        Concerns the original's backward pass. Here, results are bit-identical in every run with either value.
    return_attn_probs : bool
        Also return the log-sum-exps and the attention weights.

    Returns
    -------
    out : ndarray, shape (B, Sq, H, Dv)
    softmax_lse : ndarray, shape (B, H, Sq)
        Only with `return_attn_probs`.
    S_dmask : ndarray, shape (B, H, Sq, Sk)
        Only with `return_attn_probs`: the weights.

    Notes
    -----
    =====================  ======================================  =========================================
    argument or case       flash-attn                              here
    =====================  ======================================  =========================================
    dropout_p > 0          drops weights at random                 ValueError
    dtypes                 float16, bfloat16                       float32 and float64 as well
    head sizes             up to 256, equal for k and v            any
    S_dmask                for tests, empty without dropout        the weights, in the computation dtype
    softmax_lse of a row   +inf                                    −inf
    without keys
    softmax_lse with       differs from the formula by a number    that of the documented formula
    causal and             per row
    alibi_slopes
    q, k, v                tensors that may require grad           arrays; no gradients
    =====================  ======================================  =========================================

    Examples
    --------
    >>> import numpy as np
    >>> from selfattn.compat import flash_attn_func
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 10, 4, 8), dtype=np.float32)
    >>> flash_attn_func(q, k, v, causal=True, window_size=(4, 0)).shape
    (2, 10, 4, 8)
    """
    name = "flash_attn_func"
    no_dropout(name, dropout_p)
    flag(name, "deterministic", deterministic)
    operands = arrays(name, q=q, k=k, v=v)
    dimensions(name, 4, **dict(zip("qkv", operands, strict=True)))
    extras = flag(name, "return_attn_probs", return_attn_probs)
    options = flash_options(name, softmax_scale, causal, window_size, softcap)
    return attention(
        *operands, **options, alibi_slopes=alibi_slopes, layout="bshd", return_lse=extras, return_weights=extras
    )


# fmt: off
@overload
def flash_attn_varlen_func(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, cu_seqlens_q: ArrayLike, cu_seqlens_k: ArrayLike,
    max_seqlen_q: int, max_seqlen_k: int, dropout_p: float = ..., softmax_scale: float | None = ...,
    causal: bool = ..., window_size: Window = ..., softcap: float = ..., alibi_slopes: ArrayLike | None = ...,
    deterministic: bool = ..., return_attn_probs: No = ..., block_table: ArrayLike | None = ...,
) -> Array: ...
@overload
def flash_attn_varlen_func(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, cu_seqlens_q: ArrayLike, cu_seqlens_k: ArrayLike,
    max_seqlen_q: int, max_seqlen_k: int, dropout_p: float = ..., softmax_scale: float | None = ...,
    causal: bool = ..., window_size: Window = ..., softcap: float = ..., alibi_slopes: ArrayLike | None = ...,
    deterministic: bool = ..., *, return_attn_probs: Yes, block_table: ArrayLike | None = ...,
) -> tuple[Array, Array, Array]: ...
@overload
def flash_attn_varlen_func(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, cu_seqlens_q: ArrayLike, cu_seqlens_k: ArrayLike,
    max_seqlen_q: int, max_seqlen_k: int, dropout_p: float = ..., softmax_scale: float | None = ...,
    causal: bool = ..., window_size: Window = ..., softcap: float = ..., alibi_slopes: ArrayLike | None = ...,
    deterministic: bool = ..., return_attn_probs: bool = ..., block_table: ArrayLike | None = ...,
) -> Any: ...
# fmt: on
@hinted
@own_names("flash_attn_varlen_func", window="window_size", scale="softmax_scale")
def flash_attn_varlen_func(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: ArrayLike | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: ArrayLike | None = None,
) -> Any:
    """Compute the same as ``flash_attn.flash_attn_varlen_func``, on arrays.

    Parameters
    ----------
    q : array_like, shape (total_q, H, D)
    k : array_like, shape (total_k, Hkv, D)
    v : array_like, shape (total_k, Hkv, Dv)
        N sequences, one after another. With `block_table`, k and v are pages: (num_blocks, page_size, Hkv, ·).
    cu_seqlens_q, cu_seqlens_k : integer array, shape (N + 1,)
        Start of each sequence, followed by the total.
    max_seqlen_q, max_seqlen_k : int
        Maximum length; no sequence may be longer.
    dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
        As in `flash_attn_func`; ``alibi_slopes`` (H,) or (N, H).
    block_table : integer array, shape (N, pages), optional
        The pages of each sequence, in order.

    Returns
    -------
    out : ndarray, shape (total_q, H, Dv)
    softmax_lse : ndarray, shape (H, total_q)
        Only with `return_attn_probs`.
    S_dmask : ndarray, shape (N, H, max_seqlen_q, max_seqlen_k)
        Only with `return_attn_probs`: the weights, 0 beyond a sequence's lengths.

    Notes
    -----
    The table of `flash_attn_func`, and:

    =====================  ======================================  =========================================
    argument or case       flash-attn                              here
    =====================  ======================================  =========================================
    max_seqlen_q,          too small values skip queries           ValueError if a sequence is longer
    max_seqlen_k
    block_table            pages of a multiple of 256 tokens       any page size; pages with contiguous rows
    return_attn_probs      the log-sum-exps                        ValueError
    with block_table
    =====================  ======================================  =========================================
    """
    name = "flash_attn_varlen_func"
    no_dropout(name, dropout_p)
    flag(name, "deterministic", deterministic)
    q, k, v = arrays(name, q=q, k=k, v=v)
    dimensions(name, 3, q=q)
    starts_q = _starts(name, "cu_seqlens_q", cu_seqlens_q, max_seqlen_q, "max_seqlen_q")
    starts_k = _starts(name, "cu_seqlens_k", cu_seqlens_k, max_seqlen_k, "max_seqlen_k")
    extras = flag(name, "return_attn_probs", return_attn_probs)
    options = flash_options(name, softmax_scale, causal, window_size, softcap)
    if block_table is not None:
        if extras:
            raise ValueError(f"{name}: return_attn_probs is True, which is not supported together with block_table")
        return _varlen_pages(q, (k, v, block_table), starts_q, starts_k, options, alibi_slopes)
    dimensions(name, 3, k=k, v=v)
    result = attention_varlen(
        q, k, v, starts_q, starts_k, **options, alibi_slopes=alibi_slopes, return_lse=extras, return_weights=extras
    )
    if not extras:
        return result
    out, lse, weights = result
    padded = np.zeros((len(weights), q.shape[1], int(max_seqlen_q), int(max_seqlen_k)), lse.dtype)
    for own, single in zip(padded, weights, strict=True):
        own[:, : single.shape[1], : single.shape[2]] = single
    return out, lse, padded


def flash_options(function: str, scale: Any, causal: Any, window_size: Any, softcap: Any) -> dict[str, Any]:
    """Return these arguments as options of selfattn's functions."""
    return {
        "scale": None if scale is None else real(function, "softmax_scale", scale),
        "causal": flag(function, "causal", causal),
        "window": _window(function, window_size),
        "softcap": _softcap(function, softcap),
    }


def _window(function: str, value: Any) -> tuple[int | None, int | None] | None:
    if not isinstance(value, (tuple, list)) or len(value) != 2 or not all(is_integer(side) for side in value):
        raise TypeError(f"{function}: window_size is {value!r}, but a pair of integers is needed")
    left, right = (None if side < 0 else int(side) for side in value)
    return None if left is None and right is None else (left, right)


def _softcap(function: str, value: Any) -> float | None:
    number = real(function, "softcap", value)
    if number < 0:
        raise ValueError(f"{function}: softcap is {value!r}, but it cannot be negative: 0.0 is none")
    return number or None


def _starts(function: str, name: str, value: Any, longest: Any, limit: str) -> NDArray[np.int64]:
    starts = np.array(integers(function, name, value))
    if starts.ndim != 1 or len(starts) == 0:
        raise ValueError(f"{function}: {name} has shape {starts.shape}, but (N + 1,) is needed")
    if starts[0] != 0 or np.any(starts[1:] < starts[:-1]):
        raise ValueError(f"{function}: {name} must start with 0 and never fall")
    if not is_integer(longest):
        raise TypeError(f"{function}: {limit} is {longest!r}, but an integer is needed")
    found = int(np.max(np.diff(starts), initial=0))
    if longest < found:
        raise ValueError(f"{function}: {limit} is {longest}, but {name} has a sequence of {found}")
    return starts


def _varlen_pages(
    q: NDArray[Any], paged: Any, starts_q: NDArray[Any], starts_k: NDArray[Any], options: Any, slopes: Any
) -> NDArray[Any]:
    name = "flash_attn_varlen_func"
    k, v, block_table = paged
    pages = Pages(name, "block_table", k, v, block_table, len(starts_k) - 1)
    if len(starts_q) != len(starts_k):
        raise ValueError(f"{name}: cu_seqlens_q has {len(starts_q)} entries but cu_seqlens_k has {len(starts_k)}")
    if starts_q[-1] != len(q):
        raise ValueError(f"{name}: cu_seqlens_q ends with {starts_q[-1]}, but q has {len(q)} rows")
    lengths = np.diff(starts_k)
    pages.check_lengths(lengths)
    count, heads = len(lengths), q.shape[1]
    own = None if slopes is None else _slopes(name, slopes, count, heads)
    out = np.empty((len(q), heads, v.shape[-1]), q.dtype)
    for i in range(count):
        rows = slice(int(starts_q[i]), int(starts_q[i + 1]))
        single = {**options, "alibi_slopes": None if own is None else own[i]}
        pages.attend(q[rows][None], np.array([i]), lengths[i : i + 1], None, single, out[rows][None])
    return out


def _slopes(function: str, value: Any, count: int, heads: int) -> NDArray[np.float64]:
    slopes = reals(function, "alibi_slopes", value)
    if slopes.shape not in ((heads,), (count, heads)):
        raise ValueError(
            f"{function}: alibi_slopes has shape {slopes.shape}, but ({heads},) or ({count}, {heads}) is needed"
        )
    return np.broadcast_to(slopes, (count, heads))
