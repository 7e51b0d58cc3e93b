"""Attention over keys and values that stay in files: they are read piece by piece, so they may be larger than memory.

The program writes random keys and values to a temporary folder, and lets the queries of the last tokens attend to all
of them. If the files are small enough, it checks the result against a single call.

    python examples/stream.py --keys 1000000 --dtype float16
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import selfattn as sa

Array = NDArray[Any]
CHECKED_BYTES = 1 << 30  # larger files are not read as a whole
TOLERANCE = {"float32": 1e-5, "float16": 2e-3}


@dataclass(frozen=True)
class Tokens:
    """A file of rows (heads, dim), one after the other for each token."""

    path: Path
    dtype: np.dtype[Any]
    length: int
    heads: int
    dim: int

    def bytes(self) -> int:
        """The size of the file."""
        return self.length * self.heads * self.dim * self.dtype.itemsize

    def piece(self, first: int, count: int) -> Array:
        """Map the tokens [first, first + count) into memory; the system reads them when they are used."""
        row = self.bytes() // self.length
        return np.memmap(self.path, self.dtype, "r", first * row, (count, self.heads, self.dim))

    def write(self, rng: np.random.Generator, piece: int) -> None:
        """Fill the file with random numbers."""
        with self.path.open("wb") as file:
            for first in range(0, self.length, piece):
                shape = (min(piece, self.length - first), self.heads, self.dim)
                rng.standard_normal(shape, dtype=np.float32).astype(self.dtype).tofile(file)


def stream(q: Array, k: Tokens, v: Tokens, piece: int, progress: Callable[[int], None] = lambda done: None) -> Array:
    """Return causal attention of the queries (tokens, heads, dim), which belong to the last tokens of the files."""
    state = sa.AttentionState(q, kv_len=k.length, causal=True, layout="bshd")
    for first in range(0, k.length, piece):
        count = min(piece, k.length - first)
        state.absorb(k.piece(first, count), v.piece(first, count))
        progress(first + count)
    out, _ = state.result()
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the example."""
    args = parse(arguments)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        shape = (args.keys, args.kv_heads, args.dim)
        k, v = (Tokens(Path(folder, name), np.dtype(args.dtype), *shape) for name in ("keys", "values"))
        for tokens in (k, v):
            show(f"writing {tokens.path}")
            tokens.write(rng, args.piece)
        q = rng.standard_normal((args.queries, args.heads, args.dim), dtype=np.float32).astype(args.dtype)
        before, start = peak_bytes(), time.perf_counter()
        out = stream(q, k, v, args.piece, bar(args.keys, start))
        seconds, added = time.perf_counter() - start, peak_bytes() - before
        show("")
        total = k.bytes() + v.bytes()
        print(f"{args.keys:,} keys and values, {mib(total)}, in pieces of {args.piece:,}; {args.queries:,} queries")
        print(f"{seconds:.2f} s, {args.keys / seconds:,.0f} keys/s, {mib(total / seconds)}/s")
        print(f"peak memory of the process: {mib(peak_bytes())}, {mib(added)} more than before the first piece")
        if total > CHECKED_BYTES:
            return 0
        whole = sa.attention(q, k.piece(0, args.keys), v.piece(0, args.keys), causal=True, layout="bshd")
        difference = float(np.max(np.abs(out.astype(np.float32) - whole), initial=0))
        print(f"largest difference from a single call: {difference:.1e}")
        return int(not difference <= TOLERANCE[args.dtype])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"keys": 65536, "queries": 256, "heads": 8, "kv-heads": 2, "dim": 64}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    parser.add_argument("--dtype", choices=TOLERANCE, default="float32", help="of the files (default: float32)")
    parser.add_argument("--piece", type=int, default=8192, help="keys that are read at a time (default: 8192)")
    parser.add_argument("--folder", type=Path, help="where to put the files (default: the system's temporary folder)")
    args = parser.parse_args(arguments)
    if min(args.keys, args.queries, args.heads, args.kv_heads, args.dim, args.piece) < 1:
        parser.error("all numbers must be at least 1")
    if args.queries > args.keys or args.heads % args.kv_heads:
        parser.error("queries are the last tokens of keys, and heads are a multiple of kv-heads")
    if args.folder and not args.folder.is_dir():
        parser.error(f"{args.folder}: no such folder")
    return args


def bar(length: int, start: float) -> Callable[[int], None]:
    """Return a function that shows how many keys are done."""

    def progress(done: int) -> None:
        filled, rate = 30 * done // length, done / (time.perf_counter() - start)
        show(f"[{'#' * filled}{'.' * (30 - filled)}] {done:,} of {length:,} keys, {rate:,.0f}/s")

    return progress


def show(text: str) -> None:
    """Show progress if standard error is a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def peak_bytes() -> int:
    """Return the largest memory that the process has had so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def mib(count: float) -> str:
    """Return a number of bytes in MiB."""
    return f"{count / 2**20:,.0f} MiB"


if __name__ == "__main__":
    sys.exit(main())
