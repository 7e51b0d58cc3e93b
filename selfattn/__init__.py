"""Exact, fused self-attention for CPUs: NumPy in, NumPy out."""

from __future__ import annotations

from importlib.metadata import version as _version

from . import _idle as _idle  # imported first, because it loads the core
from . import masks as masks
from . import reference as reference
from ._apply_rope import apply_rope
from ._attention import attention
from ._backward import Gradients
from ._bias import T5Bias, alibi_slopes, t5_bias
from ._cache import KVCache
from ._cached import attention_with_kvcache
from ._explain import explain
from ._explain_call import explain_call
from ._feed_forward import FeedForward
from ._gradients import attention_backward, attention_vjp
from ._info import show_config, show_runtime
from ._layer import SelfAttention
from ._layer_gradients import self_attention_vjp
from ._linear import Linear
from ._norm import LayerNorm, RMSNorm, layer_norm, rms_norm
from ._paged import PagedKVCache
from ._quantized import QuantizedWeights, quantize
from ._relative import relative_attention
from ._relative_gradients import relative_attention_backward, relative_attention_vjp
from ._rope import RoPE
from ._self_attention import self_attention
from ._states import merge_states
from ._streaming import AttentionState
from ._threads import active_isa, get_num_threads, isas, set_num_threads, use_isa
from ._varlen import attention_varlen
from ._varlen_gradients import attention_varlen_backward, attention_varlen_vjp

__version__ = _version("selfattn")

__all__ = [
    "AttentionState",
    "FeedForward",
    "Gradients",
    "KVCache",
    "LayerNorm",
    "Linear",
    "PagedKVCache",
    "QuantizedWeights",
    "RMSNorm",
    "RoPE",
    "SelfAttention",
    "T5Bias",
    "__version__",
    "active_isa",
    "alibi_slopes",
    "apply_rope",
    "attention",
    "attention_backward",
    "attention_varlen",
    "attention_varlen_backward",
    "attention_varlen_vjp",
    "attention_vjp",
    "attention_with_kvcache",
    "explain",
    "explain_call",
    "get_num_threads",
    "isas",
    "layer_norm",
    "merge_states",
    "quantize",
    "relative_attention",
    "relative_attention_backward",
    "relative_attention_vjp",
    "rms_norm",
    "self_attention",
    "self_attention_vjp",
    "set_num_threads",
    "show_config",
    "show_runtime",
    "t5_bias",
    "use_isa",
]
