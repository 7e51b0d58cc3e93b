"""Measure how other libraries' threads slow down a call: attention right after a matrix product, relative to alone.

The products are NumPy's and PyTorch's; the latter's row needs PyTorch. `GOMP_SPINCOUNT=300000` in the environment makes
idle threads spin for as long as GCC's OpenMP runtime does by default. With a wheel, `--apart` keeps selfattn's own
threads instead of sharing PyTorch's.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np

import selfattn as sa
from selfattn import _core
from selfattn._bench.timing import Quartiles

QUIET = 0.2  # seconds after which no library's threads spin any more


def main() -> None:
    """Print a row for each neighbour."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--apart", action="store_true", help="run two thread teams")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 1, 8, 128, 64), dtype=np.float32)
    x = rng.standard_normal((512, 512), dtype=np.float32)
    before: dict[str, Callable[[], Any]] = {"nothing": lambda: None, "NumPy's product": lambda: x @ x}
    if find_spec("torch"):
        import torch

        import_module("selfattn.integrations.torch")
        if args.apart:
            _core.share_runtime(0, 0)
        torch.set_num_threads(args.threads)
        y = torch.from_numpy(x)
        before["PyTorch's product"] = lambda: y @ y
    times: dict[str, list[float]] = {name: [] for name in before}
    for _ in range(args.rounds):
        for name, neighbour in before.items():
            time.sleep(QUIET)
            sa.attention(q, k, v, num_threads=args.threads)  # awake, as in a loop
            neighbour()
            start = time.perf_counter()
            sa.attention(q, k, v, num_threads=args.threads)
            times[name].append(time.perf_counter() - start)
    alone = Quartiles.of(times["nothing"]).median
    print(f"{_core.parallel_backend()}, GOMP_SPINCOUNT {os.environ.get('GOMP_SPINCOUNT', 'as loaded')}")
    for name, seconds in times.items():
        found = Quartiles.of(seconds)
        print(f"after {name}: {found.median / alone:.2f}x [{found.q1 / alone:.2f}, {found.q3 / alone:.2f}]")


if __name__ == "__main__":
    main()
