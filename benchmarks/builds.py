"""Compare two installations of selfattn, call by call: whether a change made any call slower.

    python benchmarks/builds.py --other ~/old/.venv/bin/python --threads 1 2

`--other` is the interpreter of an environment in which the other version is installed, with ml_dtypes. Each version has
a process of its own. They make their calls in turns, so both meet the same state of the machine. A line gives the time
of this version, and the other's time divided by it: median and quartiles. Above 1, this version is faster.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np

from selfattn._bench.report import format_seconds
from selfattn._bench.timing import Quartiles, interleave, ratios

CALLS = Path(__file__).resolve().parent / "workbench" / "build_calls.py"
OWN, OTHER = "this version", "the other"


class Build:
    """A process that times calls of one installation."""

    def __init__(self, python: str, threads: int) -> None:
        self._python = python
        command = [python, str(CALLS), str(threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.version, *self.names = self._read().split("\t")

    def seconds_of(self, name: str) -> float:
        """Return the time of a call."""
        assert self._process.stdin is not None
        print(name, file=self._process.stdin, flush=True)
        return float(self._read())

    def stop(self) -> None:
        """End the process."""
        self._process.communicate()

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"{self._python} ended")
        return line.rstrip("\n")


def compare(builds: dict[str, Build], names: list[str], seconds: float) -> list[float]:
    """Print a line for each call; return the medians of the ratios."""
    medians = []
    for name in names:
        for build in builds.values():
            build.seconds_of(name)  # makes the operands
        times = interleave({}, seconds, {title: partial(build.seconds_of, name) for title, build in builds.items()})
        ratio = ratios(times, OWN)[OTHER]
        own = format_seconds(Quartiles.of(times[OWN]).median)
        print(f"{name:30} {own:>9}   {ratio.median:.2f} [{ratio.q1:.2f} {ratio.q3:.2f}]", flush=True)
        medians.append(ratio.median)
    return medians


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", required=True, help="interpreter of the other version")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--seconds", type=float, default=1.0, help="per line (default: %(default)s)")
    parser.add_argument("--calls", nargs="+", help="only calls whose names contain one of these words")
    args = parser.parse_args()
    for threads in args.threads:
        builds = {OWN: Build(sys.executable, threads), OTHER: Build(args.other, threads)}
        names = [name for name in builds[OWN].names if name in builds[OTHER].names]
        names = [name for name in names if any(word in name for word in args.calls or [""])]
        print(f"\n{threads} thread(s): {builds[OWN].version} and {builds[OTHER].version}")
        medians = compare(builds, names, args.seconds)
        for build in builds.values():
            build.stop()
        if medians:
            print(f"geometric mean of {len(medians)}: {np.exp(np.mean(np.log(medians))):.3f}, least {min(medians):.2f}")


if __name__ == "__main__":
    main()
