"""The fused attention function."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import ArrayLike

from . import _core
from ._arguments import as_array, core_options, flag, out_array
from ._bias import T5Bias
from ._chosen_keys import attend_to_chosen, choice_of
from ._errors import refusal
from ._keywords import clean_signature, refuse_unknown
from ._mask_nodes import Mask
from ._masked import NOT_WITH_CHOSEN, attend_in_blocks, masked
from ._rope import RoPE
from ._rotated import rotated
from ._typing import Array, AttentionOptions, Layout, No, Precision, Window, Yes

if TYPE_CHECKING:
    from typing_extensions import Unpack


# fmt: off
@overload
def attention(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, *, return_lse: No = ..., return_weights: No = ...,
    **options: Unpack[AttentionOptions]
) -> Array: ...
@overload
def attention(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, *, return_lse: Yes, return_weights: No = ...,
    **options: Unpack[AttentionOptions]
) -> tuple[Array, Array]: ...
@overload
def attention(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, *, return_lse: No = ..., return_weights: Yes,
    **options: Unpack[AttentionOptions]
) -> tuple[Array, Array]: ...
@overload
def attention(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, *, return_lse: Yes, return_weights: Yes,
    **options: Unpack[AttentionOptions]
) -> tuple[Array, Array, Array]: ...
@overload
def attention(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, *, return_lse: bool = ..., return_weights: bool = ...,
    return_key_mass: bool = ..., key_indices: ArrayLike | None = ..., block_indices: ArrayLike | None = ...,
    block_size: int | tuple[int, int] | None = ..., rope: RoPE | bool | None = ..., positions: ArrayLike | None = ...,
    **options: Unpack[AttentionOptions]
) -> Any: ...
# fmt: on
@clean_signature()
def attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    mask: ArrayLike | Mask | None = None,
    bias: ArrayLike | None = None,
    causal: bool = False,
    q_offset: ArrayLike | None = None,
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
    return_key_mass: bool = False,
    out: Array | None = None,
    precision: Precision = "highest",
    num_threads: int | None = None,
    t5: T5Bias | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
    chunk: int | None = None,
    prefix_lens: ArrayLike | None = None,
    key_indices: ArrayLike | None = None,
    block_indices: ArrayLike | None = None,
    block_size: int | tuple[int, int] | None = None,
    rope: RoPE | bool | None = None,
    positions: ArrayLike | None = None,
    **unknown: Any,
) -> Any:
    r"""Compute ``softmax(scale · q kᵀ) · v`` in one fused pass.

    Nothing of size Sq × Sk is stored unless `return_weights` asks for it. The steps are, in this order: ``scale``,
    ``softcap``, ``+ bias``, ALiBi, hiding of keys, softmax (with the sink in its denominator).

    Parameters
    ----------
    q : array_like, shape (..., H, Sq, D)
        Queries: float32, float64, float16 or ``ml_dtypes.bfloat16``. A 2-D array is one head. Objects with
        ``__array__`` or CPU DLPack are accepted, with any strides. Leading dimensions of q, k and v broadcast as in
        `numpy.matmul`.
    k : array_like, shape (..., Hkv, Sk, D)
        Keys, in q's dtype or a dtype with fewer bytes: for example a float16 cache with float32 queries. Query head
        ``h`` uses KV head ``h // (H // Hkv)``.
    v : array_like, shape (..., Hkv, Sk, Dv)
        Values, in k's dtype.
    mask : array_like of bool or masks.Mask, optional
        True = attend. Broadcasts to (..., H, Sq, Sk) in both layouts. A mask of ``selfattn.masks`` needs no memory for
        the pairs, and keys that it hides from many adjacent queries are not read.
    bias : array_like of any dtype that q may have, optional
        Added to the scores; −inf hides a key exactly as False in `mask` does. Broadcasts as `mask` does.
    causal : bool, default False
        Key j is visible to query i iff ``j <= i + offset``.
    q_offset : int or integer array (B,), optional
        The offset: the position of query 0 among the keys. By default ``kv_len − q_len`` of each batch entry, which
        aligns its last valid query with its last valid key.
    window : (left, right), optional
        Key j is visible iff ``−left <= j − (i + offset) <= right``, in tokens; None = unbounded on that side.
    chunk : int, optional
        Keys are visible only in the query's own chunk of this many positions: ``j // chunk == (i + offset) // chunk``.
        With `causal`, this is the chunked attention of Llama 4.
    q_lens, kv_lens : integer array (B,), optional
        Number of valid queries and keys in each batch entry. Rows from q_lens on give 0 (lse −inf); keys from kv_lens
        on are hidden. Pass both for a right-padded batch. If positions matter (causal, window, chunk, alibi_slopes,
        t5), a kv_lens below Sq without q_lens or q_offset is a ValueError.
    kv_starts : integer array (B,), optional
        First valid key of each batch entry, in 0..Sk: the keys before it are hidden, as in a left-padded batch. If an
        entry's kv_starts is not below its kv_lens, no key of the entry is visible. Positions still count from the start
        of k: the offset does not depend on kv_starts.
    prefix_lens : integer array (B,), optional
        Every query sees the keys before it, 0..Sk, as in a prefix language model; `causal` and the right side of
        `window` limit only what comes after. Cannot be combined with a left side of `window` or with `chunk`.
    key_indices : integer array (..., H, Sq, n), optional
        Query i sees only the n keys that are named here, in addition to all other limits; −1 names no key, and a key
        that is named twice counts once. The head axis may be H, Hkv or 1 long, the axis of queries Sq or 1, and leading
        axes may be 1. Time and memory are proportional to n. Cannot be combined with `dropout`, `return_weights` and
        `return_key_mass`.
    block_indices : integer array (..., H, Sq, n), optional
        Query i sees only the keys of the n blocks that are named here; otherwise as `key_indices`. Blocks take less
        time than as many keys, and least if many queries share them.
    block_size : int or (int, int), optional
        Required with `block_indices`, the number N of keys in a block: block b has the keys ``b·N`` to ``b·N + N − 1``,
        and the last one may be shorter. A pair (M, N) also divides queries into blocks of M. Then the axis of queries
        in `block_indices` has ⌈Sq / M⌉ rows, and query i uses row ``i // M``.
    rope : RoPE or True, optional
        Rotate q and k by their positions before everything else, as `apply_rope` does; True means ``RoPE()``. Needs
        memory for a copy of q and k.
    positions : integer array, shape (Sk,) or (B, Sk), optional
        For rope: the positions of the keys; default 0, 1, 2, ... With coordinates as in `apply_rope` if the rope has
        `axes`. A query has the position of the key that it is aligned with, which is key ``i + offset``.
    scale : float, optional
        Factor applied to the scores, default ``1 / sqrt(D)``. Any finite number.
    softcap : float, optional
        c > 0: a score s becomes ``c · tanh(s / c)``.
    alibi_slopes : array_like, shape (H,) or (B, H), optional
        Adds ``−slope · |i + offset − j|``.
    sinks : array_like, shape (H,), optional
        One logit per head, added to the softmax's denominator only.
    layout : {"bhsd", "bshd"}
        "bshd": the sequence axis of q, k, v and out comes before the head axis. The shapes of other operands and
        results do not change.
    return_lse : bool, default False
        Also return the log-sum-exp of each row's scores (natural logarithm, sink included).
    return_weights : bool, default False
        Also return the attention weights, which needs memory for Sq × Sk numbers per head.
    return_key_mass : bool, default False
        Also return what each key receives: the sum over the queries of its attention weights. Each thread stores the
        weights of one block of queries, a few hundred rows of Sk numbers; docs/numerics.md says how exact the sum is.
        For the last n queries only, pass ``q[..., -n:, :]``.
    out : ndarray, optional
        Array for the result, with exactly the result's shape and dtype, and any strides. May overlap with an input.
    precision : {"highest", "high", "medium"}
        The lowest accuracy allowed for products of float32: "highest" is full accuracy; "high" allows each number to be
        rounded to a sum of two bfloat16 numbers (16 bits), "medium" to one (8 bits). Numbers are rounded only if the
        CPU has a unit that is then faster; `explain` names the unit, and docs/numerics.md bounds the error.
    num_threads : int, optional
        Maximum number of threads; default `get_num_threads`. Never changes the result, not even in the last bit.
    t5 : T5Bias, optional
        T5's bias by distance, added to the scores inside the kernel; may be combined with `bias`. T5 uses
        ``scale=1.0``.
    dropout : float, default 0.0
        Rate in [0, 1). After the softmax each weight is set to 0 with this probability, and otherwise divided by
        ``1 − dropout``. The log-sum-exp does not change; `return_weights` gives the weights after dropout.
    seed : int, optional
        Required with dropout, in 0..2⁶⁴ − 1. Which weights are kept depends only on the seed, the rate and the indices
        of batch entry, query head, query and key. So the same weights are kept on all machines, and in the gradients.
        Use another seed for each call whose weights should be dropped independently.

    Returns
    -------
    out : ndarray, shape (..., H, Sq, Dv)
        In q's dtype; (..., Sq, H, Dv) in layout "bshd", (Sq, Dv) if q, k and v are 2-D.
    lse : ndarray, shape (..., H, Sq)
        Only with `return_lse`; float64 for float64 queries, else float32.
    weights : ndarray, shape (..., H, Sq, Sk)
        Only with `return_weights`; in lse's dtype.
    key_mass : ndarray, shape (..., H, Sk)
        Only with `return_key_mass`; the last result, in lse's dtype.

    Raises
    ------
    TypeError
        An argument of an unsupported dtype or type, or an unknown keyword.
    ValueError
        Shapes that do not fit together, or a value out of range. Nothing has been written to `out`.
    MemoryError
        The result or the scratch memory could not be allocated.

    Notes
    -----
    For a row without a visible key (by mask, bias, causal, window and lengths), out is exactly 0, all weights are 0,
    and lse is −inf. Hidden keys and values never affect the result, even if they are NaN; NaN and infinity in visible
    ones propagate as in IEEE arithmetic. 16-bit operands are read without a converted copy and summed in float32; `out`
    is rounded to q's dtype, and on units that multiply bfloat16 the weights are rounded as well. For a given
    instruction set, shape and options, the result of a batch entry and KV head depends, to the last bit, on nothing but
    its own operands. (With dropout, also on its index in the batch.)

    Attention is due to Vaswani et al., "Attention is all you need" (2017); the one-pass softmax to Milakov and
    Gimelshein (2018) and Dao et al., "FlashAttention" (2022).

    Examples
    --------
    >>> import numpy as np
    >>> import selfattn as sa
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 2, 4, 10, 8), dtype=np.float32)
    >>> sa.attention(q, k, v, causal=True).shape
    (2, 4, 10, 8)
    """
    if unknown:
        refuse_unknown(attention, unknown)
    if type(q) is not np.ndarray or not q.dtype.isnative:
        q = as_array("attention", "q", q)
    if type(k) is not np.ndarray or not k.dtype.isnative:
        k = as_array("attention", "k", k)
    if type(v) is not np.ndarray or not v.dtype.isnative:
        v = as_array("attention", "v", v)
    lazy = None
    if isinstance(mask, Mask):
        lazy, mask = mask, None
    # Options are passed by position: Python builds a dict for more than 15 keywords, which takes longer than the rest
    # of this function.
    options = core_options(
        "attention", mask, bias, causal, q_offset, window, q_lens, kv_lens, kv_starts, scale, softcap,
        alibi_slopes, sinks, layout, return_lse, return_weights, precision, num_threads, t5, dropout, seed, chunk,
        prefix_lens,
    )  # fmt: skip
    if out is not None:
        out = out_array("attention", out)
    choice = None
    if key_indices is not None or block_indices is not None or block_size is not None:
        choice = choice_of(key_indices, block_indices, block_size)
    mass = return_key_mass is not False and flag("attention", "return_key_mass", return_key_mass)
    if rope is not None or positions is not None:
        q, k, v = rotated((q, k, v), rope, positions, layout, options)
    if lazy is not None:
        call = masked("attention", (q, k, v), lazy, options)
        if call.rest is not None:
            if choice is not None:
                raise refusal(ValueError, "attention", choice.argument, *NOT_WITH_CHOSEN)
            call.options.return_key_mass = mass
            return attend_in_blocks(call, out)
        options = call.options
    if choice is not None:
        if mass:
            raise refusal(ValueError, "attention", choice.argument, " cannot be used with ", "return_key_mass", "")
        return attend_to_chosen((q, k, v), choice, out, options)
    options.return_key_mass = mass
    return _core.attention(q, k, v, out, options)


# Options that no other function has.
ONLY_HERE = ("return_key_mass", "key_indices", "block_indices", "block_size", "rope", "positions")

# The options that the core knows.
_DEFAULTS: dict[str, Any] = {
    name: x for name, x in (attention.__kwdefaults__ or {}).items() if name not in ("out", *ONLY_HERE)
}
