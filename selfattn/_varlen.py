"""Attention over sequences of different lengths, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _core
from ._arguments import as_array, core_options, integers, out_array, reals
from ._bias import T5Bias
from ._keywords import clean_signature, refuse_unknown
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
    alibi_slopes : array_like, shape (H,) or (N, H), optional
    causal, window, scale, softcap, sinks, return_lse, return_weights, precision, num_threads, t5
        As in `attention`.
    dropout, seed
        As in `attention`, where sequence i counts as batch entry i, and its queries and keys from its own start.
    out : ndarray, optional
        Array for a packed result: exactly its shape and dtype, any strides.

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
    lists = [isinstance(x, (list, tuple)) for x in (q, k, v)]
    if any(lists):
        if not all(lists):
            raise TypeError(f"{_NAME}: q, k and v are of different kinds, but must be three arrays or three lists")
        if cu_seqlens_q is not None or cu_seqlens_k is not None:
            raise ValueError(f"{_NAME}: cu_seqlens is given, but lists of arrays have their lengths")
        if out is not None:
            raise TypeError(f"{_NAME}: out is for packed arrays, not for lists")
        q, cu_seqlens_q = _packed("q", q)
        k, cu_seqlens_k = _packed("k", k)
        v, cu_v = _packed("v", v)
        if not np.array_equal(cu_v, cu_seqlens_k):
            raise ValueError(f"{_NAME}: v has lengths {np.diff(cu_v)} but k has {np.diff(cu_seqlens_k)}")
    else:
        q, k, v = as_array(_NAME, "q", q), as_array(_NAME, "k", k), as_array(_NAME, "v", v)
    if cu_seqlens_q is None:
        raise TypeError(f"{_NAME}: cu_seqlens_q is missing")
    queries = _starts("cu_seqlens_q", cu_seqlens_q, "q", q)
    keys = _starts("cu_seqlens_k", queries if cu_seqlens_k is None else cu_seqlens_k, "k", k)
    if len(keys) != len(queries):
        raise ValueError(f"{_NAME}: cu_seqlens_k has {len(keys)} entries but cu_seqlens_q has {len(queries)}")
    if v.ndim and k.ndim and len(v) != len(k):
        raise ValueError(f"{_NAME}: v has {len(v)} rows but k has {len(k)}")
    count = len(queries) - 1
    own = (
        _each("mask", mask, count),
        _each("bias", bias, count),
        None if q_offset is None else _per_sequence("q_offset", integers(_NAME, "q_offset", q_offset), (count,)),
        None if alibi_slopes is None else _slopes(alibi_slopes, count, q),
    )
    options = core_options(
        _NAME, sinks=sinks, t5=t5, layout="bshd", causal=causal, window=window, scale=scale, softcap=softcap,
        precision=precision, return_lse=return_lse, return_weights=return_weights, num_threads=num_threads,
        dropout=dropout, seed=seed,
    )  # fmt: skip
    target = None if out is None else out_array(_NAME, out)
    result = _core.attention_varlen((q, k, v, queries, keys, *own), target, options)
    return _unpacked(result, queries, return_lse, return_weights) if all(lists) else result


def _packed(name: str, arrays: Any) -> tuple[NDArray[Any], NDArray[np.int64]]:
    # Copies the inputs once, which is cheap compared with attention itself.
    parts = [as_array(_NAME, f"{name}[{i}]", x) for i, x in enumerate(arrays)]
    if not parts:
        raise ValueError(f"{_NAME}: {name} is an empty list, but at least one sequence is needed")
    for i, part in enumerate(parts):
        if part.ndim != 3 or part.shape[1:] != parts[0].shape[1:]:
            raise ValueError(
                f"{_NAME}: {name}[{i}] has shape {part.shape}, but (tokens, heads, size) is needed, the last two as "
                f"in {name}[0]: {parts[0].shape}"
            )
        if part.dtype != parts[0].dtype:
            raise TypeError(f"{_NAME}: {name}[{i}] has dtype {part.dtype} but {name}[0] has {parts[0].dtype}")
    lengths = [len(part) for part in parts]
    return np.concatenate(parts), np.cumsum([0, *lengths], dtype=np.int64)


def _starts(name: str, value: Any, of: str, packed: NDArray[Any]) -> NDArray[np.int64]:
    starts = np.array(integers(_NAME, name, value), order="C")  # a copy, so that it cannot change after the checks
    if starts.ndim != 1 or len(starts) == 0:
        raise ValueError(f"{_NAME}: {name} has shape {starts.shape}, but (N + 1,) is needed")
    total = len(packed) if packed.ndim else 0
    if starts[0] != 0 or starts[-1] != total:
        raise ValueError(f"{_NAME}: {name} goes from {starts[0]} to {starts[-1]}, but {of} has the rows 0 to {total}")
    for i in np.flatnonzero(starts[1:] < starts[:-1])[:1]:
        raise ValueError(f"{_NAME}: {name} falls from {starts[i]} to {starts[i + 1]} (sequence {i})")
    return starts


def _each(name: str, value: Any, count: int) -> list[NDArray[Any] | None] | None:
    if value is None:
        return None
    if not isinstance(value, (list, tuple)):
        raise TypeError(
            f"{_NAME}: {name} is a {type(value).__name__}, but a list of one array or None per sequence is needed"
        )
    if len(value) != count:
        raise ValueError(f"{_NAME}: {name} has {len(value)} entries, but there are {count} sequences")
    return [None if x is None else as_array(_NAME, f"{name}[{i}]", x) for i, x in enumerate(value)]


def _per_sequence(name: str, array: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    try:
        return np.broadcast_to(array, shape)
    except ValueError:
        raise ValueError(f"{_NAME}: {name} has shape {array.shape}, which does not broadcast to {shape}") from None


def _slopes(value: Any, count: int, q: NDArray[Any]) -> NDArray[np.float64]:
    heads = q.shape[1] if q.ndim > 1 else 1
    return _per_sequence("alibi_slopes", reals(_NAME, "alibi_slopes", value), (count, heads))


def _unpacked(result: Any, starts: NDArray[np.int64], return_lse: bool, return_weights: bool) -> Any:
    if not return_lse and not return_weights:
        return np.split(result, starts[1:-1])
    out, *rest = result
    parts: list[Any] = [np.split(out, starts[1:-1])]
    if return_lse:
        parts.append(np.split(rest.pop(0), starts[1:-1], axis=1))
    return (*parts, *rest)
