"""Compare the speed of caches with its targets, group by group, and with PyTorch on the same keys and values.

`--vllm FILE` adds vLLM's operator. Returns 1 if a target was missed, a result was wrong or a step allocates memory.
Run `python benchmarks/caches.py --help` for the options.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from workbench import allocations
from workbench.cache_grid import CACHE_GROUPS, OVERHEAD_GROUP
from workbench.targets_command import add_arguments, run

PEERS = ("pytorch", "vllm")
SHIM = Path(__file__).with_name("counting_malloc.c")


def counts_allocations(args: argparse.Namespace) -> bool:
    """Whether to count allocations: only if the group of steps is measured in full."""
    part = args.list or args.files or args.workloads or args.dtype or args.precision
    return not part and (args.groups is None or OVERHEAD_GROUP in args.groups)


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser, CACHE_GROUPS, PEERS)
    args = parser.parse_args()
    code = run(args)
    if counts_allocations(args):
        good = [allocations.show(SHIM, threads, allocations.STEPS) for threads in args.threads]
        return max(code, int(not all(good)))
    return code


if __name__ == "__main__":
    sys.exit(main())
