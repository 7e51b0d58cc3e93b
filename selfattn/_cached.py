"""Attention over the keys and values in a cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import ArrayLike

from . import _core
from ._any_cache import AnyCache, no_cache
from ._arguments import as_array, core_options, flag, out_array
from ._bias import T5Bias
from ._cache import KVCache
from ._cascade import Cascade, suits_cascade
from ._errors import refusal
from ._head_norms import AnyNorm, normalised
from ._keywords import clean_signature, refuse_unknown
from ._paged import PagedKVCache
from ._rope import RoPE, positions_for, rope_or_none
from ._typing import Array, CachedOptions, Layout, No, Precision, Window, Yes

if TYPE_CHECKING:
    from typing_extensions import Unpack

_NAME = "attention_with_kvcache"


# fmt: off
@overload
def attention_with_kvcache(
    q: ArrayLike, cache: KVCache | PagedKVCache, k: ArrayLike | None = ..., v: ArrayLike | None = ..., *,
    return_lse: No = ..., return_weights: No = ..., **options: Unpack[CachedOptions]
) -> Array: ...
@overload
def attention_with_kvcache(
    q: ArrayLike, cache: KVCache | PagedKVCache, k: ArrayLike | None = ..., v: ArrayLike | None = ..., *,
    return_lse: Yes, return_weights: No = ..., **options: Unpack[CachedOptions]
) -> tuple[Array, Array]: ...
@overload
def attention_with_kvcache(
    q: ArrayLike, cache: KVCache | PagedKVCache, k: ArrayLike | None = ..., v: ArrayLike | None = ..., *,
    return_lse: No = ..., return_weights: Yes, **options: Unpack[CachedOptions]
) -> tuple[Array, Array]: ...
@overload
def attention_with_kvcache(
    q: ArrayLike, cache: KVCache | PagedKVCache, k: ArrayLike | None = ..., v: ArrayLike | None = ..., *,
    return_lse: Yes, return_weights: Yes, **options: Unpack[CachedOptions]
) -> tuple[Array, Array, Array]: ...
@overload
def attention_with_kvcache(
    q: ArrayLike, cache: KVCache | PagedKVCache, k: ArrayLike | None = ..., v: ArrayLike | None = ..., *,
    return_lse: bool = ..., return_weights: bool = ..., **options: Unpack[CachedOptions]
) -> Any: ...
# fmt: on
@clean_signature()
def attention_with_kvcache(
    q: ArrayLike,
    cache: KVCache | PagedKVCache,
    k: ArrayLike | None = None,
    v: ArrayLike | None = None,
    *,
    sequences: ArrayLike | None = None,
    rope: RoPE | bool | None = None,
    positions: ArrayLike | None = None,
    q_norm: AnyNorm = None,
    k_norm: AnyNorm = None,
    mask: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    causal: bool = True,
    window: Window | None = None,
    kv_starts: ArrayLike | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    cascade: bool = False,
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
    """Append new tokens to a cache and attend to everything in it, in one call.

    Parameters
    ----------
    q : array_like, shape (B, H, Sq, D)
        Queries of the newest Sq tokens of each sequence: one token to generate text, a few to verify a draft, many to
        process a prompt in chunks.
    cache : KVCache or PagedKVCache
        Its storage type is q's dtype or a narrower one.
    k : array_like, shape (B, Hkv, Sq, D), optional
    v : array_like, shape (B, Hkv, Sq, Dv), optional
        Keys and values of the newest Sq tokens, which are appended first. Both have one dtype, any that
        `KVCache.append` accepts. If k and v are omitted, the cache is only read.
    sequences : sequence of int
        With a PagedKVCache: the id of the sequence of each row of q.
    rope : RoPE or True, optional
        Rotates q and the new k.
    positions : integer array, shape (Sq,) or (B, Sq), optional
        For rope: the positions of the tokens; default their positions in their sequences. With coordinates as in
        `apply_rope` if the rope has `axes`.
    q_norm, k_norm : LayerNorm or RMSNorm, optional
        Norms of q and of the new k, before rope, as in Qwen 3. A weight of head_dim numbers normalises each head, a
        weight of heads · head_dim numbers all heads of a token together.
    mask : array_like of bool, broadcasting to (B, H, Sq, Sq), optional
        Covers the newest Sq tokens only, True = attend; all earlier tokens are visible. For tree-shaped drafts.
    bias : array_like, broadcasting to (B, H, Sq, longest sequence), optional
        Added to the scores, as in `attention`.
    causal : bool, default True
        Query i sees the tokens up to its own position. The last query is the last token of its sequence.
    kv_starts : int or integer array, shape (B,), optional
        The tokens before it are hidden, for left-padded prompts. The positions of the others do not change.
    prefix_lens : int or integer array, shape (B,), optional
        All queries see the tokens before it, as in `attention`. At most the number of tokens in the longest sequence.
    window, chunk, scale, softcap, alibi_slopes, sinks, return_lse, precision, num_threads, t5
        As in `attention`; chunks count from the first token of a sequence. A cache with a window needs
        ``window=(left, ...)`` with left at most the cache's window.
    dropout, seed
        As in `attention`. Queries are counted from the first query of this call, so each step needs another seed; keys
        are counted from the start of their sequence.
    cascade : bool, default False
        Read the leading pages that all sequences share (forks of one prompt) once for all of them. The results over the
        shared pages and over the rest are merged by log-sum-exp, so the rounding of the result depends on the length of
        the shared part. Has no effect if window, chunk, kv_starts, prefix_lens, bias, alibi_slopes, t5, dropout or
        return_weights is given.
    layout : {"bhsd", "bshd"}
        "bshd": the token axis of q, k, v and out comes before the head axis.
    return_weights : bool, default False
        Also return the weights, (B, H, Sq, longest sequence).
    out : ndarray, optional
        Array for the result.

    Returns
    -------
    out : ndarray, shape (B, H, Sq, Dv)
        In q's dtype. With `return_lse` and `return_weights` a tuple, as from `attention`.

    Raises
    ------
    TypeError, ValueError, MemoryError
        The cache is then unchanged, except that a ring may have lost tokens that no later query can see. An interrupt
        leaves the cache in the same state.

    Notes
    -----
    The result of a sequence is bit-identical for any other sequences, pages, capacity and number of threads.

    Examples
    --------
    >>> import numpy as np
    >>> import selfattn as sa
    >>> rng = np.random.default_rng(0)
    >>> cache = sa.KVCache(2, num_kv_heads=1, head_dim=8, capacity=100)
    >>> q, k, v = rng.standard_normal((3, 2, 1, 5, 8), dtype=np.float32)
    >>> first = sa.attention_with_kvcache(q[:, :, :3], cache, k[:, :, :3], v[:, :, :3])
    >>> last = sa.attention_with_kvcache(q[:, :, 3:], cache, k[:, :, 3:], v[:, :, 3:])
    >>> whole = sa.attention(q, k, v, causal=True)
    >>> bool(np.allclose(np.concatenate([first, last], axis=2), whole, rtol=0, atol=1e-6))
    True
    """
    if unknown:
        refuse_unknown(attention_with_kvcache, unknown)
    if not isinstance(cache, AnyCache):
        raise no_cache(_NAME, cache)
    if type(q) is not np.ndarray or not q.dtype.isnative:
        q = as_array(_NAME, "q", q)
    if k is not None and (type(k) is not np.ndarray or not k.dtype.isnative):
        k = as_array(_NAME, "k", k)
    if q_norm is not None:
        q = normalised(_NAME, "q_norm", q_norm, q, layout)
    if k_norm is not None:
        if k is None:
            raise refusal(ValueError, _NAME, "k_norm", " is given without ", "k", "")
        k = normalised(_NAME, "k_norm", k_norm, k, layout)
    if cache.values != "own":
        v = _prefix_of(cache, k, v, {"rope": rope, "k_norm": k_norm})
    if (k is None) != (v is None):
        given, absent = ("v", "k") if k is None else ("k", "v")
        raise refusal(ValueError, _NAME, given, " is given without ", absent, "")
    if v is not None and (type(v) is not np.ndarray or not v.dtype.isnative):
        v = as_array(_NAME, "v", v)
    options = core_options(  # by position, see `attention`
        _NAME, mask, bias, causal, None, window, None, None, kv_starts, scale, softcap,
        alibi_slopes, sinks, layout, return_lse, return_weights, precision, num_threads, t5, dropout, seed, chunk,
        prefix_lens,
    )  # fmt: skip
    description = None if rope is None else rope_or_none(_NAME, rope)
    token_axis = 1 if layout == "bshd" else 2
    tokens = q.shape[token_axis] if q.ndim == 4 else 0
    if positions is not None:
        if description is None:
            raise refusal(ValueError, _NAME, "positions", " is given without ", "rope", "")
        positions = positions_for(_NAME, positions, (len(q) if q.ndim else 0, tokens), description)
    rotation = None if description is None else description.for_core(_NAME, cache.head_dim)
    if out is not None:
        out_array(_NAME, out)
    wanted = cascade is not False and flag(_NAME, "cascade", cascade)
    if wanted and isinstance(cache, PagedKVCache) and suits_cascade(options):
        call = Cascade(q, k, v, description, positions, layout, options)
        return call.run(cache, sequences, tokens, out)
    appended = 0 if k is None else tokens

    def attend(step: _core.Step) -> Any:
        inputs = _core.CacheInputs(q=q, k=k, v=v, rope=rotation, positions=positions)
        return _core.attend_cache(_NAME, step, inputs, out, options)

    return cache._run(_NAME, sequences, appended, attend)


def _prefix_of(cache: AnyCache, k: Any, v: Any, changes: dict[str, Any]) -> Any:
    """Return the new values of a cache that takes them from the new keys; `changes` are options that change keys."""
    for name, given in changes.items():
        if given is not None:
            text = " is given, but values are a part of keys: change q and k before"
            raise refusal(ValueError, _NAME, name, text)
    return v if k is None else cache._values_of(_NAME, k, v)
