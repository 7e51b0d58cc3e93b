"""Train a small GPT on a folder of texts, in NumPy and selfattn alone; then let it write.

A token is a byte. Shows the loss and the speed while it runs, saves the loss curve as a picture, and keeps a checkpoint
from which --resume continues.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from decoder import VOCABULARY, Config, Decoder, encode, random_weights
from generate import Chooser, generate, new_caches
from gpt_training import loss_and_gradients
from nn import Array
from training import AdamW, Weights, clip, learning_rate

TEXTS = Path(__file__).resolve().parent.parent / "docs"
KINDS = {".md", ".txt", ".rst", ".py"}
BAR = 24  # characters of the progress bar
CLIP = 1.0  # largest norm of the gradients


@dataclass
class Run:
    """A training run: everything that a checkpoint keeps."""

    weights: Weights
    optimiser: AdamW
    losses: list[float]

    def save(self, path: Path) -> None:
        """Write a checkpoint. An existing one is replaced only after the new one is complete."""
        arrays = {f"weight/{name}": x for name, x in self.weights.items()}
        arrays |= {f"optimiser/{name}": x for name, x in self.optimiser.state().items()}
        new = path.with_suffix(".new.npz")
        np.savez(new, losses=np.array(self.losses), **arrays)
        new.replace(path)

    @classmethod
    def load(cls, path: Path) -> Run:
        """Read a checkpoint."""
        with np.load(path) as file:
            parts: dict[str, Weights] = {"weight": {}, "optimiser": {}}
            for name in file.files:
                kind, _, rest = name.partition("/")
                if rest:
                    parts[kind][rest] = file[name]
            optimiser = AdamW()
            optimiser.restore(parts["optimiser"])
            return cls(parts["weight"], optimiser, file["losses"].tolist())


def read_texts(folder: Path) -> Array:
    """Return the bytes of all texts in a folder, one after the other."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in KINDS and path.is_file())
    texts = [path.read_text(encoding="utf8", errors="replace") for path in files]
    return encode("\n\n".join(texts))


def batches(data: Array, batch: int, length: int, seed: int, first: int) -> Iterator[Array]:
    """Yield random pieces (batch, length + 1) of the data. A step's batch depends on the seed and its number alone."""
    step = first
    while True:
        starts = np.random.default_rng([seed, step]).integers(0, len(data) - length, batch)
        yield data[starts[:, None] + np.arange(length + 1)]
        step += 1


def train(run: Run, config: Config, data: Array, args: argparse.Namespace) -> None:
    """Continue the run until it has `args.steps` steps."""
    begun, first = time.perf_counter(), len(run.losses)
    saved = begun
    pieces = batches(data, args.batch, args.length, args.seed, first)
    for step in range(first, args.steps):
        loss, gradients = loss_and_gradients(config, run.weights, next(pieces))
        clip(gradients, CLIP)
        run.optimiser.update(run.weights, gradients, learning_rate(step, args.rate, args.warm_up, args.steps))
        run.losses.append(loss)
        now = time.perf_counter()
        speed = (step + 1 - first) * args.batch * args.length / (now - begun)
        show_progress(step + 1, args.steps, loss, speed)
        if args.checkpoint and now - saved > args.save_every:
            run.save(args.checkpoint)
            saved = now
    if args.checkpoint:
        run.save(args.checkpoint)


def show_progress(step: int, steps: int, loss: float, speed: float) -> None:
    """Redraw the bar on a terminal; elsewhere print a line for every tenth of the way."""
    done = BAR * step // steps
    line = f"step {step:,} of {steps:,}  loss {loss:.3f}  {speed:,.0f} tokens/s"
    if sys.stderr.isatty():
        bar = "█" * done + "░" * (BAR - done)
        print(f"\r\033[K{bar} {line}", end="\n" if step == steps else "", file=sys.stderr, flush=True)
    elif step % max(1, steps // 10) == 0 or step == steps:
        print(line, file=sys.stderr, flush=True)


def save_curve(losses: Sequence[float], path: Path) -> None:
    """Draw the loss of each step and its moving average, if matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: pip install 'selfattn[viz]'", file=sys.stderr)
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(losses, color="0.8", label="each step")
    width = max(1, len(losses) // 50)
    smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
    axes.plot(np.arange(len(smooth)) + width - 1, smooth, label=f"mean of {width} steps")
    axes.set(xlabel="step", ylabel="loss in nats per byte", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=120)
    print(f"loss curve: {path}")


def write(config: Config, weights: Weights, prompt: str, tokens: int, seed: int) -> str:
    """Return the prompt and what the model writes after it; keys and values stay in caches."""
    ids = encode(prompt)
    chooser = Chooser(temperature=0.8, seed=seed, allowed=np.array([10, *range(32, 127)]))
    caches = new_caches(config, len(ids) + tokens)
    produced = generate(Decoder(config, weights), caches, ids, tokens, chooser)
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
    config = Config(args.layers, args.width, args.heads, args.heads, VOCABULARY, max(args.length, 64 + args.write))
    run = Run(random_weights(config, args.seed), AdamW(), [])
    if args.resume:
        new, run = run, Run.load(args.checkpoint)
        if {name: x.shape for name, x in new.weights.items()} != {name: x.shape for name, x in run.weights.items()}:
            print(f"train.py: {args.checkpoint} is of a model of other sizes", file=sys.stderr)
            return 1
    count = sum(x.size for x in run.weights.values())
    print(f"{len(data):,} bytes of text, {count:,} weights, {args.batch} x {args.length} tokens a step")
    train(run, config, data, args)
    if run.losses:
        save_curve(run.losses, args.picture)
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
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    parser.add_argument("--rate", type=float, default=1e-3, help="the highest learning rate (default: 1e-3)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompt", default="Attention ")
    parser.add_argument("--picture", type=Path, default=Path("loss.png"), help="where the loss curve goes")
    parser.add_argument("--checkpoint", type=Path, help="an .npz file that keeps the state of the training")
    parser.add_argument("--save-every", type=float, default=60, help="seconds between checkpoints (default: 60)")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint")
    args = parser.parse_args(arguments)
    if any(getattr(args, name.replace("-", "_")) < 1 for name in sizes if name not in ("warm-up", "write")):
        parser.error("all sizes must be at least 1")
    if args.width % args.heads:
        parser.error("heads must divide the width")
    if not 1 <= len(args.prompt.encode()) <= 64:
        parser.error("the prompt must have 1 to 64 bytes")
    if args.resume and not (args.checkpoint and args.checkpoint.exists()):
        parser.error("--resume needs an existing --checkpoint")
    return args


if __name__ == "__main__":
    sys.exit(main())
