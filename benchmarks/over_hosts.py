"""Attention over emulated hosts: the measured times, and those of the model of rank_model.py.

    python benchmarks/over_hosts.py

Each host has one rank with one thread. All hosts share the cores of this machine. So a rank's time of computing is
measured as well: with the same number of ranks, which compute at the same time without sending anything.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from emulated_hosts import Hosts, why_not
from rank_model import Network, Work, by_heads, by_keys, by_states

PROGRAM = Path(__file__).with_name("over_ranks.py")
HEADS, HEAD_DIM = 8, 64
CASES = [("keys", 2048, 8), ("keys", 8192, 8), ("keys", 8192, 2), ("heads", 8192, 8), ("decode", 16384, 8)]


class Measured:
    """Measurements on some hosts. What only computes is measured once, whatever travels in the calls that follow."""

    def __init__(self, network: Hosts, mpiexec: str, folder: Path, repeats: str) -> None:
        self._network = network
        self._command = network.mpiexec(mpiexec, folder, {"OMP_NUM_THREADS": "1"})
        self._command += [sys.executable, "-m", "mpi4py", str(PROGRAM), "--threads", "1", "--repeats", repeats]
        self._known: dict[tuple[str, ...], float] = {}

    def seconds(self, *arguments: str) -> float:
        """Return the seconds that over_ranks.py prints."""
        if arguments not in self._known:
            done = subprocess.run(
                [*self._command, *arguments], capture_output=True, text=True, timeout=120, check=False
            )
            found = re.search(r": ([\d.]+) ms", done.stdout)
            if found is None:
                raise RuntimeError(f"over_ranks.py has failed:\n{done.stdout}{done.stderr}")
            self._known[arguments] = float(found[1]) / 1e3
        return self._known[arguments]

    def line(self, model: Network, by: str, length: int, kv_heads: int) -> list[str]:
        """Measure one kind of work; return a line of the table."""
        count = self._network.count
        sizes = ("--length", str(length), "--kv-heads", str(kv_heads))
        shape = Work(length, HEADS, kv_heads, HEAD_DIM, itemsize=4)
        if by == "decode":
            computing = self.seconds(*sizes, "--work", "decode-alone")
            expected = by_states(count, shape, model, computing)
            measured = self.seconds(*sizes, "--work", "decode")
        else:
            computing = self.seconds(*sizes, "--work", "each") / count
            expected = {"keys": by_keys, "heads": by_heads}[by](count, shape, model, computing)
            measured = self.seconds(*sizes, "--by", by)
        times = [f"{1e3 * x:.1f} ms" for x in (computing, measured, expected)]
        return [str(count), by, f"{length:,}", str(kv_heads), *times, f"{expected / measured:.2f}"]


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, nargs="+", default=[2, 3], help="default: 2 3")
    parser.add_argument("--gbits", type=float, default=1.0, help="that a host sends per second (default: 1)")
    parser.add_argument("--delay", type=float, default=1.0, help="of a packet, in ms (default: 1)")
    parser.add_argument("--repeats", default="7", help="default: 7")
    parser.add_argument("--mpiexec", default=str(Path(sys.executable).with_name("mpiexec")), help="that of MPICH")
    args = parser.parse_args()
    if reason := why_not():
        print(f"over_hosts.py: {reason}", file=sys.stderr)
        return 1
    model = Network(args.gbits * 1e9 / 8, args.delay / 1e3)
    columns = ["hosts", "travels", "tokens", "KV heads", "computing", "measured", "model", "model / measured"]
    for row in (columns, ["---"] * len(columns)):
        print("| " + " | ".join(row) + " |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for count in args.hosts:
            with Hosts(count, rate=model.bandwidth, delay=model.latency) as network:
                measured = Measured(network, args.mpiexec, Path(folder), args.repeats)
                for work in CASES:
                    print("| " + " | ".join(measured.line(model, *work)) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
