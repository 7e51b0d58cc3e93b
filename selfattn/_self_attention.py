"""Self-attention as a function, for weights that are used once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, overload

from numpy.typing import ArrayLike

from ._attention import ONLY_HERE, attention
from ._keywords import clean_signature, refuse_unknown
from ._layer import _OPTIONS, SelfAttention
from ._norm import LayerNorm, RMSNorm
from ._rope import RoPE
from ._typing import Array, No, SelfAttentionOptions, Yes

if TYPE_CHECKING:
    from typing_extensions import Unpack


# fmt: off
@overload
def self_attention(
    x: ArrayLike, w_q: ArrayLike, w_k: ArrayLike, w_v: ArrayLike, w_o: ArrayLike | None = ..., *, num_heads: int,
    return_lse: No = ..., return_weights: No = ..., **options: Unpack[SelfAttentionOptions]
) -> Array: ...
@overload
def self_attention(
    x: ArrayLike, w_q: ArrayLike, w_k: ArrayLike, w_v: ArrayLike, w_o: ArrayLike | None = ..., *, num_heads: int,
    return_lse: Yes, return_weights: No = ..., **options: Unpack[SelfAttentionOptions]
) -> tuple[Array, Array]: ...
@overload
def self_attention(
    x: ArrayLike, w_q: ArrayLike, w_k: ArrayLike, w_v: ArrayLike, w_o: ArrayLike | None = ..., *, num_heads: int,
    return_lse: No = ..., return_weights: Yes, **options: Unpack[SelfAttentionOptions]
) -> tuple[Array, Array]: ...
@overload
def self_attention(
    x: ArrayLike, w_q: ArrayLike, w_k: ArrayLike, w_v: ArrayLike, w_o: ArrayLike | None = ..., *, num_heads: int,
    return_lse: Yes, return_weights: Yes, **options: Unpack[SelfAttentionOptions]
) -> tuple[Array, Array, Array]: ...
@overload
def self_attention(
    x: ArrayLike, w_q: ArrayLike, w_k: ArrayLike, w_v: ArrayLike, w_o: ArrayLike | None = ..., *, num_heads: int,
    return_lse: bool = ..., return_weights: bool = ..., **options: Unpack[SelfAttentionOptions]
) -> Any: ...
# fmt: on
@clean_signature(attention, without=("layout", *ONLY_HERE))
def self_attention(
    x: ArrayLike,
    w_q: ArrayLike,
    w_k: ArrayLike,
    w_v: ArrayLike,
    w_o: ArrayLike | None = None,
    *,
    b_q: ArrayLike | None = None,
    b_k: ArrayLike | None = None,
    b_v: ArrayLike | None = None,
    b_o: ArrayLike | None = None,
    num_heads: int,
    num_kv_heads: int | None = None,
    context: ArrayLike | None = None,
    rope: RoPE | bool | None = None,
    q_norm: LayerNorm | RMSNorm | None = None,
    k_norm: LayerNorm | RMSNorm | None = None,
    positions: ArrayLike | None = None,
    out: Array | None = None,
    **attention_options: Any,
) -> Any:
    """Compute multi-head self-attention from x to output in one call.

    Equivalent to ``SelfAttention(w_q, ...)(x, ...)``. To use the same weights more than once, create a `SelfAttention`,
    which packs the weights only once.

    Parameters
    ----------
    x : array_like, shape (..., S, d_model)
    w_q, w_k, w_v, w_o, b_q, b_k, b_v, b_o, num_heads, num_kv_heads, rope, q_norm, k_norm
        See `SelfAttention`.
    context, positions, out, **attention_options
        See `SelfAttention.__call__`.

    Returns
    -------
    ndarray, shape (..., S, d_out)
        With `return_lse` and `return_weights` a tuple, as from `attention`.

    Raises
    ------
    TypeError, ValueError, MemoryError
        As `SelfAttention` and its calls.

    Examples
    --------
    >>> import numpy as np
    >>> import selfattn as sa
    >>> rng = np.random.default_rng(0)
    >>> x = rng.standard_normal((10, 32), dtype=np.float32)
    >>> w_q, w_k, w_v = rng.standard_normal((3, 32, 32), dtype=np.float32)
    >>> y, weights = sa.self_attention(x, w_q, w_k, w_v, num_heads=4, return_weights=True)
    >>> y.shape, weights.shape
    ((10, 32), (4, 10, 10))
    """
    if not attention_options.keys() <= _OPTIONS.keys():
        refuse_unknown(self_attention, attention_options)
    layer = SelfAttention.__new__(SelfAttention)
    counts, norms = (num_heads, num_kv_heads), (None, None, q_norm, k_norm)
    layer._build("self_attention", (w_q, w_k, w_v, w_o), (b_q, b_k, b_v, b_o), counts, rope, norms)
    return layer._call("self_attention", (x, context, positions, None), out, attention_options)
