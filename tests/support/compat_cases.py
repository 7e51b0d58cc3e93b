"""Wrong arguments of each function of `compat`, and the messages of the errors that they raise."""

from __future__ import annotations

from typing import Any

import numpy as np
from compat_operands import FLASH, JAX, KV_PACKED, PAGES, PYTORCH, QKV_PACKED, VARLEN, array, claim

ACCEPTED = "float16, bfloat16, float32 and float64 are accepted"
NO_FLOATS = f"has dtype int32, but {ACCEPTED}: convert it with .astype(numpy.float32)"
LARGEST = "3.40282e+38"
LARGEST_SCALE = "2.35866e+38"


class Broken:
    """An array that cannot be converted, for a reason that looks like a message of ours."""

    def __init__(self, reason: str, kind: type[Exception] = ValueError) -> None:
        self.reason, self.kind = reason, kind

    def __repr__(self) -> str:
        return f"Broken({self.reason!r})"  # without an address: names of tests must agree between processes

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        raise self.kind(self.reason)


Case = tuple[dict[str, Any], type[Exception], str]


def as_integers(given: dict[str, Any]) -> dict[str, Any]:
    """The arrays among these arguments, as int32."""
    return {name: x.astype(np.int32) for name, x in given.items() if isinstance(x, np.ndarray)}


SDPA_CASES: list[Case] = [
    (as_integers(PYTORCH), TypeError, f"query {NO_FLOATS}"),
    (
        {"query": array(1, 2, 5, 0), "key": array(1, 2, 6, 0)},
        ValueError,
        "query has head_dim 0, but the softmax scale needs head_dim >= 1",
    ),
    (
        {"query": claim(1, 2, 5, 1 << 31), "key": claim(1, 2, 6, 1 << 31)},
        ValueError,
        "query has head_dim 2147483648, but at most 2147483647 is possible",
    ),
    (
        {"value": claim(1, 2, 6, 1 << 31)},
        ValueError,
        "value has head_dim 2147483648, but at most 2147483647 is possible",
    ),
    (
        {"attn_mask": array(5, 7, dtype=bool)},
        ValueError,
        "attn_mask has shape (5, 7), which does not broadcast to (1, 2, 5, 6)",
    ),
    (
        {"attn_mask": array(3, 5, 6)},
        ValueError,
        "attn_mask has shape (3, 5, 6), which does not broadcast to (1, 2, 5, 6)",
    ),
    ({"scale": 1e300}, ValueError, f"scale is 1e+300, but its absolute value must not exceed {LARGEST_SCALE}"),
    ({"scale": "q is k"}, TypeError, "scale is 'q is k', but a real number is needed"),
    ({"scale": "mask has a (bias) "}, TypeError, "scale is 'mask has a (bias) ', but a real number is needed"),
    ({"query": Broken("k has q")}, ValueError, "query of type Broken is not an array of numbers: k has q"),
    ({"attn_mask": Broken("v is q")}, ValueError, "attn_mask of type Broken is not an array of numbers: v is q"),
    ({"key": array(1, 2, 6, 7)}, ValueError, "key has head_dim 7 but query has 8"),
]

DOT_PRODUCT_CASES: list[Case] = [
    (as_integers(JAX), TypeError, f"query {NO_FLOATS}"),
    (
        {"key": array(1, 6, 3, 8), "value": array(1, 6, 3, 8)},
        ValueError,
        "query has 2 heads, which is not a multiple of the 3 heads of key",
    ),
    ({"key": array(1, 6, 2, 7), "value": array(1, 6, 2, 7)}, ValueError, "key has head_dim 7 but query has 8"),
    ({"query_seq_lengths": [9]}, ValueError, "query_seq_lengths holds 9, which is outside 0..5 (the length of query)"),
    (
        {"key_value_seq_lengths": [-1]},
        ValueError,
        "key_value_seq_lengths holds -1, which is outside 0..6 (the length of key)",
    ),
    ({"bias": array(5, 6, dtype=np.int32)}, TypeError, f"bias {NO_FLOATS}"),
    ({"scale": -1e300}, ValueError, f"scale is -1e+300, but its absolute value must not exceed {LARGEST_SCALE}"),
    ({"scale": "q is v"}, TypeError, "scale is 'q is v', but a real number is needed"),
    ({"bias": Broken("q has k")}, ValueError, "bias of type Broken is not an array of numbers: q has k"),
    (
        {"local_window_size": "window (q"},
        TypeError,
        "local_window_size is 'window (q', but an integer or a pair of them is needed",
    ),
]

# Options of all three functions, which differ in the names or shapes of k and v.
FLASH_OPTIONS: list[Case] = [
    (
        {"softmax_scale": "scale is window"},
        TypeError,
        "softmax_scale is 'scale is window', but a real number is needed",
    ),
    ({"window_size": "window is 3"}, TypeError, "window_size is 'window is 3', but a pair of integers is needed"),
    ({"alibi_slopes": array(4, dtype=np.int64)}, TypeError, f"alibi_slopes has dtype int64, but {ACCEPTED}"),
    (
        {"alibi_slopes": Broken("scale is lost, window has holes")},
        ValueError,
        "alibi_slopes of type Broken is not an array of numbers: scale is lost, window has holes",
    ),
    (
        {"alibi_slopes": Broken("no scale", RuntimeError)},
        RuntimeError,
        "alibi_slopes of type Broken is not an array of numbers: no scale",
    ),
    (
        {"alibi_slopes": np.ma.masked_less(array(4), 0)},
        TypeError,
        "alibi_slopes is a MaskedArray, whose mask would be lost: pass .data, and what is hidden as mask=",
    ),
]

# The core's checks of options, which add the number of the sequence to messages about packed sequences.
LARGE_SCALE: Case = (
    {"softmax_scale": 1e300},
    ValueError,
    f"softmax_scale is 1e+300, but its absolute value must not exceed {LARGEST_SCALE}",
)
SMALL_SOFTCAP: Case = (
    {"softcap": 1e-300},
    ValueError,
    f"softcap is 1e-300, but softmax_scale / softcap must not exceed {LARGEST}",
)
WRONG_SLOPES: Case = (
    {"alibi_slopes": array(3)},
    ValueError,
    "alibi_slopes has shape (3,), which does not broadcast to (2, 4)",
)


def of_sequence(case: Case) -> Case:
    changed, kind, message = case
    return changed, kind, f"{message} (sequence 0)"


FLASH_CASES: list[Case] = [
    *FLASH_OPTIONS,
    LARGE_SCALE,
    SMALL_SOFTCAP,
    WRONG_SLOPES,
    (as_integers(FLASH), TypeError, f"q {NO_FLOATS}"),
    ({"k": array(2, 6, 2, 7)}, ValueError, "k has head_dim 7 but q has 8"),
    ({"k": array(2, 6, 3, 8)}, ValueError, "q has 4 heads, which is not a multiple of the 3 heads of k"),
    ({"v": array(2, 6, 4, 8)}, ValueError, "v has 4 heads but k has 2"),
    ({"v": array(2, 7, 2, 8)}, ValueError, "v has length 7 but k has 6"),
    ({"k": array(3, 6, 2, 8)}, ValueError, "the leading dimensions (3,) of k do not broadcast against (2,)"),
    (
        {"q": claim(1 << 40, 1 << 14, 1, 8), "k": claim(1, 6, 1, 8), "v": claim(1, 6, 1, 8)},
        ValueError,
        "the result would have shape (1099511627776, 16384, 1, 8), which is larger than any memory",
    ),
]

VARLEN_CASES: list[Case] = [
    *FLASH_OPTIONS,
    of_sequence(LARGE_SCALE),
    of_sequence(SMALL_SOFTCAP),
    WRONG_SLOPES,
    (as_integers(VARLEN), TypeError, f"q {NO_FLOATS}"),
    ({"k": array(6, 2, 7)}, ValueError, "k has head_dim 7 but q has 8 (sequence 0)"),
    ({"k": array(6, 3, 8)}, ValueError, "q has 4 heads, which is not a multiple of the 3 heads of k (sequence 0)"),
    ({"v": array(6, 4, 8)}, ValueError, "v has 4 heads but k has 2 (sequence 0)"),
    ({"v": array(7, 2, 8)}, ValueError, "v has 7 rows but k has 6"),
    ({"cu_seqlens_q": [0, 2, 4]}, ValueError, "cu_seqlens_q goes from 0 to 4, but q has the rows 0 to 5"),
    ({"cu_seqlens_k": [0, 2, 9]}, ValueError, "cu_seqlens_k goes from 0 to 9, but k has the rows 0 to 6"),
    ({"cu_seqlens_k": [0, 6]}, ValueError, "cu_seqlens_k has 2 entries but cu_seqlens_q has 3"),
    # with pages
    ({**PAGES, "softmax_scale": 1e300}, ValueError, LARGE_SCALE[2]),
    ({**PAGES, "softcap": 1e-300}, ValueError, SMALL_SOFTCAP[2]),
    (
        {**PAGES, "k": array(4, 3, 3, 8), "v": array(4, 3, 3, 8)},
        ValueError,
        "q has 4 heads, which is not a multiple of the 3 heads of k",
    ),
    ({**PAGES, "k": array(4, 3, 2, 6)}, ValueError, "q has head_dim 8 but the cache has 6"),
]

QKV_PACKED_CASES: list[Case] = [
    *FLASH_OPTIONS,
    LARGE_SCALE,
    WRONG_SLOPES,
    (as_integers(QKV_PACKED), TypeError, f"qkv {NO_FLOATS}"),
    ({"qkv": Broken("k has q")}, ValueError, "qkv of type Broken is not an array of numbers: k has q"),
    (
        {"qkv": array(2, 5, 2, 4, 8)},
        ValueError,
        "qkv has shape (2, 5, 2, 4, 8), but (B, S, 3, heads, head_dim) is needed",
    ),
    ({"dropout_p": 0.5}, ValueError, "dropout_p is 0.5, but there is no dropout at inference: pass 0.0"),
]

KV_PACKED_CASES: list[Case] = [
    *FLASH_OPTIONS,
    SMALL_SOFTCAP,
    (as_integers(KV_PACKED), TypeError, f"q {NO_FLOATS}"),
    ({"kv": array(2, 6, 2, 2, 7)}, ValueError, "kv has head_dim 7 but q has 8"),
    ({"kv": array(2, 6, 2, 3, 8)}, ValueError, "q has 4 heads, which is not a multiple of the 3 heads of kv"),
    (
        {"kv": array(2, 6, 2, 2, 8, dtype=np.float64)},
        TypeError,
        "kv has dtype float64 but q has float32: they must be equal",
    ),
    ({"q": array(5, 4, 8)}, ValueError, "q has shape (5, 4, 8), but 4 dimensions are needed"),
]

VARLEN_QKV_PACKED_CASES: list[Case] = [
    *FLASH_OPTIONS,
    of_sequence(LARGE_SCALE),
    WRONG_SLOPES,
    ({"qkv": array(6, 4, 8)}, ValueError, "qkv has shape (6, 4, 8), but (total, 3, heads, head_dim) is needed"),
    ({"cu_seqlens": [0, 2, 4]}, ValueError, "cu_seqlens goes from 0 to 4, but qkv has the rows 0 to 6"),
    ({"cu_seqlens": [1, 6]}, ValueError, "cu_seqlens must start with 0 and never fall"),
    ({"max_seqlen": 3}, ValueError, "max_seqlen is 3, but cu_seqlens has a sequence of 4"),
    ({"max_seqlen": 3.0}, TypeError, "max_seqlen is 3.0, but an integer is needed"),
]

VARLEN_KV_PACKED_CASES: list[Case] = [
    *FLASH_OPTIONS,
    of_sequence(SMALL_SOFTCAP),
    ({"kv": array(6, 2, 2, 7)}, ValueError, "kv has head_dim 7 but q has 8 (sequence 0)"),
    ({"cu_seqlens_k": [0, 2, 9]}, ValueError, "cu_seqlens_k goes from 0 to 9, but kv has the rows 0 to 6"),
]

KVCACHE_CASES: list[Case] = [
    *FLASH_OPTIONS,
    LARGE_SCALE,
    SMALL_SOFTCAP,
    WRONG_SLOPES,
    ({"q": array(2, 1, 4, 6)}, ValueError, "q has head_dim 6 but the cache has 8"),
    (
        {"k_cache": array(2, 9, 3, 8), "v_cache": array(2, 9, 3, 8)},
        ValueError,
        "q has 4 heads, which is not a multiple of the 3 heads of k_cache",
    ),
    (
        {"k": Broken("q has k"), "v": array(2, 1, 2, 8)},
        ValueError,
        "k of type Broken is not an array of numbers: q has k",
    ),
    (
        {"k": array(2, 1, 3, 8), "v": array(2, 1, 2, 8)},
        ValueError,
        "k has shape (2, 1, 3, 8), but (2, 1, 2, 8) is needed",
    ),
]

CASES: dict[str, list[Case]] = {
    "scaled_dot_product_attention": SDPA_CASES,
    "dot_product_attention": DOT_PRODUCT_CASES,
    "flash_attn_func": FLASH_CASES,
    "flash_attn_qkvpacked_func": QKV_PACKED_CASES,
    "flash_attn_kvpacked_func": KV_PACKED_CASES,
    "flash_attn_varlen_func": VARLEN_CASES,
    "flash_attn_varlen_qkvpacked_func": VARLEN_QKV_PACKED_CASES,
    "flash_attn_varlen_kvpacked_func": VARLEN_KV_PACKED_CASES,
    "flash_attn_with_kvcache": KVCACHE_CASES,
}
