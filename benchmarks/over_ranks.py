"""Attention over MPI ranks: the time of the slowest rank. Run it with different numbers of ranks and compare.

mpiexec -n 2 python -m mpi4py benchmarks/over_ranks.py --threads 1
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from mpi4py import MPI

import selfattn as sa
from selfattn.distributed import Group


def attention(group: Group, args: argparse.Namespace) -> Callable[[], Any]:
    """Return a call of causal attention over a sequence that is spread over the ranks."""
    if args.work == "each":
        group = Group(MPI.COMM_SELF, num_threads=args.threads)
    rows = group.rows(args.length, args.order)
    rng = np.random.default_rng(group.rank)
    q = rng.standard_normal((1, args.heads, len(rows), args.head_dim), dtype=np.float32)
    k, v = rng.standard_normal((2, 1, args.kv_heads, len(rows), args.head_dim), dtype=np.float32)
    if args.work == "alone":
        return lambda: sa.attention(q, k, v, causal=True, num_threads=args.threads)
    return lambda: group.attention(q, k, v, rows=rows, causal=True, by=args.by)


def decode(group: Group, args: argparse.Namespace) -> Callable[[], Any]:
    """Return a step of decoding against `length` keys on each rank."""
    rng = np.random.default_rng(0)
    k, v = rng.standard_normal((2, 1, args.kv_heads, args.length, args.head_dim), dtype=np.float32)
    cache = sa.KVCache(1, args.kv_heads, args.head_dim, args.length + 10 * args.repeats + 10)
    cache.append(k, v)
    q = rng.standard_normal((1, args.heads, 1, args.head_dim), dtype=np.float32)
    if args.work == "decode-alone":
        threads = args.threads
        return lambda: sa.attention_with_kvcache(q, cache, k[:, :, :1], v[:, :, :1], num_threads=threads)
    return lambda: group.attention_with_kvcache(q, cache, k[:, :, :1], v[:, :, :1])


def seconds_of(call: Callable[[], Any]) -> float:
    """Return the time from when all ranks start until the last one is done."""
    MPI.COMM_WORLD.Barrier()
    start = time.perf_counter()
    call()
    return float(MPI.COMM_WORLD.allreduce(time.perf_counter() - start, MPI.MAX))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    works = ("attention", "alone", "each", "decode", "decode-alone")
    text = "alone: a rank's rows without a Group; each: every rank computes the whole sequence by itself"
    parser.add_argument("--work", choices=works, default="attention", help=text)
    parser.add_argument("--by", choices=("keys", "heads"), default="keys")
    parser.add_argument("--order", choices=("zigzag", "contiguous"), default="zigzag")
    sizes = {"length": 8192, "heads": 8, "kv-heads": 8, "head-dim": 64, "repeats": 7}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    parser.add_argument("--threads", type=int, help="of each rank (default: its share of the cores)")
    args = parser.parse_args()
    group = Group(MPI.COMM_WORLD, num_threads=args.threads)
    args.threads = group.num_threads
    call = (decode if "decode" in args.work else attention)(group, args)
    seconds_of(call)
    times = sorted(seconds_of(call) for _ in range(args.repeats))
    if group.rank == 0:
        named = f"{args.work}: {group.size} ranks with {group.num_threads} threads"
        print(f"{named}: {1e3 * times[len(times) // 2]:.2f} ms (fastest {1e3 * times[0]:.2f})")


if __name__ == "__main__":
    main()
