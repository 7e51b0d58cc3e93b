"""Compare selfattn's speed with its targets, group by group, and with PyTorch and other peers.

`--dtype` and `--precision` choose among the groups; `--isa avx2` measures without AVX-512.
Run `python benchmarks/targets.py --help` for the options.
"""

from __future__ import annotations

import argparse
import sys

from workbench.targets_command import add_arguments, run


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    return run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
