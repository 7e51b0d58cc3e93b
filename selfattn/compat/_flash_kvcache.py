"""flash-attn 2's function for caches that the caller owns as arrays."""

from __future__ import annotations

from typing import Any, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import _core
from .._arguments import as_array, flag, integers
from .._keywords import hinted
from .._typing import Array, No, Yes
from ._checks import arrays, dimensions, is_integer, own_names
from ._flash_attn import Window, flash_options
from ._pages import Pages
from ._rotary import RotaryTables

_NAME = "flash_attn_with_kvcache"

# Renames for this call only: k and v are also arguments of flash_attn_with_kvcache.
_attend = own_names(_NAME, k="k_cache", v="v_cache", scale="softmax_scale")(Pages.attend)


# fmt: off
@overload
def flash_attn_with_kvcache(
    q: ArrayLike, k_cache: Any, v_cache: Any, k: ArrayLike | None = ..., v: ArrayLike | None = ...,
    rotary_cos: ArrayLike | None = ..., rotary_sin: ArrayLike | None = ..., cache_seqlens: ArrayLike | None = ...,
    cache_batch_idx: ArrayLike | None = ..., cache_leftpad: ArrayLike | None = ..., block_table: ArrayLike | None = ...,
    softmax_scale: float | None = ..., causal: bool = ..., window_size: Window = ..., softcap: float = ...,
    rotary_interleaved: bool = ..., alibi_slopes: ArrayLike | None = ..., num_splits: int = ...,
    return_softmax_lse: No = ...,
) -> Array: ...
@overload
def flash_attn_with_kvcache(
    q: ArrayLike, k_cache: Any, v_cache: Any, k: ArrayLike | None = ..., v: ArrayLike | None = ...,
    rotary_cos: ArrayLike | None = ..., rotary_sin: ArrayLike | None = ..., cache_seqlens: ArrayLike | None = ...,
    cache_batch_idx: ArrayLike | None = ..., cache_leftpad: ArrayLike | None = ..., block_table: ArrayLike | None = ...,
    softmax_scale: float | None = ..., causal: bool = ..., window_size: Window = ..., softcap: float = ...,
    rotary_interleaved: bool = ..., alibi_slopes: ArrayLike | None = ..., num_splits: int = ...,
    *, return_softmax_lse: Yes,
) -> tuple[Array, Array]: ...
@overload
def flash_attn_with_kvcache(
    q: ArrayLike, k_cache: Any, v_cache: Any, k: ArrayLike | None = ..., v: ArrayLike | None = ...,
    rotary_cos: ArrayLike | None = ..., rotary_sin: ArrayLike | None = ..., cache_seqlens: ArrayLike | None = ...,
    cache_batch_idx: ArrayLike | None = ..., cache_leftpad: ArrayLike | None = ..., block_table: ArrayLike | None = ...,
    softmax_scale: float | None = ..., causal: bool = ..., window_size: Window = ..., softcap: float = ...,
    rotary_interleaved: bool = ..., alibi_slopes: ArrayLike | None = ..., num_splits: int = ...,
    return_softmax_lse: bool = ...,
) -> Any: ...
# fmt: on
@hinted
def flash_attn_with_kvcache(
    q: ArrayLike,
    k_cache: Any,
    v_cache: Any,
    k: ArrayLike | None = None,
    v: ArrayLike | None = None,
    rotary_cos: ArrayLike | None = None,
    rotary_sin: ArrayLike | None = None,
    cache_seqlens: ArrayLike | None = None,
    cache_batch_idx: ArrayLike | None = None,
    cache_leftpad: ArrayLike | None = None,
    block_table: ArrayLike | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: ArrayLike | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Compute ``flash_attn.flash_attn_with_kvcache`` on arrays; the caches are updated in place.

    Parameters
    ----------
    q : array_like, shape (B, Sq, H, D)
    k_cache : array, shape (Bc, capacity, Hkv, D)
    v_cache : array, shape (Bc, capacity, Hkv, Dv)
        With `block_table`: pages, (num_blocks, page_size, Hkv, ·). In q's dtype, read in place.
    k : array_like, shape (B, T, Hkv, D), optional
    v : array_like, shape (B, T, Hkv, Dv), optional
        New tokens, written into the caches after the existing ones, before q attends.
    rotary_cos, rotary_sin : array_like, shape (positions, rotary_dim / 2), optional
        Rotate k and q, whose positions start at `cache_seqlens`; with neither `causal` nor `window_size`, all queries
        are at position `cache_seqlens`.
    cache_seqlens : int or integer array (B,), optional
        Number of tokens in the cache before the call; default: the cache is full.
    cache_batch_idx : integer array (B,), optional
        The row of the caches for each row of q.
    cache_leftpad : integer array (B,), optional
        Start of each sequence in its row of the cache.
    block_table : integer array, shape (B, pages), optional
        The pages of each sequence, in order.
    softmax_scale, causal, window_size, softcap, alibi_slopes
        As in `flash_attn_func`.
    rotary_interleaved : bool, default True
        True: adjacent elements pair. False: element i pairs with ``i + rotary_dim / 2``.
    num_splits : int
        A hint, at least 0. It is not needed here and changes neither the result nor the speed.
    return_softmax_lse : bool
        Also return the log-sum-exps.

    Returns
    -------
    out : ndarray, shape (B, Sq, H, Dv)
    softmax_lse : ndarray, shape (B, H, Sq)
        Only with `return_softmax_lse`.

    Notes
    -----
    A failed call leaves the caches unchanged. The table of `flash_attn_func` applies, and:

    =====================  ======================================  =========================================
    argument or case       flash-attn                              here
    =====================  ======================================  =========================================
    num_splits > 1         splits the keys into that many parts    no effect: selfattn decides
    block_table            pages of a multiple of 256 tokens, not  any page size, also with `cache_leftpad`;
                           with `cache_leftpad`                    not with `cache_batch_idx`
    cache_batch_idx,       the row written last is kept            ValueError if two rows would write to the
    block_table repeat                                             same place
    rotary_cos             rotary_dim a multiple of 16             any even rotary_dim up to D
    caches too short       undefined                               ValueError
    lists as caches        –                                       TypeError: they could not be updated
    =====================  ======================================  =========================================

    Examples
    --------
    >>> import numpy as np
    >>> from selfattn.compat import flash_attn_with_kvcache
    >>> k_cache, v_cache = np.zeros((2, 1, 16, 2, 8), dtype=np.float32)
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 3, 2, 8), dtype=np.float32)
    >>> flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=5, causal=True).shape
    (1, 3, 2, 8)
    >>> bool(np.array_equal(k_cache[:, 5:8], k))
    True
    """
    (query,) = arrays(_NAME, q=q)
    dimensions(_NAME, 4, q=query)
    pages = _pages(query, _held("k_cache", k_cache), _held("v_cache", v_cache), cache_batch_idx, block_table)
    lengths = _lengths(cache_seqlens, len(query), pages, given=block_table is not None or k is not None)
    _check_splits(num_splits)
    return_lse = flag(_NAME, "return_softmax_lse", return_softmax_lse)
    options = flash_options(_NAME, softmax_scale, causal, window_size, softcap)
    options |= {"alibi_slopes": alibi_slopes, "return_lse": return_lse}
    new = _new_tokens(query, k, v, pages)
    total = lengths + (0 if new is None else new[0].shape[1])
    pages.check_lengths(total)
    starts = _leftpad(cache_leftpad, lengths)
    interleaved = flag(_NAME, "rotary_interleaved", rotary_interleaved)
    if rotary_cos is not None or rotary_sin is not None:
        if new is None:
            raise ValueError(f"{_NAME}: rotary_cos and rotary_sin are given without k and v")
        rotate = RotaryTables(_NAME, rotary_cos, rotary_sin, interleaved, query.shape[-1])
        in_order = options["causal"] or options["window"] is not None
        query = rotate(query, lengths[:, None] + np.arange(query.shape[1]) * in_order)
        new = rotate(new[0], lengths[:, None] + np.arange(new[0].shape[1])), new[1]
    if new is not None:
        _check_distinct(pages.slots(lengths, new[0].shape[1]), pages.page_size)
    step = pages.step(np.arange(len(query)), lengths, starts)
    try:
        return _attend(pages, step, query, options, new=new)
    except BaseException:
        _core.undo(step)
        raise


def _held(name: str, value: Any) -> NDArray[Any]:
    """Return an array over the caller's own memory."""
    array, again = as_array(_NAME, name, value), as_array(_NAME, name, value)
    if array.size and not np.may_share_memory(array, again):
        raise TypeError(f"{_NAME}: {name} is a {type(value).__name__}, whose memory cannot be used in place")
    if array.ndim != 4:
        raise ValueError(f"{_NAME}: {name} has shape {array.shape}, but 4 dimensions are needed")
    return array


def _pages(query: NDArray[Any], k: NDArray[Any], v: NDArray[Any], index: Any, table: Any) -> Pages:
    for name, cache in (("k_cache", k), ("v_cache", v)):
        if cache.dtype != query.dtype:
            raise TypeError(f"{_NAME}: {name} has dtype {cache.dtype} but q has {query.dtype}: they must be equal")
    if table is not None:
        if index is not None:
            raise ValueError(f"{_NAME}: cache_batch_idx is given together with block_table: pass one of them")
        return Pages(_NAME, "block_table", (k, v), table, len(query), "_cache")
    # Treat each row of the cache as a single page as long as the cache.
    if index is None:
        if len(k) != len(query):
            raise ValueError(f"{_NAME}: k_cache has {len(k)} rows but q has {len(query)}: pass cache_batch_idx")
        index = np.arange(len(query))
    rows = integers(_NAME, "cache_batch_idx", index)
    if rows.shape != (len(query),):
        raise ValueError(f"{_NAME}: cache_batch_idx has shape {rows.shape}, but ({len(query)},) is needed")
    for b in np.flatnonzero((rows < 0) | (rows >= len(k)))[:1]:
        raise ValueError(f"{_NAME}: cache_batch_idx holds {rows[b]}, which is outside 0..{len(k) - 1}")
    return Pages(_NAME, "k_cache", (k, v), rows[:, None], len(query), "_cache")


def _per_row(name: str, value: Any, count: int) -> NDArray[np.int64]:
    array = np.array(integers(_NAME, name, value))  # a copy, so that it cannot change after the checks
    if array.shape != (count,):
        raise ValueError(f"{_NAME}: {name} has shape {array.shape}, but ({count},) is needed")
    return array


def _lengths(value: Any, count: int, pages: Pages, given: bool) -> NDArray[np.int64]:
    if value is None:
        if given:
            raise ValueError(f"{_NAME}: cache_seqlens is missing, which k and v as well as block_table need")
        return np.full(count, pages.page_size, np.int64)
    if is_integer(value):
        lengths = np.full(count, min(max(int(value), -1), np.iinfo(np.int64).max), np.int64)
    else:
        lengths = _per_row("cache_seqlens", value, count)
    pages.check_lengths(lengths)  # checked before additions, which could hide negative values or overflow
    return lengths


def _leftpad(value: Any, lengths: NDArray[np.int64]) -> NDArray[np.int64] | None:
    if value is None:
        return None
    starts = _per_row("cache_leftpad", value, len(lengths))
    for b in np.flatnonzero((starts < 0) | (starts > lengths))[:1]:
        raise ValueError(f"{_NAME}: cache_leftpad holds {starts[b]}, which is outside 0..{lengths[b]} (sequence {b})")
    return starts


def _check_splits(value: Any) -> None:
    if not is_integer(value):
        raise TypeError(f"{_NAME}: num_splits is {value!r}, but an integer is needed")
    if value < 0:
        raise ValueError(f"{_NAME}: num_splits is {value}, but it cannot be negative")


def _new_tokens(
    query: NDArray[Any], k: ArrayLike | None, v: ArrayLike | None, pages: Pages
) -> tuple[NDArray[Any], NDArray[Any]] | None:
    if k is None or v is None:
        if k is not None or v is not None:
            raise ValueError(f"{_NAME}: {'v' if k is None else 'k'} is given without {'k' if k is None else 'v'}")
        return None
    _, key, value = arrays(_NAME, q=query, k=k, v=v)
    dimensions(_NAME, 4, k=key, v=value)
    for name, new, cache in (("k", key, pages.k), ("v", value, pages.v)):
        wanted = (len(query), key.shape[1], *cache.shape[2:])
        if new.shape != wanted:
            raise ValueError(f"{_NAME}: {name} has shape {new.shape}, but {wanted} is needed")
        if not cache.flags.writeable:
            raise ValueError(f"{_NAME}: {name}_cache is read-only, but {name} is to be written into it")
    return key, value


def _check_distinct(slots: tuple[NDArray[Any], NDArray[Any]], page_size: int) -> None:
    places = slots[0].astype(np.int64) * page_size + slots[1]
    if len(np.unique(places)) < places.size:
        raise ValueError(f"{_NAME}: two rows of k would be written to one place of the cache")
