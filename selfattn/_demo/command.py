"""The options of `selfattn demo`, and what it prints."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .. import viz
from .._picture import visible
from .minilm import LAYERS, attention_weights

SENTENCE = "He went to Norway last month"
MARKS = ("[CLS]", "[SEP]")
_HEADS = 12
_BEST = 3  # keys that are named for each query
_BESIDE = 24  # terminal columns for these names
_LEGEND = (
    "A row is a token that looks, a column is a token that is looked at, in the same order. The darker, the more.",
    "Then: the entropy of the row, and the tokens that are looked at most.",
    "Attention weights show where information may flow, not why the model decides as it does.",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("text", metavar="TEXT", nargs="?", default=SENTENCE, help=f'default: "{SENTENCE}"')
    layers = range(1, LAYERS + 1)
    parser.add_argument("--layer", type=int, choices=layers, default=1, metavar="N", help=f"1 to {LAYERS} (default: 1)")
    parser.add_argument("--head", type=int, choices=range(_HEADS), metavar="N", help="0 to 11 (default: the mean)")
    parser.add_argument("--marks", action="store_true", help="also draw [CLS] and [SEP], the ends of the text")
    parser.add_argument("--output", metavar="FILE", help="also save lines between tokens, as .html or .svg")


def run(args: argparse.Namespace) -> int:
    """Draw the attention weights in the terminal.

    Returns
    -------
    int
        0, or 1 if something is missing or the file cannot be written.
    """
    try:
        tokens, weights = attention_weights(args.text, args.layer)
        skip = () if args.marks else [mark for mark in MARKS if mark in tokens]
        if len(tokens) == len(MARKS) and skip:
            raise ValueError(f"TEXT is {args.text!r}, which has no words")
        print(_drawn(tokens, weights, args, skip))
        if args.output:
            title = f"MiniLM, layer {args.layer}"
            viz.head_view(weights, tokens, head=args.head, title=title, skip=skip).save(args.output)
            print(f"\nSaved to {Path(args.output).resolve()}")
    except (ImportError, OSError, ValueError) as error:
        if isinstance(error, BrokenPipeError):
            raise
        print(f"selfattn demo: {error}", file=sys.stderr)
        return 1
    return 0


def _drawn(tokens: list[str], weights: NDArray[Any], args: argparse.Namespace, skip: Any) -> str:
    """Return the picture: a row per query, with the names of the keys that it looks at most."""
    head: int | Literal["mean"] = "mean" if args.head is None else args.head
    columns = shutil.get_terminal_size().columns
    picture = viz.text(weights, tokens, head=head, skip=skip, width=max(columns - _BESIDE, 2 * _BESIDE))
    headline, *lines = picture.splitlines()
    matrix = weights.mean(axis=0) if head == "mean" else weights[head]
    shown = np.array([i for i, token in enumerate(tokens) if token not in skip])
    for i, query in enumerate(shown):
        for key in shown[np.argsort(-matrix[query, shown], kind="stable")][:_BEST]:
            if matrix[query, key] < 0.005:  # 0 %
                break
            named = f"  {visible(tokens[key])} {100 * matrix[query, key]:.0f} %"
            lines[i] += named if len(lines[i]) + len(named) <= columns else ""
    of_heads = "mean of all heads" if head == "mean" else f"head {head}"
    title = f"Where each token looks in layer {args.layer} of MiniLM, {of_heads}"
    return "\n".join([title, *headline.split("; ")[2:], "", *lines, "", *_LEGEND])
