"""Attention over Dask workers: their connections carry the messages of a Group. MPI is not started.

python examples/dask_ranks.py
python examples/dask_ranks.py --scheduler tcp://10.0.0.1:8786
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import mpi4py
import numpy as np

mpi4py.rc.initialize = False

from distributed import Client, get_worker  # noqa: E402

import selfattn as sa  # noqa: E402
from selfattn.distributed import Group, MessageComm  # noqa: E402


def connect(addresses: list[str], dask_worker: Any) -> None:
    """Make a worker a rank. This runs on all workers before any of them sends."""

    def send(target: int, message: Any) -> None:
        dask_worker.loop.add_callback(carry, addresses[target], tuple(message))

    async def carry(address: str, message: Any) -> None:
        await dask_worker.rpc(address).attention_message(message=message)

    comm = MessageComm(addresses.index(dask_worker.address), len(addresses), send)
    dask_worker.handlers["attention_message"] = lambda message: comm.receive(message)
    dask_worker.attention_comm = comm


def work(length: int) -> tuple[Any, Any]:
    """Compute this rank's part of attention over a sequence of `length` tokens."""
    group = Group(get_worker().attention_comm, timeout=60)
    rows = group.rows(length)
    q, k, v = (x[:, rows] for x in operands(length))
    return rows, group.attention(q, k, v, rows=rows, causal=True)


def operands(length: int) -> Any:
    """Return q, k and v of all tokens."""
    return np.random.default_rng(0).standard_normal((3, 8, length, 64), dtype=np.float32)


def main() -> int:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--scheduler", help="of a running cluster (default: workers on this machine)")
    parser.add_argument("--ranks", type=int, default=2, help="workers on this machine (default: 2)")
    parser.add_argument("--tokens", type=int, default=3000, help="default: 3000")
    args = parser.parse_args()
    local = {"n_workers": args.ranks, "threads_per_worker": 1, "dashboard_address": None}
    with Client(args.scheduler) if args.scheduler else Client(**local) as client:
        addresses = sorted(client.scheduler_info(n_workers=-1)["workers"])
        client.run(connect, addresses)
        # All ranks must compute at the same time: one task for each worker.
        parts = [client.submit(work, args.tokens, workers=[address], pure=False) for address in addresses]
        out = np.empty((8, args.tokens, 64), np.float32)
        for rows, part in client.gather(parts):
            out[:, rows] = part
    q, k, v = operands(args.tokens)
    state = sa.AttentionState(q, kv_len=args.tokens, causal=True)
    state.absorb(k, v)
    same = np.array_equal(out, state.result()[0])
    print(f"{len(addresses)} ranks; the same bits as in one process: {same}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
