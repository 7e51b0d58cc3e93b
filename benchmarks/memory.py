"""Peak memory of one call of attention against the sequence length S: linear, not S².

Every figure comes from a fresh process: its peak resident size during the call, less what was
resident before with q, k and v in place. Reads /proc, so it needs Linux.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

import selfattn
from selfattn._bench.peer import MAX_SCORES_BYTES
from selfattn._bench.peers import PEERS
from selfattn._bench.workloads import attention_workload

HEAD_DIM = 64
LENGTHS = [2**power for power in range(10, 17)]
COLUMNS = ("selfattn", "numpy")
WARM_LENGTH = 32  # starts the thread pools, whose stacks are no part of the question
MIB = 2.0**20


def resident_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def measure_here(name: str, length: int, threads: int) -> int:
    """Bytes of peak resident memory one call adds in this process."""
    for size in (WARM_LENGTH, length):
        workload = attention_workload("memory", "", 1, size, HEAD_DIM)
        run = PEERS[name].prepare(workload, workload.make_arrays(), threads)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak
        before = resident_bytes("VmRSS")
        run()
    return max(0, resident_bytes("VmHWM") - before)


def measure(name: str, length: int, threads: int) -> int | None:
    """Do so in a new process; None if a score matrix of more than 2 GiB would be needed."""
    if name != "selfattn" and length * length * 4 > MAX_SCORES_BYTES:
        return None
    request = [name, str(length), str(threads)]
    command = [sys.executable, __file__, "--measure", *request]
    return int(json.loads(subprocess.check_output(command, text=True)))


def growth(lengths: list[int], added: list[int]) -> float:
    """Find the exponent x of the best fit added ~ S^x, over the upper half of the lengths."""
    half = len(lengths) // 2
    logs = np.log(np.maximum(added[half:], 1)), np.log(lengths[half:])
    return float(np.polyfit(logs[1], logs[0], 1)[0])


def print_table(lengths: list[int], threads: int) -> None:
    """Measure and print line by line, the exponents last."""
    print(f"one head, head_dim {HEAD_DIM}, float32, {threads} threads; MiB")
    print(f"{'S':>7} {'q k v out':>10} {'selfattn':>10} {'NumPy':>10} {'S x S scores':>13}")
    added: dict[str, list[int]] = {name: [] for name in COLUMNS}
    for length in lengths:
        cells = []
        for name in COLUMNS:
            value = measure(name, length, threads)
            cells.append("-" if value is None else f"{value / MIB:.1f}")
            added[name] += [] if value is None else [value]
        arrays, scores = 4 * 4 * length * HEAD_DIM / MIB, 4 * length * length / MIB
        print(f"{length:7} {arrays:10.1f} {cells[0]:>10} {cells[1]:>10} {scores:13.1f}", flush=True)
    for name, values in added.items():
        exponent = growth(lengths[: len(values)], values)
        print(f"{PEERS[name].label}: what a call adds, out included, grows like S^{exponent:.2f}")


def main() -> int:
    """Run the command, or one measurement of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, metavar="S")
    parser.add_argument("--threads", type=int, default=selfattn.get_num_threads())
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        name, length, threads = args.measure
        print(json.dumps(measure_here(name, int(length), int(threads))))
    else:
        print_table(args.lengths, args.threads)
    return 0


if __name__ == "__main__":
    sys.exit(main())
