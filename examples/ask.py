"""Finds the passages of text files that answer a question best, and shows which words their scores come from.

    python examples/ask.py "How do I force an instruction set?"
    python examples/ask.py "Who owns the harbour?" notes/ --top 5 --index notes.npz

A passage's score is the cosine of the angle between MiniLM's embeddings of passage and question. The embedding is a
mean over tokens, so the score is a sum over tokens, and each word's share of it is exact. Words with large shares are
highlighted.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from attribution import Shares, decompose
from highlight import highlighted, printable, summed
from minilm import MiniLM
from passage_index import EMPTY, Index, Interrupted, load, refresh, save
from passages import SUFFIXES, Passage, Unusable, find_files, read_bytes

ROOT = Path(__file__).resolve().parents[1]
INDENT, WIDTH = 7, 110


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the example."""
    args = parse(arguments)
    try:
        model = MiniLM()
        index = up_to_date(args, model)
        query = model.embed([args.question])[0]
        for rank, (_, passage) in enumerate(index.search(query, args.top), start=1):
            vectors = model.vectors([passage.text])[0]
            show(rank, passage, decompose(passage.text, vectors, query))
    except (ImportError, Unusable) as error:
        return complain(str(error), 1)
    except KeyboardInterrupt as error:
        return complain(str(error) or "interrupted", 130)
    return 0


def complain(message: str, code: int) -> int:
    """Print what is wrong and return the exit code."""
    status("")
    print(f"ask.py: {printable(message)}", file=sys.stderr)
    return code


def up_to_date(args: argparse.Namespace, model: MiniLM) -> Index:
    """Return the index of the files as they are now; embed and save what is missing."""
    old = load(args.index) if args.index else EMPTY
    left_out: list[str] = []
    progress = Progress()
    try:
        index = refresh(old, contents([path.resolve() for path in args.paths], left_out), model, progress)
    except Interrupted as interruption:
        if args.index:
            save(interruption.index, args.index)
            done = len(interruption.index.passages)
            raise KeyboardInterrupt(f"interrupted; {args.index} has {done:,} passages: start again to go on") from None
        raise
    status("")
    for message in left_out[:5]:
        print(f"left out: {printable(message)}", file=sys.stderr)
    if len(left_out) > 5:
        print(f"left out: {len(left_out) - 5} more", file=sys.stderr)
    if not index.passages:
        places = ", ".join(map(str, args.paths))
        raise Unusable(f"{places}: no text in files that end in {' '.join(sorted(SUFFIXES))}")
    print(f"{len(index.passages):,} passages of {len(index.digests):,} files, {progress.summary()}", file=sys.stderr)
    if args.index and index is not old:
        save(index, args.index)
    return index


def contents(paths: list[Path], left_out: list[str]) -> Iterator[tuple[str, bytes]]:
    """Yield names and contents. Skip an unreadable file in a folder; raise if the file itself was named."""
    files = find_files(paths)
    for i, file in enumerate(files):
        status(f"{i} of {len(files)} files read")
        try:
            yield str(file), read_bytes(file)
        except Unusable as error:
            if file in paths:
                raise
            left_out.append(str(error))


class Progress:
    """Shows how many passages are embedded and how fast."""

    def __init__(self) -> None:
        self.done, self.start, self.seconds = 0, 0.0, 0.0

    def __call__(self, done: int, total: int) -> None:
        if done == 0:
            self.start = time.perf_counter()
        self.done, self.seconds = done, time.perf_counter() - self.start
        status(f"{done:,} of {total:,} passages embedded, {self.rate:.0f} per second" if done else "")

    @property
    def rate(self) -> float:
        """Passages per second."""
        return self.done / max(self.seconds, 1e-9)

    def summary(self) -> str:
        """Summarise what was done."""
        if not self.done:
            return "none of them new"
        return f"{self.done:,} embedded in {self.seconds:.1f} s: {self.rate:.0f} passages per second"


def status(text: str) -> None:
    """Show progress if standard error is a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def show(rank: int, passage: Passage, shares: Shares) -> None:
    """Print a passage with its score and the words that the score comes from."""
    file = os.path.relpath(passage.file) if Path(passage.file).is_relative_to(Path.cwd()) else passage.file
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    width = min(shutil.get_terminal_size((WIDTH, 0)).columns, WIDTH) - INDENT
    print(f"\n{rank:2}  {shares.score:.3f}  {printable(f'{file}:{passage.line}  {passage.heading}').rstrip()}")
    for line in [*highlighted(passage.text, shares, width, colour), summed(passage.text, shares)]:
        print(" " * INDENT + line)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's options, checked."""
    description, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("question")
    parser.add_argument(
        "paths", nargs="*", type=Path, default=[ROOT / "README.md", ROOT / "docs"],
        help="text files, and folders with such (default: this project's README and docs)",
    )  # fmt: skip
    parser.add_argument("--top", type=int, default=3, metavar="N", help="how many passages to show (default: 3)")
    parser.add_argument("--index", type=Path, metavar="FILE", help="where to keep the files' embeddings (.npz)")
    args = parser.parse_args(arguments)
    if not args.question.strip():
        parser.error("the question is empty")
    if args.top < 1:
        parser.error("--top must be at least 1")
    if args.index and not args.index.parent.is_dir():
        parser.error(f"--index: there is no folder {args.index.parent}")
    return args


if __name__ == "__main__":
    sys.exit(main())
