"""Types of the public functions' options, for type checkers.

A function's overloads name only the options that determine the type of its result. One of these dicts describes the
function's remaining options. A test compares the dicts with the functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from ._bias import T5Bias
    from ._cache import KVCache
    from ._mask_nodes import Mask
    from ._norm import LayerNorm, RMSNorm
    from ._paged import PagedKVCache
    from ._rope import RoPE

Array = NDArray[Any]
Yes = Literal[True]
No = Literal[False]
Layout = Literal["bhsd", "bshd"]
Precision = Literal["highest", "high", "medium"]
Window = tuple[int | None, int | None]
Values = Literal["own", "prefix"]
StorageType = (
    Literal["float32", "float16", "bfloat16", "int8", "int4", "float64"]
    | np.dtype[Any]
    | type[np.generic]
    | type[float]
)


class ScoreOptions(TypedDict, total=False):
    """Options of every function that computes attention or its gradients."""

    causal: bool
    window: Window | None
    chunk: int | None
    scale: float | None
    softcap: float | None
    alibi_slopes: ArrayLike | None
    sinks: ArrayLike | None
    precision: Precision
    num_threads: int | None
    t5: T5Bias | None
    dropout: float
    seed: int | None


class CommonOptions(ScoreOptions, total=False):
    """Options of every function that computes attention."""

    out: Array | None


class BatchOptions(CommonOptions, total=False):
    """Options of functions that take a batch as one array."""

    mask: ArrayLike | None
    bias: ArrayLike | None


class Lengths(TypedDict, total=False):
    """Options of functions whose sequences may be shorter than their array."""

    q_lens: ArrayLike | None
    kv_lens: ArrayLike | None
    kv_starts: ArrayLike | None
    prefix_lens: ArrayLike | None


class PaddedOptions(BatchOptions, Lengths, total=False):
    """Options of these functions, if they take a batch as one array."""


class AttentionOptions(CommonOptions, Lengths, total=False):
    """Options of `attention`, except those that no other function has."""

    mask: ArrayLike | Mask | None
    bias: ArrayLike | None
    q_offset: ArrayLike | None
    layout: Layout


class ExplainOptions(AttentionOptions, total=False):
    """Options of `explain`."""

    return_lse: bool
    return_weights: bool


class PaddedScoreOptions(ScoreOptions, total=False):
    """Options of gradients of functions whose sequences may be shorter than their array."""

    mask: ArrayLike | None
    bias: ArrayLike | None
    q_lens: ArrayLike | None
    kv_lens: ArrayLike | None
    kv_starts: ArrayLike | None
    prefix_lens: ArrayLike | None


class GradientOptions(PaddedScoreOptions, total=False):
    """Options of `attention_backward`."""

    q_offset: ArrayLike | None
    layout: Layout


class StateOptions(GradientOptions, total=False):
    """Options of `AttentionState`."""


class VjpOptions(GradientOptions, total=False):
    """Options of `attention_vjp`."""

    return_lse: bool
    return_weights: bool


class RelativeGradientOptions(PaddedScoreOptions, total=False):
    """Options of `relative_attention_backward`."""

    mem_len: int
    r_origin: int
    layout: Layout


class RelativeVjpOptions(RelativeGradientOptions, total=False):
    """Options of `relative_attention_vjp`."""

    return_lse: bool
    return_weights: bool


class RelativeOptions(PaddedOptions, total=False):
    """Options of `relative_attention`."""

    mem_len: int
    r_origin: int
    layout: Layout


class LayerOptions(PaddedOptions, total=False):
    """Options of both `SelfAttention.__call__` and `self_attention`."""

    q_offset: ArrayLike | None
    context: ArrayLike | None
    positions: ArrayLike | None


class LayerCallOptions(LayerOptions, total=False):
    """Options of `SelfAttention.__call__`."""

    cache: KVCache | PagedKVCache | None
    sequences: ArrayLike | None
    residual: ArrayLike | None


class WeightOptions(TypedDict, total=False):
    """Options of `SelfAttention`, which `self_attention` has as well."""

    b_q: ArrayLike | None
    b_k: ArrayLike | None
    b_v: ArrayLike | None
    b_o: ArrayLike | None
    num_kv_heads: int | None
    rope: RoPE | bool | None
    q_norm: LayerNorm | RMSNorm | None
    k_norm: LayerNorm | RMSNorm | None


class LayerSettings(WeightOptions, total=False):
    """Options of `SelfAttention`."""

    norm: LayerNorm | RMSNorm | None
    post_norm: LayerNorm | RMSNorm | None


class SelfAttentionOptions(LayerOptions, WeightOptions, total=False):
    """Options of `self_attention`."""


class LayerScoreOptions(PaddedScoreOptions, total=False):
    """Options of the attention in a layer."""

    q_offset: ArrayLike | None


class LayerVjpOptions(LayerScoreOptions, total=False):
    """Options of `self_attention_vjp`."""

    return_lse: bool
    return_weights: bool


class CachedOptions(BatchOptions, total=False):
    """Options of `attention_with_kvcache`."""

    kv_starts: ArrayLike | None
    prefix_lens: ArrayLike | None
    sequences: ArrayLike | None
    rope: RoPE | bool | None
    positions: ArrayLike | None
    q_norm: LayerNorm | RMSNorm | None
    k_norm: LayerNorm | RMSNorm | None
    cascade: bool
    layout: Layout


class VarlenGradientOptions(ScoreOptions, total=False):
    """Options of `attention_varlen_backward`."""

    kv_starts: ArrayLike | None
    prefix_lens: ArrayLike | None
    mask: Sequence[ArrayLike | None] | None
    bias: Sequence[ArrayLike | None] | None
    q_offset: ArrayLike | None


class VarlenVjpOptions(VarlenGradientOptions, total=False):
    """Options of `attention_varlen_vjp`."""

    return_lse: bool


class VarlenOptions(CommonOptions, total=False):
    """Options of `attention_varlen`."""

    kv_starts: ArrayLike | None
    prefix_lens: ArrayLike | None
    mask: Sequence[ArrayLike | None] | None
    bias: Sequence[ArrayLike | None] | None
    q_offset: ArrayLike | None
