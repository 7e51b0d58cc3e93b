"""A training run of any model: checkpoints, the loop over steps, its progress, and the picture of its losses."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from training import AdamW, Weights, clip

BAR = 24  # width of the progress bar in characters
CLIP = 1.0  # largest norm of the gradients

# Takes the weights and the number of a step; returns its loss, the gradients, and how many tokens it learned from.
Step = Callable[[Weights, int], tuple[float, Weights, int]]


@dataclass
class Run:
    """A training run: everything that a checkpoint keeps."""

    weights: Weights
    optimiser: AdamW
    losses: list[float] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write a checkpoint. An existing one is replaced only after the new one is complete."""
        arrays = {f"weight/{name}": x for name, x in self.weights.items()}
        arrays |= {f"optimiser/{name}": x for name, x in self.optimiser.state().items()}
        new = path.with_suffix(".new.npz")
        np.savez(new, losses=np.array(self.losses), **arrays)
        new.replace(path)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint. Raise ValueError if the checkpoint is from a model of other sizes."""
        with np.load(path) as file:
            parts: dict[str, Weights] = {"weight": {}, "optimiser": {}}
            for name in file.files:
                kind, _, rest = name.partition("/")
                if rest:
                    parts[kind][rest] = file[name]
            losses = file["losses"].tolist()
        if shapes(parts["weight"]) != shapes(self.weights):
            raise ValueError(f"{path} is of a model of other sizes")
        self.weights, self.losses = parts["weight"], losses
        self.optimiser.restore(parts["optimiser"])


def shapes(weights: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each weight."""
    return {name: x.shape for name, x in weights.items()}


def start(weights: Weights, optimiser: AdamW, args: argparse.Namespace) -> Run:
    """Return a new run, or with `args.resume` the one in the checkpoint."""
    run = Run(weights, optimiser)
    try:
        if args.resume:
            run.load(args.checkpoint)
    except ValueError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    return run


def train(run: Run, step: Step, rate: Callable[[int], float], args: argparse.Namespace) -> None:
    """Continue the run until it has `args.steps` steps, with the learning rate that `rate` returns for each."""
    begun, first, tokens = time.perf_counter(), len(run.losses), 0
    saved = begun
    for number in range(first, args.steps):
        loss, gradients, count = step(run.weights, number)
        clip(gradients, CLIP)
        run.optimiser.update(run.weights, gradients, rate(number))
        run.losses.append(loss)
        tokens += count
        now = time.perf_counter()
        show_progress(number + 1, args.steps, loss, tokens / (now - begun))
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


def save_curves(curves: Mapping[str, Sequence[float]], unit: str, path: Path) -> None:
    """Draw the loss of each step, faint, and its moving average, if matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: pip install 'selfattn[viz]'", file=sys.stderr)
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for i, (name, losses) in enumerate(curves.items()):
        width = max(1, len(losses) // 50)
        smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
        steps, style = np.arange(len(smooth)) + width - 1, "--" if i % 2 else "-"  # two equal curves are both visible
        axes.plot(losses, color=f"C{i}", alpha=0.25)
        axes.plot(steps, smooth, style, color=f"C{i}", label=f"{name}, mean of {width} steps" if width > 1 else name)
    axes.set(xlabel="step", ylabel=f"loss in {unit}", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=120)
    print(f"loss curve: {path}")


def add_options(parser: argparse.ArgumentParser, sizes: Mapping[str, int]) -> None:
    """Add an option for each size, with its default, and the options of every run."""
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, default=Path("loss.png"), help="where the loss curve goes")
    parser.add_argument("--checkpoint", type=Path, help="an .npz file that keeps the state of the training")
    parser.add_argument("--save-every", type=float, default=60, help="seconds between checkpoints (default: 60)")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint")


def check_options(parser: argparse.ArgumentParser, args: argparse.Namespace, sizes: Sequence[str]) -> None:
    """Exit with a message if an option that all runs have is impossible."""
    if any(getattr(args, name.replace("-", "_")) < 1 for name in sizes):
        parser.error("all sizes must be at least 1")
    if args.width % args.heads:
        parser.error("heads must divide the width")
    if args.resume and not (args.checkpoint and args.checkpoint.exists()):
        parser.error("--resume needs an existing --checkpoint")
