"""Attention over sequences of different lengths, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, overload

from numpy.typing import ArrayLike

from . import _core
from ._arguments import core_options, out_array
from ._bias import T5Bias
from ._errors import refusal
from ._keywords import clean_signature, refuse_unknown
from ._packing import Packed
from ._typing import Array, No, Precision, VarlenOptions, Window, Yes

if TYPE_CHECKING:
    from typing_extensions import Unpack

_NAME = "attention_varlen"
Arrays = Sequence[ArrayLike]


# fmt: off
@overload
def attention_varlen(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, cu_seqlens_q: ArrayLike, cu_seqlens_k: ArrayLike | None = ..., *,
    return_lse: No = ..., return_weights: No = ..., **options: Unpack[VarlenOptions]
) -> Array: ...
@overload
def attention_varlen(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, cu_seqlens_q: ArrayLike, cu_seqlens_k: ArrayLike | None = ..., *,
    return_lse: Yes, return_weights: No = ..., **options: Unpack[VarlenOptions]
) -> tuple[Array, Array]: ...
@overload
def attention_varlen(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, cu_seqlens_q: ArrayLike, cu_seqlens_k: ArrayLike | None = ..., *,
    return_lse: No = ..., return_weights: Yes, **options: Unpack[VarlenOptions]
) -> tuple[Array, list[Array]]: ...
@overload
def attention_varlen(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, cu_seqlens_q: ArrayLike, cu_seqlens_k: ArrayLike | None = ..., *,
    return_lse: Yes, return_weights: Yes, **options: Unpack[VarlenOptions]
) -> tuple[Array, Array, list[Array]]: ...
@overload
def attention_varlen(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, cu_seqlens_q: ArrayLike, cu_seqlens_k: ArrayLike | None = ..., *,
    return_lse: bool = ..., return_weights: bool = ..., **options: Unpack[VarlenOptions]
) -> Any: ...
@overload
def attention_varlen(
    q: Arrays, k: Arrays, v: Arrays, *, return_lse: No = ..., return_weights: No = ...,
    **options: Unpack[VarlenOptions]
) -> list[Array]: ...
@overload
def attention_varlen(
    q: Arrays, k: Arrays, v: Arrays, *, return_lse: Yes, return_weights: No = ..., **options: Unpack[VarlenOptions]
) -> tuple[list[Array], list[Array]]: ...
@overload
def attention_varlen(
    q: Arrays, k: Arrays, v: Arrays, *, return_lse: No = ..., return_weights: Yes, **options: Unpack[VarlenOptions]
) -> tuple[list[Array], list[Array]]: ...
@overload
def attention_varlen(
    q: Arrays, k: Arrays, v: Arrays, *, return_lse: Yes, return_weights: Yes, **options: Unpack[VarlenOptions]
) -> tuple[list[Array], list[Array], list[Array]]: ...
@overload
def attention_varlen(
    q: Arrays, k: Arrays, v: Arrays, *, return_lse: bool = ..., return_weights: bool = ...,
    **options: Unpack[VarlenOptions]
) -> Any: ...
# fmt: on
@clean_signature()
def attention_varlen(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: ArrayLike | None = None,
    cu_seqlens_k: ArrayLike | None = None,
    *,
    mask: Sequence[ArrayLike | None] | None = None,
    bias: Sequence[ArrayLike | None] | None = None,
    causal: bool = False,
    q_offset: ArrayLike | None = None,
    window: Window | None = None,
    kv_starts: ArrayLike | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    return_lse: bool = False,
    return_weights: bool = False,
    out: Array | None = None,
    precision: Precision = "highest",
    num_threads: int | None = None,
    t5: T5Bias | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
    chunk: int | None = None,
    prefix_lens: ArrayLike | None = None,
    **unknown: Any,
) -> Any:
    """Attend within each of N sequences of different lengths; each result is bit-identical to that of a separate call.

    Parameters
    ----------
    q : array_like, shape (total_q, H, D)
    k : array_like, shape (total_k, Hkv, D)
    v : array_like, shape (total_k, Hkv, Dv)
        The tokens of all sequences, one sequence after another. Alternatively three lists of N arrays (tokens, heads,
        size), without cu_seqlens.
    cu_seqlens_q, cu_seqlens_k : integer array, shape (N + 1,)
        Start of each sequence, followed by the total: sequence i has the rows ``cu_seqlens[i]:cu_seqlens[i + 1]``.
        cu_seqlens_k defaults to cu_seqlens_q.
    mask, bias : sequence of N arrays or None, optional
        One per sequence, as in `attention`, broadcasting to (H, queries of that sequence, keys of that sequence).
    q_offset : int or integer array, shape (N,), optional
        As in `attention`; default: the last query is aligned with the last key of its sequence.
    kv_starts : int or integer array, shape (N,), optional
        Keys before it, counted from the start of their sequence, are hidden. Positions do not change.
    prefix_lens : int or integer array, shape (N,), optional
        As in `attention`, counted from the start of each sequence; at most its length.
    alibi_slopes : array_like, shape (H,) or (N, H), optional
    causal, window, chunk, scale, softcap, sinks, return_lse, return_weights, precision, num_threads, t5
        As in `attention`.
    dropout, seed
        As in `attention`: sequence i counts as batch entry i, and its queries and keys are counted from its own start.
    out : ndarray, optional
        Array for a packed result, with exactly the result's shape and dtype, and any strides.

    Returns
    -------
    out : ndarray, shape (total_q, H, Dv)
        In q's dtype; a list of N arrays if lists were passed.
    lse : ndarray, shape (H, total_q)
        Only with `return_lse`; a list of N arrays if lists were passed.
    weights : list of N ndarrays (H, queries, keys)
        Only with `return_weights`.

    Raises
    ------
    TypeError, ValueError, MemoryError
        As from `attention`; a message about a single sequence says which one.

    Examples
    --------
    >>> import numpy as np
    >>> import selfattn as sa
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 10, 2, 8), dtype=np.float32)  # 3 + 7 tokens, 2 heads
    >>> out = sa.attention_varlen(q, k, v, [0, 3, 10])
    >>> alone = sa.attention(q[3:], k[3:], v[3:], layout="bshd")
    >>> bool(np.array_equal(out[3:], alone))
    True
    """
    if unknown:
        refuse_unknown(attention_varlen, unknown, {"q_lens": "cu_seqlens_q", "kv_lens": "cu_seqlens_k"})
    packed = Packed.check(_NAME, (q, k, v), cu_seqlens_q, cu_seqlens_k)
    if packed.lists and out is not None:
        raise refusal(TypeError, _NAME, "out", " is for packed arrays, not for lists")
    inputs = packed.inputs(
        _NAME, mask=mask, bias=bias, q_offset=q_offset, alibi_slopes=alibi_slopes, kv_starts=kv_starts,
        prefix_lens=prefix_lens,
    )  # fmt: skip
    options = core_options(
        _NAME, sinks=sinks, t5=t5, layout="bshd", causal=causal, window=window, scale=scale, softcap=softcap,
        precision=precision, return_lse=return_lse, return_weights=return_weights, num_threads=num_threads,
        dropout=dropout, seed=seed, chunk=chunk,
    )  # fmt: skip
    target = None if out is None else out_array(_NAME, out)
    result = _core.attention_varlen(_NAME, inputs, target, options)
    if not return_lse and not return_weights:
        return packed.split(result, packed.queries)
    out, *rest = result
    parts = [packed.split(out, packed.queries)]
    if return_lse:
        parts.append(packed.split(rest.pop(0), packed.queries, axis=1))
    return (*parts, *rest)
