"""A training run of any model: checkpoints, the loop over steps, its progress, and the picture of its losses."""

from __future__ import annotations

import argparse
import sys
import time
import zipfile
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
    """A training run: everything that a checkpoint keeps. The settings are the options that define the model."""

    weights: Weights
    optimiser: AdamW
    losses: list[float] = field(default_factory=list)
    settings: Mapping[str, int] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write a checkpoint. An existing one is replaced only after the new one is complete."""
        arrays = {f"weight/{name}": x for name, x in self.weights.items()}
        arrays |= {f"optimiser/{name}": x for name, x in self.optimiser.state().items()}
        arrays |= {f"setting/{name}": np.array(x) for name, x in self.settings.items()}
        new = unfinished(path)
        np.savez(new, losses=np.array(self.losses), **arrays)
        new.replace(path)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint. Raise ValueError if it is damaged, or if the settings of its run are others."""
        parts: dict[str, Weights] = {"weight": {}, "optimiser": {}, "setting": {}}
        try:
            with zipfile.ZipFile(path), np.load(path) as file:
                for name in file.files:
                    kind, _, rest = name.partition("/")
                    if rest:
                        parts[kind][rest] = file[name]
                losses = file["losses"].tolist()
        except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is not a whole checkpoint of this program ({error})") from error
        found = {name: x.item() for name, x in parts["setting"].items()}
        if found.keys() != self.settings.keys():
            raise ValueError(f"{path} is a checkpoint of another program or version")
        other = [f"--{name} {found[name]}, not {x}" for name, x in self.settings.items() if found[name] != x]
        if other:
            raise ValueError(f"{path} is of a run with {' and '.join(other)}")
        if shapes(parts["weight"]) != shapes(self.weights):
            raise ValueError(f"{path} is of a model of other sizes")
        self.weights, self.losses = parts["weight"], losses
        self.optimiser.restore(parts["optimiser"])


def unfinished(path: Path) -> Path:
    """Return the file that a checkpoint is written to, before it replaces the old checkpoint."""
    return path.with_suffix(".new.npz")


def shapes(weights: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each weight."""
    return {name: x.shape for name, x in weights.items()}


def start(weights: Weights, optimiser: AdamW, args: argparse.Namespace, defining: Sequence[str]) -> Run:
    """Return a new run, or with `args.resume` the one in the checkpoint; its `defining` options must be the same."""
    run = Run(weights, optimiser, settings={name: getattr(args, name) for name in defining})
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
