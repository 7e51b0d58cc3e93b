"""Compare selfattn with NumPy, PyTorch, ONNX Runtime and other peers on named workloads.

Run `python benchmarks/attention.py --help` for the options.
"""

from __future__ import annotations

import argparse
import sys

from selfattn._bench.command import add_arguments, run
from workbench.grid import EVERY
from workbench.process import WORKER


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser, None, EVERY, WORKER)
    return run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
