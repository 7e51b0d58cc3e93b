"""Train a small GPT on a folder of texts, in NumPy and selfattn alone; then let it write.

A token is a byte. The program shows the loss and the speed while it runs, saves the loss curve as a picture, and keeps
a checkpoint from which --resume continues.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from decoder import VOCABULARY, Config, Decoder, encode, random_weights
from generate import Chooser, generate, new_caches
from gpt_training import loss_and_gradients
from nn import Array
from training import AdamW, Weights, learning_rate
from training_options import add_checkpoint_options, add_options, check_checkpoint_options, check_options
from training_run import Step, save_curves, start, train

TEXTS = Path(__file__).resolve().parent.parent / "docs"
KINDS = {".md", ".txt", ".rst", ".py"}
DEFINING = ("layers", "width", "heads", "length")  # options that a resumed run must share with its checkpoint


def read_texts(folder: Path) -> Array:
    """Return the bytes of all texts in a folder, one after the other."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in KINDS and path.is_file())
    texts = [path.read_text(encoding="utf8", errors="replace") for path in files]
    return encode("\n\n".join(texts))


def step_on(data: Array, config: Config, args: argparse.Namespace) -> Step:
    """Return the training's step. Its random pieces of the data depend only on the seed and the step's number."""

    def step(weights: Weights, number: int) -> tuple[float, Weights, int]:
        starts = np.random.default_rng([args.seed, number]).integers(0, len(data) - args.length, args.batch)
        pieces = data[starts[:, None] + np.arange(args.length + 1)]
        return *loss_and_gradients(config, weights, pieces), args.batch * args.length

    return step


def write(config: Config, weights: Weights, prompt: str, tokens: int, seed: int) -> str:
    """Return the prompt and what the model writes after it; keys and values stay in caches.

    Only the positions of a training piece have learned vectors. So when they are used up, the model continues from the
    second half of what it has read and written, at position 0 and with new caches.
    """
    ids, model = encode(prompt)[-config.max_length :], Decoder(config, weights)
    chooser = Chooser(temperature=0.8, seed=seed, allowed=np.array([10, *range(32, 127)]))
    produced: list[int] = []
    while len(produced) < tokens:
        count = min(tokens - len(produced), config.max_length - len(ids) + 1)  # the last token is not read
        found = list(generate(model, new_caches(config, config.max_length), ids, count, chooser))
        produced += found
        ids = np.append(ids, found)[-((config.max_length + 1) // 2) :]
    return prompt + "".join(map(chr, produced))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the example."""
    args = parse(arguments)
    data = read_texts(args.texts)
    if len(data) <= args.length + 1:
        print(
            f"train.py: {args.texts} has {len(data)} bytes of text ({', '.join(sorted(KINDS))}): too few",
            file=sys.stderr,
        )
        return 1
    config = Config(args.layers, args.width, args.heads, args.heads, VOCABULARY, args.length)
    run = start(random_weights(config, args.seed), AdamW(), args, DEFINING)
    count = sum(x.size for x in run.weights.values())
    print(f"{len(data):,} bytes of text, {count:,} weights, {args.batch} x {args.length} tokens a step")
    rates = partial(learning_rate, peak=args.rate, warm_up=args.warm_up, steps=args.steps)
    train(run, step_on(data, config, args), rates, args)
    save_curves({"loss": run.losses}, "nats per byte", args.picture)
    print(write(config, run.weights, args.prompt, args.write, args.seed))
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's options, checked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("texts", nargs="?", type=Path, default=TEXTS, help="a folder (default: this project's docs)")
    sizes = {
        "steps": 600,
        "batch": 8,
        "length": 256,
        "layers": 4,
        "width": 256,
        "heads": 8,
        "warm-up": 50,
        "write": 300,
    }
    add_options(parser, sizes)
    add_checkpoint_options(parser)
    parser.add_argument("--rate", type=float, default=1e-3, help="the highest learning rate (default: 1e-3)")
    parser.add_argument("--prompt", default="Attention ")
    args = parser.parse_args(arguments)
    check_options(parser, args, dict.fromkeys(sizes, 1) | {"warm-up": 0, "write": 0})
    check_checkpoint_options(parser, args)
    if not 1 <= len(args.prompt.encode()) <= 64:
        parser.error("the prompt must have 1 to 64 bytes")
    return args


if __name__ == "__main__":
    sys.exit(main())
