"""JAX's dot_product_attention, compiled by XLA."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from selfattn._bench.dense import dense_bias, dense_mask, square_causal
from selfattn._bench.peer import LAYER_INPUTS, MAX_SCORES_BYTES, Peer, Run
from selfattn._bench.workload import Array, Arrays, Workload


class Jax(Peer):
    """One jitted function. Its number of threads comes from the environment, see `worker.THREAD_LIMITS`."""

    name, label, module = "jax", "JAX", "jax"

    def why_not(self, workload: Workload) -> str:
        """See `Peer.why_not`."""
        if workload.dtype == "float64":
            return "its softmax is in float32"
        if workload.dtype == "float16":
            return "XLA for CPUs has no products of float16 that it sums in float32"
        if workload.options.softcap is not None:
            return "dot_product_attention has no softcap"
        pairs = workload.batch * workload.num_heads * workload.q_len * workload.kv_len
        if pairs * workload.itemsize > MAX_SCORES_BYTES:
            return "its score matrix would take more than 2 GiB"
        return ""

    def prepare(self, workload: Workload, arrays: Arrays, threads: int) -> Run:
        """See `Peer.prepare`."""
        jax = importlib.import_module("jax")
        causal = square_causal(workload)
        options = {
            "mask": None if causal else dense_mask(workload, arrays),
            "bias": dense_bias(workload, arrays),
        }
        options = {name: jax.device_put(array) for name, array in options.items() if array is not None}
        layer = workload.kind == "layer"
        operands = [arrays[n] for n in ("x", *LAYER_INPUTS)] if layer else [arrays[n].swapaxes(1, 2) for n in "qkv"]
        operands = [jax.device_put(np.ascontiguousarray(array)) for array in operands]

        def attend(q: Any, k: Any, v: Any, options: dict[str, Any]) -> Any:
            return jax.nn.dot_product_attention(q, k, v, is_causal=causal, **options)

        def attend_layer(x: Any, *weights: Any) -> Any:
            *operands, options = weights
            return _layer(workload, attend, x, operands, options)

        call = jax.jit(attend_layer if layer else attend)

        def run() -> Any:
            out = call(*operands, options).block_until_ready()
            return out if layer else _Swapped(out)

        return run


def _layer(workload: Workload, attend: Any, x: Any, operands: list[Any], options: dict[str, Any]) -> Any:
    w_q, w_k, w_v, w_o, b_q, b_k, b_v, b_o = operands
    rows = (workload.batch, workload.q_len)
    q = (x @ w_q + b_q).reshape(*rows, workload.num_heads, -1)
    k = (x @ w_k + b_k).reshape(*rows, workload.num_kv_heads, -1)
    v = (x @ w_v + b_v).reshape(*rows, workload.num_kv_heads, -1)
    return attend(q, k, v, options).reshape(*rows, -1) @ w_o + b_o


class _Swapped:
    """JAX's result, (batch, length, heads, dim), which converts to an array with heads before length."""

    __slots__ = ("out",)

    def __init__(self, out: Any) -> None:
        self.out = out

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        """Return an array over the same memory with the axes swapped."""
        array: Array = np.asarray(self.out).swapaxes(1, 2)
        return array
