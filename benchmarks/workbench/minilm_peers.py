"""MiniLM's trained weights in PyTorch and ONNX Runtime: functions from padded token ids to the last layer's vectors."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Inputs = dict[str, Any]
EXAMPLES = Path(__file__).resolve().parent.parent.parent / "examples"


def import_example(name: str) -> Any:
    """Import a module of examples/."""
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    return importlib.import_module(name)


def load_model() -> Any:
    """Return the model of transformers."""
    import transformers

    folder = import_example("minilm").model_folder()
    return transformers.BertModel.from_pretrained(folder, local_files_only=True).eval()


def padded(ids: list[Any]) -> Inputs:
    """Return the inputs of a batch as PyTorch and ONNX Runtime take them."""
    import numpy as np

    shape = (len(ids), max(map(len, ids)))
    inputs = {name: np.zeros(shape, np.int64) for name in ("input_ids", "attention_mask", "token_type_ids")}
    for i, row in enumerate(ids):
        inputs["input_ids"][i, : len(row)] = row
        inputs["attention_mask"][i, : len(row)] = 1
    return inputs


def pytorch(model: Any) -> Callable[[Inputs], Any]:
    """Return a function to a float32 array (batch, tokens, 384)."""
    import torch

    def run(inputs: Inputs) -> Any:
        with torch.inference_mode():
            found = model(**{name: torch.from_numpy(array) for name, array in inputs.items()})
        return found.last_hidden_state.float().numpy()

    return run


def onnx(file: Path, threads: int) -> Callable[[Inputs], Any]:
    """Return a function to a float32 array (batch, tokens, 384); 0 threads: the default of ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(["state"], inputs)[0]


def export(model: Any, file: Path) -> None:
    """Write the model as ONNX Runtime runs it fastest: with its own fused operators."""
    import numpy as np
    import torch

    inputs = padded([np.arange(5), np.arange(9)])
    names = list(inputs)
    torch.onnx.export(
        written_out(model),
        tuple(torch.from_numpy(inputs[name]) for name in names),
        str(file),
        input_names=names,
        output_names=["state"],
        dynamic_axes={name: {0: "batch", 1: "tokens"} for name in names},
        dynamo=False,
    )
    optimizer = importlib.import_module("onnxruntime.transformers.optimizer")
    fused = optimizer.optimize_model(
        str(file), model_type="bert", num_heads=model.config.num_attention_heads, hidden_size=model.config.hidden_size
    )
    fused.save_model_to_file(str(file))


def written_out(peer: Any) -> Any:
    """Return the model as plain operations, which the exporter to ONNX understands and ONNX Runtime's tool fuses."""
    import torch

    heads = peer.config.num_attention_heads

    class WrittenOut(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.peer = peer

        def forward(self, ids: Any, mask: Any, types: Any) -> Any:
            parts = self.peer.embeddings
            positions = torch.arange(ids.shape[1]).unsqueeze(0)
            x = parts.word_embeddings(ids) + parts.token_type_embeddings(types) + parts.position_embeddings(positions)
            x = parts.LayerNorm(x)
            hidden = (1.0 - mask.unsqueeze(1).unsqueeze(2).to(torch.float32)) * -10000.0
            for layer in self.peer.encoder.layer:
                attention = layer.attention.self
                q, k, v = (
                    part(x).view(x.shape[0], x.shape[1], heads, -1).permute(0, 2, 1, 3)
                    for part in (attention.query, attention.key, attention.value)
                )
                scores = torch.matmul(q, k.transpose(-1, -2)) / q.shape[-1] ** 0.5 + hidden
                found = torch.matmul(torch.softmax(scores, -1), v).permute(0, 2, 1, 3).contiguous().view(x.shape)
                x = layer.attention.output.LayerNorm(layer.attention.output.dense(found) + x)
                inner = torch.nn.functional.gelu(layer.intermediate.dense(x))
                x = layer.output.LayerNorm(layer.output.dense(inner) + x)
            return x

    return WrittenOut().eval()
