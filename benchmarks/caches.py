"""Hold reading and writing caches against its targets, group by group, beside PyTorch on the same keys and values.

`--vllm FILE` adds vLLM's operator. Run `python benchmarks/caches.py --help` for the options.
"""

from __future__ import annotations

import argparse
import sys

from selfattn._bench.cache_grid import CACHE_GROUPS
from selfattn._bench.targets_command import add_arguments, run

PEERS = ("pytorch", "vllm")


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser, CACHE_GROUPS, PEERS)
    return run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
