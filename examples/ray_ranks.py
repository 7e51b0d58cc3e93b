"""Attention over Ray actors: calls of their methods carry the messages of a Group. MPI is not started.

python examples/ray_ranks.py
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import mpi4py
import numpy as np

mpi4py.rc.initialize = False

import ray  # noqa: E402

import selfattn as sa  # noqa: E402
from selfattn.distributed import Group, MessageComm  # noqa: E402


@ray.remote(max_concurrency=8)  # messages come while a rank computes
class Rank:
    """One rank."""

    def connect(self, rank: int, ranks: list[Any]) -> None:
        """Learn of the other ranks. All ranks do this before any of them sends."""

        def send(target: int, message: Any) -> None:
            ranks[target].receive.remote(tuple(message))

        self.comm = MessageComm(rank, len(ranks), send)

    def receive(self, message: Any) -> None:
        """Take a message."""
        self.comm.receive(message)

    def work(self, length: int) -> tuple[Any, Any]:
        """Compute this rank's part of attention over a sequence of `length` tokens."""
        group = Group(self.comm, timeout=60)
        rows = group.rows(length)
        q, k, v = (x[:, rows] for x in operands(length))
        return rows, group.attention(q, k, v, rows=rows, causal=True)


def operands(length: int) -> Any:
    """Return q, k and v of all tokens."""
    return np.random.default_rng(0).standard_normal((3, 8, length, 64), dtype=np.float32)


def main() -> int:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--address", help="of a running cluster (default: processes of this machine)")
    parser.add_argument("--ranks", type=int, default=2, help="default: 2")
    parser.add_argument("--tokens", type=int, default=3000, help="default: 3000")
    args = parser.parse_args()
    ray.init(args.address, include_dashboard=False, log_to_driver=False)
    ranks = [Rank.remote() for _ in range(args.ranks)]
    ray.get([rank.connect.remote(i, ranks) for i, rank in enumerate(ranks)])
    out = np.empty((8, args.tokens, 64), np.float32)
    for rows, part in ray.get([rank.work.remote(args.tokens) for rank in ranks]):
        out[:, rows] = part
    ray.shutdown()
    q, k, v = operands(args.tokens)
    state = sa.AttentionState(q, kv_len=args.tokens, causal=True)
    state.absorb(k, v)
    same = np.array_equal(out, state.result()[0])
    print(f"{args.ranks} ranks; the same bits as in one process: {same}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
