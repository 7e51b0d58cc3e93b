"""Compare relative attention (Transformer-XL) and T5's bias with PyTorch programs that compute the same.

    python benchmarks/relative.py --threads 1 2

Results are compared before anything is timed. Also measures the memory of a call, each in its own process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import selfattn as sa
from selfattn._bench.timing import Peaks, Quartiles, interleave, ratios
from workbench import relative_peer as peer
from workbench.memory import resident_bytes

# batch, segment, memory, heads, head_dim
RELATIVE = [
    (1, 512, 512, 8, 64),
    (4, 128, 128, 8, 64),
    (1, 128, 896, 8, 64),
    (1, 2048, 2048, 8, 64),
    (8, 64, 160, 10, 41),
]
T5 = [(1, 256, 8, 64), (1, 1024, 8, 64), (1, 2048, 8, 64), (4, 512, 12, 64)]  # batch, length, heads, head_dim
MEMORY = (512, 1024, 2048, 4096)  # segment lengths, with a memory of the same length and one head
TOLERANCE = 1e-4
Runs = dict[str, Callable[[], Any]]


def relative_runs(shape: tuple[int, ...]) -> tuple[Runs, float]:
    """Return calls that compute the same, and selfattn's FLOPs for the visible pairs."""
    batch, segment, memory, heads, dim = shape
    rng = np.random.default_rng(0)
    q = rng.standard_normal((batch, heads, segment, dim), dtype=np.float32)
    k, v = rng.standard_normal((2, batch, heads, memory + segment, dim), dtype=np.float32)
    r = rng.standard_normal((heads, memory + segment, dim), dtype=np.float32)
    u, w = rng.standard_normal((2, heads, dim), dtype=np.float32)
    hidden = torch.ones(segment, memory + segment, dtype=torch.bool).triu(1 + memory)
    operands = [torch.from_numpy(np.ascontiguousarray(x)) for x in (q, k, v, r[:, ::-1], u, w)]
    swapped = [x.permute(2, 0, 1, 3).contiguous() for x in operands[:3]]
    swapped += [operands[3].transpose(0, 1).contiguous(), *operands[4:]]
    runs: Runs = {
        "selfattn": lambda: sa.relative_attention(q, k, v, r, u, w, mem_len=memory),
        "heads first": lambda: peer.heads_first(operands, hidden, dim**-0.5),
        "tokens first": lambda: peer.tokens_first(swapped, hidden, dim**-0.5),
    }
    found = runs["selfattn"]()
    compare(found, runs["heads first"]().numpy())
    compare(found, runs["tokens first"]().permute(1, 2, 0, 3).numpy())
    return runs, 6.0 * batch * heads * dim * (segment * memory + segment * (segment + 1) / 2)


def t5_runs(shape: tuple[int, ...]) -> tuple[Runs, float]:
    """Return calls that compute the same: PyTorch with a precomputed bias, and including its computation."""
    batch, length, heads, dim = shape
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, batch, heads, length, dim), dtype=np.float32) / dim**0.25
    table = rng.standard_normal((32, heads), dtype=np.float32)
    t5 = sa.T5Bias(table)
    operands = [torch.from_numpy(x) for x in (q, k, v)]
    learned = torch.from_numpy(table)
    bias = peer.materialised(learned, length).contiguous()  # fastest for SDPA, though models do not do this
    runs: Runs = {
        "selfattn": lambda: sa.attention(q, k, v, t5=t5, scale=1.0),
        "SDPA, bias precomputed": lambda: peer.biased(operands, bias),
        "SDPA, bias computed": lambda: peer.biased(operands, peer.materialised(learned, length)),
    }
    compare(runs["selfattn"](), runs["SDPA, bias precomputed"]().numpy())
    return runs, 4.0 * batch * heads * dim * length * length


def compare(found: Any, other: Any) -> None:
    """Exit the program if two results differ."""
    difference = float(np.max(np.abs(found - other)))
    if difference > TOLERANCE:
        sys.exit(f"results differ by {difference:.1e}")


def table(
    title: str, shapes: list[Any], make: Callable[[Any], tuple[Runs, float]], threads: int, seconds: float
) -> None:
    """Print one table of ratios."""
    rows = []
    for shape in shapes:
        runs, flops = make(shape)
        times = interleave(runs, seconds)
        found = ratios(times, "selfattn")
        own = Quartiles.of(times["selfattn"]).median
        share = flops / own / Peaks(threads, 0.2).flops("float32")
        rows.append([str(shape), f"{own * 1e3:.2f} ms", *(f"{x.median:.2f}×" for x in found.values()), f"{share:.0%}"])
        names = list(found)
    print(f"\n{title}, {threads} thread{'s' * (threads > 1)}, times PyTorch:\n")
    for row in (["shape", "selfattn", *names, "of the FMA peak"], ["---"] * (len(names) + 3), *rows):
        print("| " + " | ".join(row) + " |")


def growth(which: str, segment: int) -> int:
    """Return how many bytes a call adds to this process's peak memory; one head, memory as long as the segment."""
    with torch.inference_mode():
        runs, _ = relative_runs((1, 16, 16, 1, 64))
        runs[which]()
        rng = np.random.default_rng(0)
        q, k, r = (rng.standard_normal((1, 1, n, 64), dtype=np.float32) for n in (segment, 2 * segment, 2 * segment))
        u = np.zeros((1, 64), np.float32)
        operands = [torch.from_numpy(x) for x in (q, k, k, r[0], u, u)]
        hidden = torch.ones(segment, 2 * segment, dtype=torch.bool).triu(1 + segment)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak
        before = resident_bytes("VmRSS")
        if which == "selfattn":
            sa.relative_attention(q, k, k, r[0], u, u, mem_len=segment)
        else:
            peer.heads_first(operands, hidden, 0.125)
        return max(0, resident_bytes("VmHWM") - before)


def memory_table() -> None:
    """Print how memory grows with length; each case runs in its own process."""
    print("\nMemory of one call, one head of 64, memory as long as the segment:\n")
    print("| segment | selfattn | PyTorch |\n| --- | --- | --- |")
    for segment in MEMORY:
        found = []
        for which in ("selfattn", "heads first"):
            command = [sys.executable, __file__, "--growth", json.dumps([which, segment])]
            found.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        print(f"| {segment} | " + " | ".join(f"{size / 2**20:.1f} MiB" for size in found) + " |")


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, sa.get_num_threads()])
    parser.add_argument("--seconds", type=float, default=2.0, help="time per shape (default 2)")
    parser.add_argument("--growth", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.growth:
        print(growth(*json.loads(args.growth)))
        return 0
    for threads in sorted(set(args.threads)):
        torch.set_num_threads(threads)
        sa.set_num_threads(threads)
        with torch.inference_mode():
            table(
                "Relative attention (batch, segment, memory, heads, dim)",
                RELATIVE,
                relative_runs,
                threads,
                args.seconds,
            )
            table("T5's bias (batch, length, heads, dim)", T5, t5_runs, threads, args.seconds)
    memory_table()
    return 0


if __name__ == "__main__":
    sys.exit(main())
