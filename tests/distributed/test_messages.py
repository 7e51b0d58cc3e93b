"""Ranks whose messages another transport than MPI carries. docs/distributed.md runs Dask workers and Ray actors."""

from __future__ import annotations

from typing import Any

import pytest

# Ranks are threads. Messages come late and overtake one another.
THREADS = """
    import random, threading
    import mpi4py
    mpi4py.rc.initialize = False
    import numpy as np
    import selfattn as sa
    from selfattn.distributed import Group, MessageComm, _travel

    _travel.CHUNK_BYTES = 1
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 4, 1100, 16), dtype=np.float32)
    found, comms = {}, []

    def late(rank, message):
        threading.Timer(random.random() / 100, comms[rank].receive, [message]).start()

    def run(comm):
        group, other = Group(comm, num_threads=1, timeout=50), Group(comm, num_threads=1, timeout=50)
        rows = group.rows(1100)
        arrays = [x[:, rows] for x in (q, k, v)]
        out = group.attention(*arrays, rows=rows, causal=True)
        by_heads = other.attention(*arrays, rows=rows, causal=True, by="heads")
        try:
            group.attention(*arrays, rows=rows, causal=comm.rank == 1)
            error = None
        except ValueError as raised:
            error = str(raised)
        other.close()
        found[comm.rank] = rows, out, by_heads, error

    comms += [MessageComm(rank, 3, late, machine=str(rank // 2)) for rank in range(3)]
    threads = [threading.Thread(target=run, args=[comm]) for comm in comms]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    out, by_heads = np.empty_like(q), np.empty_like(q)
    for rows, part, other, error in found.values():
        out[:, rows], by_heads[:, rows] = part, other
        assert error == "Group.attention: causal is True on rank 1 but not given on rank 0", error
    state = sa.AttentionState(q, kv_len=1100, causal=True)
    state.absorb(k, v)
    print(np.array_equal(out, state.result()[0]), np.array_equal(by_heads, sa.attention(q, k, v, causal=True)))
    print([key for comm in comms for key in comm._box])
"""


def test_threads(run_python: Any) -> None:
    pytest.importorskip("mpi4py")
    assert run_python(THREADS) == "True True\n[]\n"


def test_errors(run_python: Any) -> None:
    pytest.importorskip("mpi4py")
    code = """
        from selfattn.distributed import MessageComm
        for rank, size in ((2, 2), (0, 0), (-1, 3)):
            try:
                MessageComm(rank, size, print)
            except ValueError as error:
                print(error)
    """
    assert run_python(code).splitlines() == [
        "MessageComm: rank is 2, but it must be in 0..1",
        "MessageComm: size is 0, but it must be at least 1",
        "MessageComm: rank is -1, but it must be in 0..2",
    ]
