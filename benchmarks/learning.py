"""Compare training with PyTorch's: a BERT-base layer with our attention in it, and a step of the GPT example.

    python benchmarks/learning.py --threads 1 2

Results are compared before anything is timed. Rounds are interleaved in one process; medians are printed.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import threadpoolctl
import torch

import selfattn as sa
from selfattn._bench.timing import Quartiles, interleave, ratios
from selfattn.integrations.torch import scaled_dot_product_attention
from workbench import learning_peer as peer

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))
decoder, gpt_training, training = (importlib.import_module(name) for name in ("decoder", "gpt_training", "training"))

Runs = dict[str, Callable[[], Any]]
LAYERS = [(8, 64), (8, 128), (8, 256), (4, 512), (2, 1024), (1, 2048)]  # batch, length
# layers, width, heads, batch, length: the example's default, and a larger model
MODELS = [(4, 256, 8, 8, 256), (6, 384, 6, 8, 256)]
TOLERANCE = 1e-3


def layer_runs(batch: int, length: int) -> Runs:
    """Return forward and backward pass of one layer, with our attention and with PyTorch's."""
    weights = peer.layer_weights(torch.Generator().manual_seed(0))
    x = torch.randn(batch, length, peer.WIDTH, generator=torch.Generator().manual_seed(1))
    functions = {
        "selfattn": scaled_dot_product_attention,
        "PyTorch": torch.nn.functional.scaled_dot_product_attention,
    }
    runs: Runs = {name: partial(peer.layer_gradients, x, weights, f) for name, f in functions.items()}
    compare(*(run() for run in runs.values()))
    return runs


def step_runs(layers: int, width: int, heads: int, batch: int, length: int) -> Runs:
    """Return one training step of the GPT example, and the same model's in PyTorch."""
    config = decoder.Config(layers, width, heads, heads, decoder.VOCABULARY, length)
    weights = decoder.random_weights(config)
    tokens = np.random.default_rng(0).integers(0, 256, (batch, length + 1))
    model = peer.Gpt(config, weights)
    compare([gpt_training.loss_and_gradients(config, weights, tokens)[0]], [model.loss(torch.from_numpy(tokens))])
    optimiser = training.AdamW()

    def step() -> None:
        _, gradients = gpt_training.loss_and_gradients(config, weights, tokens)
        training.clip(gradients, 1.0)
        optimiser.update(weights, gradients, 1e-4)

    return {"selfattn": step, "PyTorch": lambda: model.step(torch.from_numpy(tokens))}


def compare(found: Any, other: Any) -> None:
    """Exit the program if two lists of results differ."""
    for a, b in zip(found, other, strict=True):
        a, b = (np.asarray(x.detach() if isinstance(x, torch.Tensor) else x, dtype=np.float64) for x in (a, b))
        difference = float(np.max(np.abs(a - b)) / np.max(np.abs(b)))
        if difference > TOLERANCE:
            sys.exit(f"results differ by {difference:.1e}")


def show(title: str, rows: Sequence[tuple[int, ...]], runs_of: Callable[..., Runs], seconds: float) -> None:
    """Print a table with a row for each size."""
    print(f"\n| {title} | selfattn | times PyTorch [quartiles] |\n|---|---|---|")
    for row in rows:
        times = interleave(runs_of(*row), seconds)
        ratio = ratios(times, "selfattn")["PyTorch"]
        own = Quartiles.of(times["selfattn"]).median * 1e3
        print(f"| {row} | {own:.2f} ms | {ratio.median:.2f} [{ratio.q1:.2f} {ratio.q3:.2f}] |", flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--seconds", type=float, default=4.0, help="per row (default: %(default)s)")
    args = parser.parse_args()
    for threads in args.threads:
        sa.set_num_threads(threads)
        torch.set_num_threads(threads)
        threadpoolctl.threadpool_limits(threads, user_api="blas")  # of NumPy's matrix products
        print(f"\n{threads} thread{'s' * (threads > 1)}, float32")
        show("BERT-base layer, forward and backward: batch, length", LAYERS, layer_runs, args.seconds)
        show("step of the GPT example: layers, width, heads, batch, length", MODELS, step_runs, args.seconds)


if __name__ == "__main__":
    main()
