"""Check selfattn's memory: a peak linear in the sequence length S, little scratch, no allocation with `out=`.

Returns 1 if the peak grows faster than S, a thread's scratch is above 2 MiB, the forward or the backward pass of
training takes more than 8 MiB, or a repeated call allocates memory.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import selfattn
from selfattn._bench.peers import PEERS
from workbench import allocations
from workbench.grid import GROUPS
from workbench.memory import GRADIENT_HEADS, HEAD_DIM, growth, measure_gradients, measure_peak, scratch, wide_workloads

LENGTHS = [2**power for power in range(10, 17)]
COLUMNS = ("selfattn", "numpy")
MIB = 2.0**20
MAX_EXPONENT = 1.1  # the output grows like S^1; below a few MiB, pages and pools add noise
MAX_SCRATCH = 2 * MIB
GRADIENT_LENGTH = 16384
MAX_GRADIENT_MEMORY = 8 * MIB
SHIM = Path(__file__).with_name("counting_malloc.c")


def show_peaks(lengths: list[int], threads: int) -> bool:
    """Measure and print line by line, then print the exponents; return whether selfattn's is small enough."""
    print(f"Peak: one head, head_dim {HEAD_DIM}, causal, float32, threads {threads}; MiB")
    print(f"{'S':>7} {'q k v out':>10} {'selfattn':>10} {'NumPy':>10} {'S x S scores':>13}")
    added: dict[str, list[int]] = {name: [] for name in COLUMNS}
    for length in lengths:
        cells = []
        for name in COLUMNS:
            value = measure_peak(name, length, threads)
            cells.append("-" if value is None else f"{value / MIB:.1f}")
            added[name] += [] if value is None else [value]
        arrays, scores = 4 * 4 * length * HEAD_DIM / MIB, 4 * length * length / MIB
        print(f"{length:7} {arrays:10.1f} {cells[0]:>10} {cells[1]:>10} {scores:13.1f}", flush=True)
    exponents = {name: growth(lengths[: len(values)], values) for name, values in added.items() if len(values) > 1}
    for name, exponent in exponents.items():
        print(f"{PEERS[name].label}: what a call adds, out included, grows like S^{exponent:.2f}")
    return exponents.get("selfattn", 0.0) <= MAX_EXPONENT


def show_scratch(threads: int) -> bool:
    """Print the largest scratch memory in each group; return whether all are small enough."""
    print("\nScratch, as `explain` tells it: the largest of each group; KiB")
    print(f"{'group':>14} {'per thread':>11} {'shared':>8}")
    groups = {name: list(group.workloads) for name, group in GROUPS.items()} | {"wide": list(wide_workloads())}
    worst = 0
    for name, workloads in groups.items():
        found = scratch(workloads, threads)
        if found:
            thread, shared = (max(values) for values in zip(*found.values(), strict=True))
            print(f"{name:>14} {thread / 1024:11.1f} {shared / 1024:8.1f}")
            worst = max(worst, thread)
    print(f"at most {worst / MIB:.2f} MiB per thread, limit {MAX_SCRATCH / MIB:.0f} MiB")
    return worst <= MAX_SCRATCH


def show_gradients(length: int, threads: int) -> bool:
    """Print what both passes of training need in addition to operands and results; return whether it is little."""
    found = measure_gradients(length, threads)
    print(f"\nGradients: {GRADIENT_HEADS} heads of {length} tokens, bias (H, 1, Sk), float32, threads {threads}")
    forward, backward = (value / MIB for value in found)
    limit = f"limit {MAX_GRADIENT_MEMORY / MIB:.0f} MiB"
    print(f"in addition to operands and results: forward {forward:.1f} MiB, backward {backward:.1f} MiB, {limit}")
    return max(found) <= MAX_GRADIENT_MEMORY


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parts = {"peak", "scratch", "gradients", "allocations"}
    parser.add_argument("--parts", nargs="+", choices=sorted(parts), default=parts, help="default: all")
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, metavar="S")
    parser.add_argument("--threads", type=int, default=selfattn.get_num_threads())
    args = parser.parse_args()
    good = "peak" not in args.parts or show_peaks(args.lengths, args.threads)
    good &= "scratch" not in args.parts or show_scratch(args.threads)
    good &= "gradients" not in args.parts or show_gradients(GRADIENT_LENGTH, args.threads)
    good &= "allocations" not in args.parts or allocations.show(SHIM, args.threads)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
