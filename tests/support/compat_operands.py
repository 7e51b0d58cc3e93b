"""Arguments of each function of `compat` that are right."""

from __future__ import annotations

from typing import Any

import numpy as np


def array(*shape: int, dtype: Any = np.float32) -> Any:
    return np.ones(shape, dtype)


def claim(*shape: int) -> Any:
    """A view that claims any shape over four bytes of memory."""
    return np.broadcast_to(np.float32(0), shape)


PYTORCH = {"query": array(1, 2, 5, 8), "key": array(1, 2, 6, 8), "value": array(1, 2, 6, 8)}
JAX = {"query": array(1, 5, 2, 8), "key": array(1, 6, 2, 8), "value": array(1, 6, 2, 8)}
FLASH = {"q": array(2, 5, 4, 8), "k": array(2, 6, 2, 8), "v": array(2, 6, 2, 8)}
VARLEN = {
    "q": array(5, 4, 8),
    "k": array(6, 2, 8),
    "v": array(6, 2, 8),
    "cu_seqlens_q": [0, 2, 5],
    "cu_seqlens_k": [0, 3, 6],
    "max_seqlen_q": 9,
    "max_seqlen_k": 9,
}
QKV_PACKED = {"qkv": array(2, 5, 3, 4, 8)}
KV_PACKED = {"q": array(2, 5, 4, 8), "kv": array(2, 6, 2, 2, 8)}
VARLEN_QKV_PACKED = {"qkv": array(6, 3, 4, 8), "cu_seqlens": [0, 2, 6], "max_seqlen": 9}
VARLEN_KV_PACKED = {name: x for name, x in VARLEN.items() if name not in ("k", "v")} | {"kv": array(6, 2, 2, 8)}
KVCACHE = {"q": array(2, 1, 4, 8), "k_cache": array(2, 9, 2, 8), "v_cache": array(2, 9, 2, 8), "cache_seqlens": 4}
PAGES = {"k": array(4, 3, 2, 8), "v": array(4, 3, 2, 8), "block_table": [[0], [1]]}

OPERANDS: dict[str, dict[str, Any]] = {
    "scaled_dot_product_attention": PYTORCH,
    "dot_product_attention": JAX,
    "flash_attn_func": FLASH,
    "flash_attn_qkvpacked_func": QKV_PACKED,
    "flash_attn_kvpacked_func": KV_PACKED,
    "flash_attn_varlen_func": VARLEN,
    "flash_attn_varlen_qkvpacked_func": VARLEN_QKV_PACKED,
    "flash_attn_varlen_kvpacked_func": VARLEN_KV_PACKED,
    "flash_attn_with_kvcache": KVCACHE,
}
