"""Time isolated calls, as in a service: each follows a pause, during which idle threads go to sleep.

Each row compares one thread with the default number of threads, in interleaved rounds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

import selfattn as sa
from selfattn._bench.timing import Quartiles

HEADS, HEAD_DIM = 12, 64


def calls() -> dict[str, Callable[..., Any]]:
    """Return a call for each row of the table; each accepts ``num_threads``."""
    rng = np.random.default_rng(0)

    def rows(length: int) -> Any:
        return rng.standard_normal((1, HEADS, length, HEAD_DIM), dtype=np.float32)

    table: dict[str, Callable[..., Any]] = {
        f"{n} tokens": partial(sa.attention, rows(n), rows(n), rows(n)) for n in (1, 12, 24, 32, 48, 64, 96, 128, 256)
    }
    for n in (100, 300, 1000, 4000):
        table[f"1 query, {n} keys"] = partial(sa.attention, rows(1), rows(n), rows(n))
    for n in (12, 62, 128):
        weights = rng.standard_normal((4, 384, 384), dtype=np.float32) / 20
        x = rng.standard_normal((1, n, 384), dtype=np.float32)
        table[f"layer of {n} tokens"] = partial(sa.SelfAttention(*weights, num_heads=HEADS), x)
    return table


def timed(call: Callable[[], Any], pause: float) -> float:
    """Return the seconds of one call after `pause` seconds of sleep."""
    time.sleep(pause)
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    """Print a row for each call."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pause", type=float, default=1e-3, help="seconds between calls (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=300)
    args = parser.parse_args()
    print(f"{'microseconds (median)':24}{'1 thread':>12}{'default':>12}{'default / 1':>24}")
    for name, call in calls().items():
        one, default = partial(call, num_threads=1), call
        pairs = [(timed(one, args.pause), timed(default, args.pause)) for _ in range(args.rounds)][args.rounds // 10 :]
        ones, defaults = np.array(pairs).T * 1e6
        ratio = Quartiles.of(list(defaults / ones))
        spread = f"{ratio.median:.2f} [{ratio.q1:.2f}, {ratio.q3:.2f}]"
        print(f"{name:24}{np.median(ones):12.1f}{np.median(defaults):12.1f}{spread:>24}", flush=True)


if __name__ == "__main__":
    main()
