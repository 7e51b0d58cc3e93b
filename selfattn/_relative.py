"""Attention with relative positions, as in Transformer-XL and XLNet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _core
from ._arguments import as_array, core_options, flag, out_array, reals, whole_number
from ._bias import T5Bias
from ._errors import refusal
from ._keywords import clean_signature, refuse_unknown
from ._typing import Array, Layout, No, Precision, RelativeOptions, Window, Yes

if TYPE_CHECKING:
    from typing_extensions import Unpack

_NAME = "relative_attention"

Inputs = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]


# fmt: off
@overload
def relative_attention(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, r: ArrayLike, u: ArrayLike, w: ArrayLike, *, return_lse: No = ...,
    return_weights: No = ..., **options: Unpack[RelativeOptions]
) -> Array: ...
@overload
def relative_attention(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, r: ArrayLike, u: ArrayLike, w: ArrayLike, *, return_lse: Yes,
    return_weights: No = ..., **options: Unpack[RelativeOptions]
) -> tuple[Array, Array]: ...
@overload
def relative_attention(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, r: ArrayLike, u: ArrayLike, w: ArrayLike, *, return_lse: No = ...,
    return_weights: Yes, **options: Unpack[RelativeOptions]
) -> tuple[Array, Array]: ...
@overload
def relative_attention(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, r: ArrayLike, u: ArrayLike, w: ArrayLike, *, return_lse: Yes,
    return_weights: Yes, **options: Unpack[RelativeOptions]
) -> tuple[Array, Array, Array]: ...
@overload
def relative_attention(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, r: ArrayLike, u: ArrayLike, w: ArrayLike, *, return_lse: bool = ...,
    return_weights: bool = ..., **options: Unpack[RelativeOptions]
) -> Any: ...
# fmt: on
@clean_signature()
def relative_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    r: ArrayLike,
    u: ArrayLike,
    w: ArrayLike,
    *,
    mem_len: int = 0,
    causal: bool = True,
    r_origin: int = 0,
    mask: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    window: Window | None = None,
    q_lens: ArrayLike | None = None,
    kv_lens: ArrayLike | None = None,
    kv_starts: ArrayLike | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    layout: Layout = "bhsd",
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
    r"""Attend to a segment and the memory before it by content and distance (Dai et al., "Transformer-XL", 2019).

    ``score[i, j] = scale · ((q_i + u) · k_j + (q_i + w) · r_t)`` with the distance ``t = i + mem_len − j``. All other
    steps are as in `attention` with ``q_offset=mem_len``. The product with r is computed by distance for one block of
    keys at a time: nothing of size S × (mem_len + S) is stored, and there is no relative-shift step.

    Parameters
    ----------
    q : array_like, shape (..., H, S, D)
        Queries of the segment, in any dtype that `attention` accepts.
    k : array_like, shape (..., Hkv, mem_len + S, D)
    v : array_like, shape (..., Hkv, mem_len + S, Dv)
        Keys and values of the memory, followed by the keys and values of the segment.
    r : array_like, shape (H, R, D) or (R, D)
        Projected encodings of distances, in q's dtype or a dtype with fewer bytes. Row ``t + r_origin`` belongs to
        distance t; distances beyond either end use the row at that end (``clamp_len`` in the original).
    u, w : array_like, shape (H, D)
        Vectors added to the queries before the products with keys (u, ``r_w_bias``) and with encodings (w,
        ``r_r_bias``), of any float dtype.
    mem_len : int, default 0
        Number of tokens in the memory.
    causal : bool, default True
        Key j is visible to query i iff ``j <= i + mem_len``.
    r_origin : int, default 0
        The row of distance 0. It is in the middle of a table that also covers keys ahead of the query (XLNet). If there
        are no rows before it, `causal` must be True.
    window : (left, right), optional
        As in `attention`; the original's ``same_length`` is ``(mem_len − 1, 0)``.
    mask, bias, q_lens, kv_lens, kv_starts, scale, softcap, alibi_slopes, sinks, layout, return_lse, return_weights, out
        As in `attention`; `layout` concerns q, k, v and out. The default scale is ``1 / sqrt(D)``.
    precision, num_threads, t5, dropout, seed, chunk, prefix_lens
        As in `attention`.

    Returns
    -------
    out : ndarray, shape (..., H, S, Dv)
        In q's dtype. With `return_lse` and `return_weights` a tuple, as from `attention`.

    Raises
    ------
    TypeError, ValueError, MemoryError
        As from `attention`. Nothing has been written.

    Notes
    -----
    ``q + u`` and ``q + w`` are computed in float32 (float64 for float64), also for 16-bit queries. For a given
    instruction set, shape and options, the result of a batch entry and head depends, to the last bit, on nothing but
    its own operands.

    Examples
    --------
    >>> import numpy as np
    >>> import selfattn as sa
    >>> rng = np.random.default_rng(0)
    >>> k, v = rng.standard_normal((2, 4, 12, 8), dtype=np.float32)  # 4 heads, a memory of 7 and a segment of 5
    >>> q, r = k[:, 7:], rng.standard_normal((4, 12, 8), dtype=np.float32)
    >>> u, w = rng.standard_normal((2, 4, 8), dtype=np.float32)
    >>> sa.relative_attention(q, k, v, r, u, w, mem_len=7).shape
    (4, 5, 8)
    """
    if unknown:
        refuse_unknown(relative_attention, unknown, {"q_offset": "mem_len", "clamp_len": "r", "same_length": "window"})
    inputs, terms, options = prepare(
        _NAME, (q, k, v, r, u, w), mem_len=mem_len, r_origin=r_origin, causal=causal, layout=layout, mask=mask,
        bias=bias, q_lens=q_lens, kv_lens=kv_lens, kv_starts=kv_starts, alibi_slopes=alibi_slopes, sinks=sinks, t5=t5,
        window=window, scale=scale, softcap=softcap, precision=precision, return_lse=return_lse,
        return_weights=return_weights, num_threads=num_threads, dropout=dropout, seed=seed, chunk=chunk,
        prefix_lens=prefix_lens,
    )  # fmt: skip
    return _core.relative_attention(_NAME, inputs, terms, None if out is None else out_array(_NAME, out), options)


def prepare(
    function: str,
    arrays: Sequence[ArrayLike],
    *,
    mem_len: int = 0,
    r_origin: int = 0,
    causal: bool = True,
    layout: Layout = "bhsd",
    **options: Any,
) -> tuple[Inputs, _core.RelativeInputs, _core.Options]:
    """Check and convert the arguments of relative attention or of its gradients: q, k, v, r, u, w and options."""
    *heads, u, w = arrays
    q, k, v, r = (as_array(function, name, x) for name, x in zip("qkvr", heads, strict=True))
    memory = whole_number(function, "mem_len", mem_len, 0)
    converted = core_options(function, q_offset=np.array(memory), causal=causal, layout=layout, **options)
    _check_lengths(function, q, k, memory, layout)
    origin = whole_number(function, "r_origin", r_origin, 0)
    if origin == 0 and not flag(function, "causal", causal):
        raise refusal(
            ValueError,
            function,
            "causal",
            " is False, but with ",
            "r_origin",
            " 0 ",
            "r",
            " has no rows for keys ahead of the query",
        )
    u, w = (np.ascontiguousarray(reals(function, name, x)) for name, x in (("u", u), ("w", w)))
    return (q, k, v), _core.RelativeInputs(r=r, u=u, w=w, r_origin=origin), converted


def _check_lengths(function: str, q: NDArray[Any], k: NDArray[Any], memory: int, layout: str) -> None:
    def length(x: NDArray[Any]) -> int:
        return int(x.shape[-3 if layout == "bshd" and x.ndim > 2 else -2])

    if min(q.ndim, k.ndim) >= 2 and length(k) != memory + length(q):
        raise refusal(
            ValueError,
            function,
            "k",
            f" has length {length(k)}, but ",
            "mem_len",
            f" {memory} and the length of ",
            "q",
            f", {length(q)}, make {memory + length(q)}",
        )
