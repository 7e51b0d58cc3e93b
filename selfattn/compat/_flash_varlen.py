"""flash-attn's function for packed sequences, on arrays."""

from __future__ import annotations

from typing import Any, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .._arguments import flag, integers, reals
from .._errors import refusal
from .._keywords import hinted
from .._typing import Array, No, Yes
from .._varlen import attention_varlen
from ._checks import arrays, dimensions, is_integer, no_dropout, own_names
from ._flash_attn import Window, flash_options
from ._pages import Pages


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
    """Compute ``flash_attn.flash_attn_varlen_func`` on arrays.

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
    The table of `flash_attn_func` applies, and:

    =====================  ======================================  =========================================
    argument or case       flash-attn                              here
    =====================  ======================================  =========================================
    max_seqlen_q,          too small values skip queries           ValueError if a sequence is longer
    max_seqlen_k
    block_table            pages of a multiple of 256 tokens       any page size; pages with contiguous rows
    return_attn_probs      the log-sum-exps                        ValueError
    with block_table
    =====================  ======================================  =========================================

    Examples
    --------
    >>> import numpy as np
    >>> from selfattn.compat import flash_attn_varlen_func
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 12, 4, 8), dtype=np.float32)
    >>> bounds = [0, 5, 12]  # two sequences, of 5 and 7 tokens
    >>> flash_attn_varlen_func(q, k, v, bounds, bounds, 7, 7, causal=True).shape
    (12, 4, 8)
    """
    name = "flash_attn_varlen_func"
    no_dropout(name, dropout_p)
    flag(name, "deterministic", deterministic)
    q, k, v = arrays(name, q=q, k=k, v=v)
    dimensions(name, 3, q=q)
    starts_q = starts(name, "cu_seqlens_q", cu_seqlens_q, max_seqlen_q, "max_seqlen_q")
    starts_k = starts(name, "cu_seqlens_k", cu_seqlens_k, max_seqlen_k, "max_seqlen_k")
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


def starts(function: str, name: str, value: Any, longest: Any, limit: str) -> NDArray[np.int64]:
    """Return checked bounds of sequences, none of which is longer than `longest`."""
    found = np.array(integers(function, name, value))
    if found.ndim != 1 or len(found) == 0:
        raise refusal(ValueError, function, name, f" has shape {found.shape}, but (N + 1,) is needed")
    if found[0] != 0 or np.any(found[1:] < found[:-1]):
        raise refusal(ValueError, function, name, " must start with 0 and never fall")
    if not is_integer(longest):
        raise refusal(TypeError, function, limit, f" is {longest!r}, but an integer is needed")
    most = int(np.max(np.diff(found), initial=0))
    if longest < most:
        raise refusal(ValueError, function, limit, f" is {longest}, but ", name, f" has a sequence of {most}")
    return found


def _varlen_pages(
    q: NDArray[Any], paged: Any, starts_q: NDArray[Any], starts_k: NDArray[Any], options: Any, slopes: Any
) -> NDArray[Any]:
    name = "flash_attn_varlen_func"
    k, v, block_table = paged
    pages = Pages(name, "block_table", (k, v), block_table, len(starts_k) - 1)
    if len(starts_q) != len(starts_k):
        raise ValueError(f"{name}: cu_seqlens_q has {len(starts_q)} entries but cu_seqlens_k has {len(starts_k)}")
    if starts_q[-1] != len(q):
        raise ValueError(f"{name}: cu_seqlens_q ends with {starts_q[-1]}, but q has {len(q)} rows")
    lengths = np.diff(starts_k)
    pages.check_lengths(lengths)
    count, heads = len(lengths), q.shape[1]
    own = None if slopes is None else _slopes(name, slopes, count, heads)
    out = np.empty((len(q), heads, v.shape[-1]), q.dtype)
    queries = np.diff(starts_q)
    # One call for all sequences that have the same number of queries.
    for size in np.unique(queries):
        members = np.flatnonzero(queries == size)
        rows = starts_q[members, None] + np.arange(size)
        group = {**options, "alibi_slopes": None if own is None else own[members]}
        out[rows] = pages.attend(pages.step(members, lengths[members]), q[rows], group)
    return out


def _slopes(function: str, value: Any, count: int, heads: int) -> NDArray[np.float64]:
    slopes = reals(function, "alibi_slopes", value)
    if slopes.shape not in ((heads,), (count, heads)):
        raise ValueError(
            f"{function}: alibi_slopes has shape {slopes.shape}, but ({heads},) or ({count}, {heads}) is needed"
        )
    return np.broadcast_to(slopes, (count, heads))
