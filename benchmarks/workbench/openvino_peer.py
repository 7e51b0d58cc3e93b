"""OpenVINO's ScaledDotProductAttention (opset 13)."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from selfattn._bench.dense import additive_mask, dense_mask, square_causal
from selfattn._bench.peer import CannotRun, Peer, Run
from selfattn._bench.workload import Array, Arrays, Workload

HINTS = {"float32": "f32", "bfloat16": "bf16"}  # the type that it may compute in


class OpenVino(Peer):
    """A compiled model with one attention node; for a layer, with MatMul and Add around it.

    The node does not support grouped query heads. If it applies the causal mask itself, K and V are repeated
    beforehand. Otherwise the heads of a group become additional rows of one head, which reads K and V once.
    """

    name, label, module = "openvino", "OpenVINO", "openvino"

    def why_not(self, workload: Workload) -> str:
        """See `Peer.why_not`."""
        if workload.dtype not in HINTS:
            return "computes in float32 or bfloat16"
        if workload.options.softcap is not None:
            return "ScaledDotProductAttention has no softcap"
        if workload.kind == "layer" and workload.group_size > 1:
            return "its node has no groups of heads"
        return ""

    def prepare(self, workload: Workload, arrays: Arrays, threads: int) -> Run:
        """See `Peer.prepare`."""
        openvino = importlib.import_module("openvino")
        causal = square_causal(workload)
        mask = None if causal else _mask(workload, arrays)
        if workload.kind == "layer":
            feeds = {"x": arrays["x"]}
            out = np.empty_like(arrays["x"])
        else:
            feeds = _repeated(workload, arrays) if causal else _folded(workload, arrays)
            out = np.empty((*feeds["q"].shape[:-1], workload.value_dim), feeds["q"].dtype)
        if mask is not None:
            feeds["mask"] = mask
        model = _model(openvino, workload, arrays, feeds, causal)
        try:
            compiled = openvino.Core().compile_model(model, "CPU", _settings(workload, threads))
        except RuntimeError as error:  # bfloat16, when limited to an instruction set without it
            raise CannotRun(str(error).strip().splitlines()[-1]) from error
        request = compiled.create_infer_request()
        for index, array in enumerate(feeds.values()):
            request.set_input_tensor(index, _tensor(openvino, array))
        request.set_output_tensor(0, _tensor(openvino, out))
        # The layer's node is the only one whose result has three axes.
        result = out if out.ndim == 3 else out.reshape(workload.batch, workload.num_heads, workload.q_len, -1)

        def run() -> Array:
            # The tensors hold only addresses, so `feeds` must live as long as this call.
            assert feeds
            request.infer(share_inputs=True, share_outputs=True)
            return result

        return run


def _settings(workload: Workload, threads: int) -> dict[str, Any]:
    """Return settings for one call at a time in the requested dtype, without pinning threads, as for all peers."""
    return {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": HINTS[workload.product_dtype if workload.precision == "medium" else workload.dtype],
        "ENABLE_CPU_PINNING": False,
    }


def _type(openvino: Any, array: Array) -> Any:
    return openvino.Type.bf16 if array.dtype.name == "bfloat16" else openvino.Type(array.dtype)


def _tensor(openvino: Any, array: Array) -> Any:
    """Return a tensor over the same memory; OpenVINO does not accept NumPy's bfloat16 directly."""
    if array.dtype.name == "bfloat16":
        return openvino.Tensor(array.view(np.uint16), openvino.Shape(array.shape), openvino.Type.bf16)
    return openvino.Tensor(array, shared_memory=True)


def _mask(workload: Workload, arrays: Arrays) -> Array | None:
    """Return one array of all masks and biases, for rows in the order of `_folded`."""
    added = workload.options.bias or workload.options.alibi
    dense = additive_mask(workload, arrays) if added else dense_mask(workload, arrays)
    if dense is None:
        return None
    mask = np.broadcast_to(dense, (*dense.shape[:2], workload.q_len, workload.kv_len))
    if mask.shape[1] == 1:
        mask = np.tile(mask, (1, 1, workload.group_size, 1))
    rows = workload.group_size * workload.q_len
    return np.array(mask, order="C").reshape(mask.shape[0], -1, rows, workload.kv_len)


def _folded(workload: Workload, arrays: Arrays) -> dict[str, Array]:
    rows = workload.group_size * workload.q_len
    q = arrays["q"].reshape(workload.batch, workload.num_kv_heads, rows, workload.head_dim)
    return {"q": q, "k": arrays["k"], "v": arrays["v"]}


def _repeated(workload: Workload, arrays: Arrays) -> dict[str, Array]:
    k, v = (np.repeat(arrays[name], workload.group_size, axis=1) for name in "kv")
    return {"q": arrays["q"], "k": k, "v": v}


def _model(openvino: Any, workload: Workload, arrays: Arrays, feeds: dict[str, Array], causal: bool) -> Any:
    ops = importlib.import_module("openvino.opset13")
    inputs = {name: ops.parameter(array.shape, _type(openvino, array), name=name) for name, array in feeds.items()}
    layer = workload.kind == "layer"
    weights = {name: ops.constant(_tensor(openvino, array)) for name, array in arrays.items()} if layer else {}
    q, k, v = _projected(ops, workload, weights, inputs["x"]) if layer else (inputs[name] for name in "qkv")
    options = {"attention_mask": inputs["mask"]} if "mask" in inputs else {}
    out = ops.scaled_dot_product_attention(q, k, v, causal=causal, **options)
    if layer:
        rows = ops.transpose(out, np.array([0, 2, 1, 3]))
        concat = ops.reshape(rows, np.array([workload.batch, workload.q_len, -1]), False)
        out = _linear(ops, weights, concat, "o")
    return openvino.Model([out], list(inputs.values()), workload.name)


def _projected(ops: Any, workload: Workload, weights: dict[str, Any], x: Any) -> tuple[Any, ...]:
    """Return q, k and v of a layer, shape (batch, heads, length, dim); layers have no grouped heads."""
    shape = np.array([workload.batch, workload.q_len, workload.num_heads, -1])
    order = np.array([0, 2, 1, 3])
    return tuple(ops.transpose(ops.reshape(_linear(ops, weights, x, name), shape, False), order) for name in "qkv")


def _linear(ops: Any, weights: dict[str, Any], x: Any, name: str) -> Any:
    return ops.add(ops.matmul(x, weights[f"w_{name}"], False, False), weights[f"b_{name}"])
