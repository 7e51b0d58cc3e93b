"""ONNX Runtime's Attention operator (opset 23)."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from selfattn._bench.dense import additive_mask, dense_mask, square_causal
from selfattn._bench.peer import LAYER_INPUTS, MAX_SCORES_BYTES, CannotRun, Peer, Run
from selfattn._bench.workload import Array, Arrays, Workload

OPSET = 23
IR_VERSION = 10  # the first that supports opset 23


class OnnxRuntime(Peer):
    """A model with one Attention node; for a layer, with MatMul and Add around it."""

    name, label, module = "onnxruntime", "ONNX Runtime", "onnxruntime"

    def available(self) -> bool:
        """Whether both onnxruntime and onnx, which builds the model, are installed."""
        return super().available() and importlib.util.find_spec("onnx") is not None

    def why_not(self, workload: Workload) -> str:
        """See `Peer.why_not`."""
        if workload.dtype == "float64":
            return "its float64 results are only as exact as float32"
        if workload.dtype == "bfloat16":
            return "its operators for CPUs have no bfloat16"
        heads = workload.num_heads if workload.options.alibi else 1
        mask_bytes = heads * workload.q_len * workload.kv_len * workload.itemsize
        if workload.options.window and mask_bytes > MAX_SCORES_BYTES:
            return "its mask would take more than 2 GiB"
        return ""

    def prepare(self, workload: Workload, arrays: Arrays, threads: int) -> Run:
        """See `Peer.prepare`."""
        runtime = importlib.import_module("onnxruntime")
        mask, causal = _mask(workload, arrays)
        model, feeds = _model(workload, arrays, mask, causal)
        settings = runtime.SessionOptions()
        settings.intra_op_num_threads = threads
        settings.inter_op_num_threads = 1
        settings.log_severity_level = 4
        try:
            session = runtime.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
            out = np.empty(_out_shape(workload), dtype=arrays[next(iter(feeds))].dtype)
            binding = _bind(session, feeds, out)
            session.run_with_iobinding(binding)
        except Exception as error:  # the runtime has a separate class for each kind of failure
            raise CannotRun(" ".join(str(error).split())[:160]) from error

        def run() -> Array:
            # The binding holds only addresses, so `feeds` must live as long as it does.
            assert feeds
            session.run_with_iobinding(binding)
            return out

        return run


def _mask(workload: Workload, arrays: Arrays) -> tuple[Array | None, bool]:
    """Return the mask to pass, and whether to set `is_causal`."""
    options = workload.options
    if square_causal(workload):
        return None, True
    added = options.bias or options.alibi
    mask = additive_mask(workload, arrays) if added else dense_mask(workload, arrays)
    if mask is None:
        return None, False
    shape = (workload.batch, mask.shape[1], workload.q_len, workload.kv_len)
    return np.ascontiguousarray(np.broadcast_to(mask, shape)), False


def _out_shape(workload: Workload) -> tuple[int, ...]:
    if workload.kind == "layer":
        return (workload.batch, workload.q_len, workload.d_model)
    return (workload.batch, workload.num_heads, workload.q_len, workload.value_dim)


def _bind(session: Any, feeds: dict[str, Array], out: Array) -> Any:
    """Bind inputs and output to NumPy's memory, so that nothing is copied per call."""
    binding = session.io_binding()
    for name, array in feeds.items():
        binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
    binding.bind_output("out", "cpu", 0, out.dtype, out.shape, out.ctypes.data)
    return binding


def _model(workload: Workload, arrays: Arrays, mask: Array | None, causal: bool) -> tuple[Any, dict[str, Array]]:
    """Build the model, and return it with its input arrays."""
    helper = importlib.import_module("onnx.helper")
    numpy_helper = importlib.import_module("onnx.numpy_helper")
    layer = workload.kind == "layer"
    names = ("x",) if layer else ("q", "k", "v")
    feeds = {name: np.ascontiguousarray(arrays[name]) for name in names}
    if mask is not None:
        feeds["mask"] = mask
    attributes: dict[str, Any] = {"is_causal": int(causal), "scale": workload.scale}
    if workload.options.softcap is not None:
        attributes["softcap"] = workload.options.softcap
    if layer:
        attributes["q_num_heads"] = workload.num_heads
        attributes["kv_num_heads"] = workload.num_kv_heads
    attention = helper.make_node(
        "Attention",
        ["q", "k", "v", *(["mask"] if mask is not None else [])],
        ["concat" if layer else "out"],
        **attributes,
    )
    nodes = _layer_nodes(helper, attention) if layer else [attention]
    weights = LAYER_INPUTS if layer else ()
    graph = helper.make_graph(
        nodes,
        workload.name,
        [_info(helper, name, array.dtype, array.shape) for name, array in feeds.items()],
        [_info(helper, "out", feeds[names[0]].dtype, _out_shape(workload))],
        [numpy_helper.from_array(arrays[name], name) for name in weights],
    )
    opset = helper.make_opsetid("", OPSET)
    return helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION), feeds


def _layer_nodes(helper: Any, attention: Any) -> list[Any]:
    """Add the projections of x before the attention node, and the output projection after it."""

    def linear(source: str, name: str, target: str) -> list[Any]:
        return [
            helper.make_node("MatMul", [source, f"w_{name}"], [f"product_{name}"]),
            helper.make_node("Add", [f"product_{name}", f"b_{name}"], [target]),
        ]

    projections = [node for name in "qkv" for node in linear("x", name, name)]
    return [*projections, attention, *linear("concat", "o", "out")]


def _info(helper: Any, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Any:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(dtype), shape)
