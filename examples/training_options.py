"""The options of training programs, and checks that find impossible ones before the training and not after it."""

from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Callable, Mapping
from pathlib import Path

from training_run import unfinished


def add_options(parser: argparse.ArgumentParser, sizes: Mapping[str, int]) -> None:
    """Add an option for each size, with its default, and the options of every run."""
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, default=Path("loss.png"), help="where the loss curve goes")


def add_checkpoint_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of runs that can be continued."""
    parser.add_argument("--checkpoint", type=Path, help="an .npz file that keeps the state of the training")
    parser.add_argument("--save-every", type=float, default=60, help="seconds between checkpoints (default: 60)")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint")


def check_options(parser: argparse.ArgumentParser, args: argparse.Namespace, sizes: Mapping[str, int]) -> None:
    """Exit with a message, before the training, if an option of every run is impossible.

    `sizes` gives the smallest value of each size.
    """
    for name, smallest in {**sizes, "seed": 0}.items():
        value = getattr(args, name.replace("-", "_"))
        if value < smallest:
            parser.error(f"--{name} must be at least {smallest}, not {value}")
    if not (0 < args.rate < math.inf):
        parser.error(f"--rate must be a positive number, not {args.rate}")
    if importlib.util.find_spec("matplotlib"):  # else there will be no picture
        check_picture(parser, args.picture)


def check_checkpoint_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Do the same for the options of runs that can be continued, and for the width of a head."""
    if args.width % args.heads:
        parser.error(f"--heads {args.heads} must divide --width {args.width}")
    if not args.save_every >= 0:
        parser.error(f"--save-every must be at least 0, not {args.save_every}")
    if args.resume and not (args.checkpoint and args.checkpoint.is_file()):
        parser.error("--resume needs an existing --checkpoint")
    if args.checkpoint:
        check_file(parser, "--checkpoint", args.checkpoint, unfinished)


def check_picture(parser: argparse.ArgumentParser, path: Path) -> None:
    """Exit with a message if matplotlib cannot write a picture with this name."""
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = [f".{kind}" for kind in FigureCanvasBase.get_supported_filetypes()]
    if path.suffix.lower() not in kinds:
        parser.error(f"--picture {path}: the name must end with {', '.join(kinds)}")
    check_file(parser, "--picture", path)


def check_file(
    parser: argparse.ArgumentParser, option: str, path: Path, written: Callable[[Path], Path] = lambda path: path
) -> None:
    """Exit with a message if a file cannot be written. It does not change: `written` names the file that is opened."""
    if not path.name or path.is_dir():
        parser.error(f"{option} {path} is a folder, not a file")
    opened = written(path)
    existed = opened.exists()
    try:
        opened.open("ab").close()
        if not existed:
            opened.unlink()
    except OSError as error:
        parser.error(f"{option} {path} cannot be written: {error.strerror}")
