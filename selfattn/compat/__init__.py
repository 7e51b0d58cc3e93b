"""Attention with the function names, argument orders and causal alignments of other libraries, on NumPy arrays.

Each function is a thin wrapper around selfattn's own, so that existing code only needs to change an import. A table in
its docstring lists the differences from the original. An argument that cannot be mapped raises an error that names it.
Arguments that change nothing here, such as ``deterministic``, are in these tables too.
"""

from __future__ import annotations

from ._flash_attn import flash_attn_func
from ._flash_kvcache import flash_attn_with_kvcache
from ._flash_packed import (
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from ._flash_varlen import flash_attn_varlen_func
from ._jax import dot_product_attention
from ._pytorch import scaled_dot_product_attention

__all__ = [
    "dot_product_attention",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "scaled_dot_product_attention",
]
