"""What scripts share that print one line per case: options, thread pools of one size, and ratios of times."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from selfattn._bench.timing import interleave

from .limits import LIMITS, variables

POOLS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def parse(parser: argparse.ArgumentParser, seconds: float) -> argparse.Namespace:
    """Add the options that such scripts share, and parse. Starts anew if a thread pool would have another size."""
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--seconds", type=float, default=seconds, help="per line")
    parser.add_argument("--isa", choices=LIMITS, help="limit all libraries that can be limited to an instruction set")
    args = parser.parse_args()
    wanted = dict.fromkeys(POOLS, str(args.threads)) | (variables(args.isa) if args.isa else {})
    if not wanted.items() <= os.environ.items():  # libraries read them when they are loaded
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | wanted)
    return args


def compare_times(runs: Mapping[str, Callable[[], Any]], seconds: float) -> tuple[float, str]:
    """Return the median time of the first call, and the ratios of the others' times to it, as text."""
    times = interleave(runs, seconds)
    own = times.pop(next(iter(runs)))
    ratios = [f"{name} {np.median(np.divide(found, own)):5.2f}" for name, found in times.items()]
    return float(np.median(own)), "  ".join(ratios)
