"""Time isolated calls, as in a service: each follows a pause, during which idle threads go to sleep.

Each row compares one thread, all threads and the default, in interleaved rounds; the last column is the default's time
relative to the better of the others. `--pause 0` is a loop. `--product` puts a matrix product of NumPy before each call
instead of the pause, as in a model on NumPy; its threads may still spin. `--busy` keeps one CPU busy with a process.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

import selfattn as sa

HEADS, HEAD_DIM = 12, 64
IN_A_ROW = 10  # calls with the same number of threads: the first one follows calls with another number and is left out


def calls() -> dict[str, Callable[..., Any]]:
    """Return a call for each row of the table; each accepts ``num_threads``."""
    rng = np.random.default_rng(0)

    def rows(length: int) -> Any:
        return rng.standard_normal((1, HEADS, length, HEAD_DIM), dtype=np.float32)

    table: dict[str, Callable[..., Any]] = {
        f"{n} tokens": partial(sa.attention, rows(n), rows(n), rows(n)) for n in (16, 24, 32, 48, 64, 96, 128, 256)
    }
    for n in (256, 1000, 2000, 4000, 8000):
        table[f"1 query, {n} keys"] = partial(sa.attention, rows(1), rows(n), rows(n))
    for n in (12, 32, 62, 128):
        weights = rng.standard_normal((4, 384, 384), dtype=np.float32) / 20
        x = rng.standard_normal((1, n, 384), dtype=np.float32)
        table[f"layer of {n} tokens"] = partial(sa.SelfAttention(*weights, num_heads=HEADS), x)
    return table


def timed(call: Callable[[], Any], before: Callable[[], Any]) -> list[float]:
    """Return the seconds of some calls in a row."""
    seconds = []
    for _ in range(IN_A_ROW):
        before()
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def main() -> None:
    """Print a row for each call."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pause", type=float, default=1e-3, help="seconds between calls (default: %(default)s)")
    parser.add_argument("--product", action="store_true", help="a product of NumPy instead of the pause")
    parser.add_argument("--busy", action="store_true", help="another process keeps one CPU busy")
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    x, w = np.ones((128, 384), np.float32), np.ones((384, 1536), np.float32)
    pause = partial(time.sleep, args.pause) if args.pause > 0 else lambda: None
    before: Callable[[], Any] = (lambda: x @ w) if args.product else pause
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if args.busy else None
    counts = {"1 thread": 1, "all": sa.get_num_threads(), "default": None}
    print(f"{'microseconds (median)':24}", *(f"{name:>10}" for name in counts), f"{'default / better':>18}")
    try:
        for name, call in calls().items():
            found: dict[str, list[float]] = {count: [] for count in counts}
            for _ in range(args.rounds):
                for count, threads in counts.items():
                    found[count] += timed(partial(call, num_threads=threads), before)
            one, every, default = (float(np.median(seconds)) * 1e6 for seconds in found.values())
            print(f"{name:24} {one:10.1f} {every:10.1f} {default:10.1f} {default / min(one, every):18.2f}", flush=True)
    finally:
        if other is not None:
            other.kill()


if __name__ == "__main__":
    main()
