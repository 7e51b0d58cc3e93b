"""flash-attn 2's functions whose queries, keys and values, or keys and values, are one array."""

from __future__ import annotations

from typing import Any, overload

from numpy.typing import ArrayLike, NDArray

from .._arguments import as_array
from .._errors import refusal
from .._keywords import hinted
from .._typing import Array, No, Yes
from ._checks import own_names
from ._flash_attn import Window, flash_attn_func
from ._flash_varlen import flash_attn_varlen_func


# fmt: off
@overload
def flash_attn_qkvpacked_func(
    qkv: ArrayLike, dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: Window = ..., softcap: float = ..., alibi_slopes: ArrayLike | None = ..., deterministic: bool = ...,
    return_attn_probs: No = ...,
) -> Array: ...
@overload
def flash_attn_qkvpacked_func(
    qkv: ArrayLike, dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: Window = ..., softcap: float = ..., alibi_slopes: ArrayLike | None = ..., deterministic: bool = ...,
    *, return_attn_probs: Yes,
) -> tuple[Array, Array, Array]: ...
@overload
def flash_attn_qkvpacked_func(
    qkv: ArrayLike, dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: Window = ..., softcap: float = ..., alibi_slopes: ArrayLike | None = ..., deterministic: bool = ...,
    return_attn_probs: bool = ...,
) -> Any: ...
# fmt: on
@hinted
@own_names("flash_attn_qkvpacked_func", q="qkv", k="qkv", v="qkv")
def flash_attn_qkvpacked_func(
    qkv: ArrayLike,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: ArrayLike | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Compute ``flash_attn.flash_attn_qkvpacked_func`` on arrays, without copying q, k and v out of the packed array.

    Parameters
    ----------
    qkv : array_like, shape (B, S, 3, H, D)
        Queries, keys and values, in this order.
    dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
        As in `flash_attn_func`.

    Returns
    -------
    out : ndarray, shape (B, S, H, D)
        With `return_attn_probs` a tuple, as from `flash_attn_func`, whose table of differences applies.

    Examples
    --------
    >>> import numpy as np
    >>> from selfattn.compat import flash_attn_qkvpacked_func
    >>> qkv = np.random.default_rng(0).standard_normal((2, 10, 3, 4, 8), dtype=np.float32)
    >>> flash_attn_qkvpacked_func(qkv, causal=True).shape
    (2, 10, 4, 8)
    """
    q, k, v = _parts("flash_attn_qkvpacked_func", "qkv", qkv, 5, 3)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


# fmt: off
@overload
def flash_attn_kvpacked_func(
    q: ArrayLike, kv: ArrayLike, dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: Window = ..., softcap: float = ..., alibi_slopes: ArrayLike | None = ..., deterministic: bool = ...,
    return_attn_probs: No = ...,
) -> Array: ...
@overload
def flash_attn_kvpacked_func(
    q: ArrayLike, kv: ArrayLike, dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: Window = ..., softcap: float = ..., alibi_slopes: ArrayLike | None = ..., deterministic: bool = ...,
    *, return_attn_probs: Yes,
) -> tuple[Array, Array, Array]: ...
@overload
def flash_attn_kvpacked_func(
    q: ArrayLike, kv: ArrayLike, dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: Window = ..., softcap: float = ..., alibi_slopes: ArrayLike | None = ..., deterministic: bool = ...,
    return_attn_probs: bool = ...,
) -> Any: ...
# fmt: on
@hinted
@own_names("flash_attn_kvpacked_func", k="kv", v="kv")
def flash_attn_kvpacked_func(
    q: ArrayLike,
    kv: ArrayLike,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: ArrayLike | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Compute ``flash_attn.flash_attn_kvpacked_func`` on arrays, without copying k and v out of the packed array.

    Parameters
    ----------
    q : array_like, shape (B, Sq, H, D)
    kv : array_like, shape (B, Sk, 2, Hkv, D)
        Keys and values, in this order.
    dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
        As in `flash_attn_func`.

    Returns
    -------
    out : ndarray, shape (B, Sq, H, D)
        With `return_attn_probs` a tuple, as from `flash_attn_func`, whose table of differences applies.

    Examples
    --------
    >>> import numpy as np
    >>> from selfattn.compat import flash_attn_kvpacked_func
    >>> rng = np.random.default_rng(0)
    >>> q = rng.standard_normal((2, 10, 4, 8), dtype=np.float32)
    >>> kv = rng.standard_normal((2, 12, 2, 1, 8), dtype=np.float32)
    >>> flash_attn_kvpacked_func(q, kv, causal=True).shape
    (2, 10, 4, 8)
    """
    k, v = _parts("flash_attn_kvpacked_func", "kv", kv, 5, 2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


# fmt: off
@overload
def flash_attn_varlen_qkvpacked_func(
    qkv: ArrayLike, cu_seqlens: ArrayLike, max_seqlen: int, dropout_p: float = ..., softmax_scale: float | None = ...,
    causal: bool = ..., window_size: Window = ..., softcap: float = ..., alibi_slopes: ArrayLike | None = ...,
    deterministic: bool = ..., return_attn_probs: No = ...,
) -> Array: ...
@overload
def flash_attn_varlen_qkvpacked_func(
    qkv: ArrayLike, cu_seqlens: ArrayLike, max_seqlen: int, dropout_p: float = ..., softmax_scale: float | None = ...,
    causal: bool = ..., window_size: Window = ..., softcap: float = ..., alibi_slopes: ArrayLike | None = ...,
    deterministic: bool = ..., *, return_attn_probs: Yes,
) -> tuple[Array, Array, Array]: ...
@overload
def flash_attn_varlen_qkvpacked_func(
    qkv: ArrayLike, cu_seqlens: ArrayLike, max_seqlen: int, dropout_p: float = ..., softmax_scale: float | None = ...,
    causal: bool = ..., window_size: Window = ..., softcap: float = ..., alibi_slopes: ArrayLike | None = ...,
    deterministic: bool = ..., return_attn_probs: bool = ...,
) -> Any: ...
# fmt: on
@hinted
@own_names(
    "flash_attn_varlen_qkvpacked_func", q="qkv", k="qkv", v="qkv", cu_seqlens_q="cu_seqlens", cu_seqlens_k="cu_seqlens",
    max_seqlen_q="max_seqlen", max_seqlen_k="max_seqlen",
)  # fmt: skip
def flash_attn_varlen_qkvpacked_func(
    qkv: ArrayLike,
    cu_seqlens: ArrayLike,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: ArrayLike | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Compute ``flash_attn.flash_attn_varlen_qkvpacked_func`` on arrays, without copying q, k and v out of `qkv`.

    Parameters
    ----------
    qkv : array_like, shape (total, 3, H, D)
        Queries, keys and values of N sequences, one after another.
    cu_seqlens : integer array, shape (N + 1,)
        Start of each sequence, followed by the total.
    max_seqlen : int
        Maximum length; no sequence may be longer.
    dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
        As in `flash_attn_varlen_func`.

    Returns
    -------
    out : ndarray, shape (total, H, D)
        With `return_attn_probs` a tuple, as from `flash_attn_varlen_func`, whose tables of differences apply.

    Examples
    --------
    >>> import numpy as np
    >>> from selfattn.compat import flash_attn_varlen_qkvpacked_func
    >>> rng = np.random.default_rng(0)
    >>> qkv = rng.standard_normal((10, 3, 4, 8), dtype=np.float32)
    >>> flash_attn_varlen_qkvpacked_func(qkv, [0, 3, 10], 7, causal=True).shape
    (10, 4, 8)
    """
    q, k, v = _parts("flash_attn_varlen_qkvpacked_func", "qkv", qkv, 4, 3)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


# fmt: off
@overload
def flash_attn_varlen_kvpacked_func(
    q: ArrayLike, kv: ArrayLike, cu_seqlens_q: ArrayLike, cu_seqlens_k: ArrayLike,
    max_seqlen_q: int, max_seqlen_k: int, dropout_p: float = ..., softmax_scale: float | None = ...,
    causal: bool = ..., window_size: Window = ..., softcap: float = ..., alibi_slopes: ArrayLike | None = ...,
    deterministic: bool = ..., return_attn_probs: No = ...,
) -> Array: ...
@overload
def flash_attn_varlen_kvpacked_func(
    q: ArrayLike, kv: ArrayLike, cu_seqlens_q: ArrayLike, cu_seqlens_k: ArrayLike,
    max_seqlen_q: int, max_seqlen_k: int, dropout_p: float = ..., softmax_scale: float | None = ...,
    causal: bool = ..., window_size: Window = ..., softcap: float = ..., alibi_slopes: ArrayLike | None = ...,
    deterministic: bool = ..., *, return_attn_probs: Yes,
) -> tuple[Array, Array, Array]: ...
@overload
def flash_attn_varlen_kvpacked_func(
    q: ArrayLike, kv: ArrayLike, cu_seqlens_q: ArrayLike, cu_seqlens_k: ArrayLike,
    max_seqlen_q: int, max_seqlen_k: int, dropout_p: float = ..., softmax_scale: float | None = ...,
    causal: bool = ..., window_size: Window = ..., softcap: float = ..., alibi_slopes: ArrayLike | None = ...,
    deterministic: bool = ..., return_attn_probs: bool = ...,
) -> Any: ...
# fmt: on
@hinted
@own_names("flash_attn_varlen_kvpacked_func", k="kv", v="kv")
def flash_attn_varlen_kvpacked_func(
    q: ArrayLike,
    kv: ArrayLike,
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
) -> Any:
    """Compute ``flash_attn.flash_attn_varlen_kvpacked_func`` on arrays, without copying k and v out of `kv`.

    Parameters
    ----------
    q : array_like, shape (total_q, H, D)
    kv : array_like, shape (total_k, 2, Hkv, D)
        Keys and values of N sequences, one after another.
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        As in `flash_attn_varlen_func`.
    dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
        As in `flash_attn_varlen_func`.

    Returns
    -------
    out : ndarray, shape (total_q, H, D)
        With `return_attn_probs` a tuple, as from `flash_attn_varlen_func`, whose tables of differences apply.

    Examples
    --------
    >>> import numpy as np
    >>> from selfattn.compat import flash_attn_varlen_kvpacked_func
    >>> rng = np.random.default_rng(0)
    >>> q = rng.standard_normal((5, 4, 8), dtype=np.float32)
    >>> kv = rng.standard_normal((10, 2, 1, 8), dtype=np.float32)
    >>> flash_attn_varlen_kvpacked_func(q, kv, [0, 2, 5], [0, 3, 10], 3, 7, causal=True).shape
    (5, 4, 8)
    """
    k, v = _parts("flash_attn_varlen_kvpacked_func", "kv", kv, 4, 2)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def _parts(function: str, name: str, value: ArrayLike, ndim: int, count: int) -> list[NDArray[Any]]:
    """Return views of the parts of a packed array, which follow one another along the third axis from the end."""
    packed = as_array(function, name, value)
    if packed.ndim != ndim or packed.shape[-3] != count:
        needed = "(B, S, " if ndim == 5 else "(total, "
        text = f" has shape {packed.shape}, but {needed}{count}, heads, head_dim) is needed"
        raise refusal(ValueError, function, name, text)
    return [packed[..., i, :, :] for i in range(count)]
