"""Right and wrong calls, for mypy to read: `assert_type` says what a call returns, `type: ignore` that it is wrong.

Nothing here is run. mypy reports an unused `ignore`, so a wrong call cannot pass unnoticed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import assert_type

import selfattn as sa
from selfattn import compat, viz

Array = NDArray[Any]


def attention(x: Array, flag: bool, options: dict[str, Any]) -> None:
    assert_type(sa.attention(x, x, x), Array)
    assert_type(sa.attention([[1.0]], [[1.0]], [[1.0]], causal=True, window=(3, None), layout="bshd"), Array)
    assert_type(sa.attention(x, x, x, return_lse=False, return_weights=False), Array)
    assert_type(sa.attention(x, x, x, return_lse=True), tuple[Array, Array])
    assert_type(sa.attention(x, x, x, return_weights=True, precision="medium"), tuple[Array, Array])
    assert_type(sa.attention(x, x, x, return_lse=True, return_weights=True), tuple[Array, Array, Array])
    assert_type(sa.attention(x, x, x, return_lse=flag), Any)
    assert_type(sa.attention(x, x, x, t5=sa.T5Bias(x), scale=1, out=x), Array)
    assert_type(sa.attention(x, x, x, **options), Any)
    sa.attention(x, x, x, casual=True)  # type: ignore[call-overload]
    sa.attention(x, x, x, layout="bsdh")  # type: ignore[call-overload]
    sa.attention(x, x, x, precision="hihg")  # type: ignore[call-overload]
    sa.attention(x, x, x, window=3)  # type: ignore[call-overload]
    sa.attention(x, x, x, return_lse="yes")  # type: ignore[call-overload]
    sa.attention(x, x, x, out=[1.0])  # type: ignore[call-overload]
    sa.attention(x, x)  # type: ignore[call-overload]
    _, _ = sa.attention(x, x, x, return_lse=True, return_weights=True)  # type: ignore[misc]


def explain(x: Array) -> None:
    assert_type(sa.explain(x, x, x, causal=True, return_lse=True)["kernel"], Any)
    sa.explain(x, x, x, casual=True)  # type: ignore[call-arg]
    sa.explain(x, x, x, precision="hihg")  # type: ignore[arg-type]


def relative(x: Array) -> None:
    assert_type(sa.relative_attention(x, x, x, x, x, x, mem_len=3), Array)
    assert_type(sa.relative_attention(x, x, x, x, x, x, return_lse=True), tuple[Array, Array])
    sa.relative_attention(x, x, x, x, x, x, memory=3)  # type: ignore[call-overload]
    sa.relative_attention(x, x, x, x, x, x, q_offset=3)  # type: ignore[call-overload]


def relative_gradients(x: Array) -> None:
    _, vjp = sa.relative_attention_vjp(x, x, x, x, x, x, mem_len=3, return_lse=True, wrt=("r", "t5"))
    assert_type(vjp(x), sa.Gradients)
    sa.relative_attention_vjp(x, x, x, x, x, x, out=x)  # type: ignore[call-arg]
    assert_type(sa.relative_attention_backward(*[x] * 9, mem_len=3, window=(3, 0), accumulate=False), sa.Gradients)
    sa.relative_attention_backward(x, x, x, x, x, x, x, x, x, q_offset=3)  # type: ignore[call-arg]


def layers(x: Array, cache: sa.KVCache) -> None:
    layer = sa.SelfAttention(x, x, x, num_heads=2, rope=True)
    assert_type(layer.num_heads, int)
    assert_type(layer(x, context=x, causal=True), Array)
    assert_type(layer(x, cache=cache, return_lse=True), tuple[Array, Array])
    assert_type(layer(x, return_lse=True, return_weights=True), tuple[Array, Array, Array])
    assert_type(sa.self_attention(x, x, x, x, num_heads=2, rope=sa.RoPE()), Array)
    assert_type(sa.self_attention(x, x, x, x, num_heads=2, return_weights=True), tuple[Array, Array])
    y, vjp = sa.self_attention_vjp(x, x, x, x, num_heads=2, wrt=["x", "b_q"], b_q=x, rope=True)
    assert_type(vjp(y), dict[str, Array])
    sa.self_attention_vjp(x, x, x, x, num_heads=2, layout="bshd")  # type: ignore[call-arg]
    sa.SelfAttention(x, x, x)  # type: ignore[call-arg]
    sa.SelfAttention(x, x, x, num_head=2)  # type: ignore[call-arg]
    layer(x, casual=True)  # type: ignore[call-overload]
    layer(x, layout="bshd")  # type: ignore[call-overload]
    layer(x, cache=x)  # type: ignore[call-overload]
    _ = layer.num_head  # type: ignore[attr-defined]
    sa.self_attention(x, x, x, x)  # type: ignore[call-overload]
    sa.self_attention(x, x, x, x, num_heads=2, cache=cache)  # type: ignore[call-overload]


def varlen(x: Array) -> None:
    assert_type(sa.attention_varlen(x, x, x, [0, 3]), Array)
    assert_type(sa.attention_varlen(x, x, x, [0, 3], return_lse=True), tuple[Array, Array])
    assert_type(sa.attention_varlen(x, x, x, [0, 3], return_weights=True), tuple[Array, list[Array]])
    assert_type(sa.attention_varlen([x], [x], [x], mask=[None]), list[Array])
    assert_type(sa.attention_varlen([x], [x], [x], return_lse=True), tuple[list[Array], list[Array]])
    assert_type(sa.attention_varlen_backward(x, x, x, x, x, x, [0, 3], into={"q": x}, bias=[None]), sa.Gradients)
    _, vjp = sa.attention_varlen_vjp(x, x, x, [0, 3], wrt=["scale"], scale=1, return_lse=True)
    assert_type(vjp(x, x), sa.Gradients)
    sa.attention_varlen_vjp(x, x, x, [0, 3], kv_lens=[3])  # type: ignore[call-arg]
    sa.attention_varlen_backward(x, x, x, x, x, x, [0, 3], return_lse=True)  # type: ignore[call-arg]
    sa.attention_varlen(x, x, x)  # type: ignore[call-overload]
    sa.attention_varlen([x], [x], [x], [0, 3], kv_lens=[3])  # type: ignore[call-overload]
    sa.attention_varlen(x, x, x, [0, 3], layout="bshd")  # type: ignore[call-overload]


def caches(x: Array) -> None:
    cache = sa.KVCache(1, 2, 8, capacity=10, dtype="int8")
    sa.KVCache(1, 2, 8, 10, dtype=np.float16)
    sa.KVCache(1, 2, 8, 10, dtype=np.dtype("float32"))
    assert_type(cache.batch, int)
    assert_type(cache.capacity, int)
    assert_type(cache.head_dim, int)
    assert_type(cache.window, int | None)
    assert_type(cache.nbytes, int)
    assert_type(cache.lengths, NDArray[np.int64])
    assert_type(cache.k, Array)
    assert_type(cache.append(x, x), None)
    assert_type(sa.KVCache.buffer_size(1, 2, 8, 10), int)
    assert_type(sa.attention_with_kvcache(x, cache, x, x), Array)
    assert_type(sa.attention_with_kvcache(x, cache, return_weights=True), tuple[Array, Array])
    sa.attention_with_kvcache(x, cache, x, x, casual=True)  # type: ignore[call-overload]
    sa.attention_with_kvcache(x, x)  # type: ignore[call-overload]
    sa.KVCache(1, 2, 8, 10, dtype="int7")  # type: ignore[arg-type]
    sa.KVCache(1, 2, 8, 10, pages=3)  # type: ignore[call-arg]
    sa.KVCache.buffer_size(1, 2, 8, 10, dtype="int7")  # type: ignore[arg-type]
    cache.no_such_method()  # type: ignore[attr-defined]
    cache.batch = "three"  # type: ignore[assignment]
    cache.append()  # type: ignore[call-arg]


def paged(x: Array) -> None:
    cache = sa.PagedKVCache(10, 16, 2, 8)
    assert_type(cache.num_pages, int)
    assert_type(cache.page_size, int)
    assert_type(cache.window, int | None)
    assert_type(cache.allocate(), int)
    assert_type(cache.sequences, tuple[int, ...])
    assert_type(sa.attention_with_kvcache(x, cache, x, x, sequences=[0], cascade=True), Array)
    sa.PagedKVCache(10, 16, 2, 8, dtype="int7")  # type: ignore[arg-type]
    sa.PagedKVCache(10, 16, 2, 8, capacity=3)  # type: ignore[call-arg]
    cache.no_such_method()  # type: ignore[attr-defined]
    _ = cache.capacity  # type: ignore[attr-defined]


def others(x: Array) -> None:
    assert_type(sa.apply_rope(x, [0, 1], sa.RoPE(base=1e6), layout="bshd", inverse=True), Array)
    assert_type(sa.RoPE.from_config({"head_dim": 8}, layer_type="full_attention", seq_len=9), sa.RoPE)
    sa.apply_rope(x, [[0], [1]], sa.RoPE(inv_freq=x, attention_scaling=1.5, axes=[0, 1]))
    assert_type(sa.merge_states([x, x], [x, x]), tuple[Array, Array])
    state = sa.AttentionState(x, kv_len=6, causal=True, window=(3, None), softcap=2.0)
    state.absorb(x, x, first=0, mask=x)
    assert_type(state.result(), tuple[Array, Array])
    assert_type(sa.alibi_slopes(4), NDArray[np.float32])
    assert_type(sa.t5_bias(x, 3, 4, bidirectional=False), Array)
    assert_type(sa.show_config(), None)
    assert_type(sa.show_config("dicts"), dict[str, Any])
    assert_type(sa.show_runtime("dicts"), dict[str, Any])
    assert_type(sa.isas(), list[str])
    assert_type(sa.get_num_threads(), int)
    with sa.use_isa("portable"):
        sa.set_num_threads(None)
    assert_type(viz.text(x, head="mean"), str)
    assert_type(viz.head_view(x, skip=["a"]), viz.HeadView)
    sa.apply_rope(x, layout="bsdh")  # type: ignore[arg-type]
    sa.apply_rope(x, position=[0])  # type: ignore[call-arg]
    sa.RoPE(theta=1e6)  # type: ignore[call-arg]
    sa.merge_states([x])  # type: ignore[call-arg]
    sa.AttentionState(x)  # type: ignore[call-arg]
    sa.AttentionState(x, kv_len=6, return_lse=True)  # type: ignore[call-arg]
    sa.alibi_slopes("four")  # type: ignore[arg-type]
    sa.show_config("dict")  # type: ignore[call-overload]
    sa.set_num_threads(2.5)  # type: ignore[arg-type]
    sa.no_such_function()  # type: ignore[attr-defined]
    viz.text(x, head="main")  # type: ignore[arg-type]
    viz.heatmap(x, titel="x")  # type: ignore[call-arg]
    viz.heatmap(x, power="half")  # type: ignore[arg-type]


def other_libraries_names(x: Array) -> None:
    assert_type(compat.scaled_dot_product_attention(x, x, x, is_causal=True), Array)
    assert_type(compat.flash_attn_func(x, x, x, 0.0, None, True), Array)
    assert_type(compat.flash_attn_func(x, x, x, return_attn_probs=True), tuple[Array, Array, Array])
    assert_type(compat.flash_attn_varlen_func(x, x, x, [0, 3], [0, 3], 3, 3), Array)
    assert_type(compat.flash_attn_qkvpacked_func(x, causal=True), Array)
    assert_type(compat.flash_attn_kvpacked_func(x, x, return_attn_probs=True), tuple[Array, Array, Array])
    assert_type(compat.flash_attn_varlen_qkvpacked_func(x, [0, 3], 3), Array)
    assert_type(compat.flash_attn_varlen_kvpacked_func(x, x, [0, 3], [0, 3], 3, 3), Array)
    assert_type(compat.flash_attn_with_kvcache(x, x, x, num_splits=4), Array)
    assert_type(compat.flash_attn_with_kvcache(x, x, x, return_softmax_lse=True), tuple[Array, Array])
    assert_type(compat.dot_product_attention(x, x, x, is_causal=True), Array)
    assert_type(compat.dot_product_attention(x, x, x, return_residual=True), tuple[Array, Array])
    compat.scaled_dot_product_attention(x, x, x, causal=True)  # type: ignore[call-arg]
    compat.flash_attn_func(x, x, x, casual=True)  # type: ignore[call-overload]
    compat.flash_attn_varlen_func(x, x, x, [0, 3])  # type: ignore[call-overload]
    compat.flash_attn_with_kvcache(x, x, x, layout="bshd")  # type: ignore[call-overload]
    compat.dot_product_attention(x, x, x, implementation="cudnn")  # type: ignore[call-overload]
