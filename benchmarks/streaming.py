"""Compare AttentionState, which absorbs the keys in pieces, with one call of attention on the same keys.

    python benchmarks/streaming.py --threads 1 2 --piece 512 4096

Results are compared before anything is timed. Calls are timed in turns. The table gives the time in pieces divided by
the time of the single call in the same round: the median, and the quartiles.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

import selfattn as sa
from selfattn._bench.numbers import numpy_dtype
from selfattn._bench.timing import interleave, ratios

TOLERANCE = {"float32": 1e-5, "float64": 1e-13, "float16": 2e-3, "bfloat16": 2e-2}


@dataclass(frozen=True)
class Shape:
    """A causal call: the queries belong to the last tokens."""

    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    dim: int

    def arrays(self, dtype: Any) -> tuple[Any, Any, Any]:
        """Return random queries, keys and values."""
        rng = np.random.default_rng(0)
        heads = ((self.heads, self.q_len), (self.kv_heads, self.kv_len), (self.kv_heads, self.kv_len))
        q, k, v = (rng.standard_normal((1, h, n, self.dim), dtype=np.float32).astype(dtype) for h, n in heads)
        return q, k, v

    def __str__(self) -> str:
        return f"{self.heads}/{self.kv_heads} heads of {self.dim}, {self.q_len:,} × {self.kv_len:,}"


SHAPES = [
    Shape(8, 8, 2048, 2048, 64),
    Shape(8, 2, 4096, 4096, 128),
    Shape(4, 4, 512, 32768, 64),
    Shape(32, 8, 1, 4096, 128),
    Shape(32, 8, 1, 32768, 128),
    Shape(8, 8, 1, 32768, 64),
]


def stream(arrays: tuple[Any, Any, Any], piece: int, threads: int) -> Any:
    """Return the result of absorbing the keys in pieces."""
    q, k, v = arrays
    state = sa.AttentionState(q, kv_len=k.shape[2], causal=True, num_threads=threads)
    for first in range(0, k.shape[2], piece):
        state.absorb(k[:, :, first : first + piece], v[:, :, first : first + piece])
    return state.result()[0]


def measure(shape: Shape, dtype: str, pieces: list[int], threads: int, seconds: float) -> list[list[str]]:
    """Return rows of the table; exit the program if results differ."""
    arrays = shape.arrays(numpy_dtype(dtype))
    runs: dict[str, Callable[[], Any]] = {str(piece): partial(stream, arrays, piece, threads) for piece in pieces}
    runs["one call"] = partial(sa.attention, *arrays, causal=True, num_threads=threads)
    expected = runs["one call"]().astype(np.float64)
    for name, run in runs.items():
        difference = float(np.max(np.abs(run() - expected)))
        if difference > TOLERANCE[dtype]:
            sys.exit(f"{shape}: results in pieces of {name} differ by {difference:.1e}")
    times = interleave(runs, seconds)
    whole = float(np.median(times["one call"])) * 1e3
    return [
        [str(shape), dtype, str(threads), name, f"{whole:.2f} ms", f"{x.median:.2f} ({x.q1:.2f}–{x.q3:.2f})"]
        for name, x in ratios(times, "one call").items()
    ]


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, sa.get_num_threads()])
    parser.add_argument("--dtype", nargs="+", choices=TOLERANCE, default=["float32"])
    parser.add_argument("--piece", type=int, nargs="+", default=[512], help="keys (default 512)")
    parser.add_argument("--seconds", type=float, default=2.0, help="time per shape (default 2)")
    args = parser.parse_args()
    columns = ["shape", "dtype", "threads", "piece", "one call", "in pieces / one call"]
    for row in (columns, ["---"] * len(columns)):
        print("| " + " | ".join(row) + " |")
    for threads in sorted(set(args.threads)):
        for dtype in args.dtype:
            for shape in SHAPES:
                for row in measure(shape, dtype, args.piece, threads, args.seconds):
                    print("| " + " | ".join(row) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
