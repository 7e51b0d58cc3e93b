"""The default number of threads: the ranks of one machine share its cores."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import mpi_run
import pytest

# Ranks are simulated: the cores of each rank, its machine, and the threads that one process would use.
SHARES = """
    import os
    import mpi4py
    mpi4py.rc.initialize = False
    from selfattn.distributed import _group

    class Ranks:
        def __init__(self, rank, cores, machines):
            self.rank, self.cores, self.machines = rank, cores, machines

        def exchange(self, function, mine):
            assert mine == self.cores[self.rank]
            return self.cores

    def shares(cores, machines, threads):
        found = []
        for rank, own in enumerate(cores):
            os.sched_getaffinity = lambda pid, own=own: set(own)
            _group.get_num_threads = lambda rank=rank: threads[rank]
            found.append(_group._share_of_cores(Ranks(rank, cores, machines)))
        print(found)

    four = [0, 1, 2, 3]
    shares([four], [0], [4])
    shares([four, four], [0, 0], [4, 4])
    shares([four, four, four], [0, 0, 2], [4, 4, 4])  # the last one on another machine
    shares([[0, 1], [0, 1], [0, 1]], [0, 0, 0], [2, 2, 2])  # more ranks than cores
    shares([[0], [1]], [0, 0], [1, 1])  # --bind-to core
    shares([[0, 1], [2, 3]], [0, 0], [2, 2])  # --bind-to numa
    shares([four, [0, 1]], [0, 0], [4, 2])
    shares([four, four], [0, 0], [2, 3])  # OMP_NUM_THREADS or a quota
    del os.sched_getaffinity
    os.cpu_count = lambda: 4
    _group.get_num_threads = lambda: 4
    print(_group._share_of_cores(Ranks(1, [four, four], [0, 0])))
"""
PROGRAM = """
import os, sys
from mpi4py import MPI
import selfattn as sa
from selfattn.distributed import Group
group = Group(MPI.COMM_WORLD, timeout=60)
sys.stdout.write(f"{group.num_threads} {sa.get_num_threads()} {sorted(os.sched_getaffinity(0))}\\n".replace(", ", ","))
"""


def test_shares(run_python: Any) -> None:
    pytest.importorskip("mpi4py")
    found = run_python(SHARES).splitlines()
    assert found == ["[4]", "[2, 2]", "[2, 2, 4]", "[1, 1, 1]", "[1, 1]", "[2, 2]", "[3, 1]", "[1, 1]", "2"]


@pytest.mark.parametrize("binding", [[], ["--bind-to", "core"]])
def test_ranks_share_cores(tmp_path: Path, binding: list[str]) -> None:
    ranks, cores = 2, len(os.sched_getaffinity(0))
    if cores < ranks:
        pytest.skip("the ranks need a core each")
    (tmp_path / "program.py").write_text(PROGRAM, encoding="utf8")
    command = ["env", "-u", "OMP_NUM_THREADS", mpi_run.mpiexec(), *binding, "-n", str(ranks)]
    done = mpi_run.finish(mpi_run.spawn([*command, sys.executable, "-m", "mpi4py", "program.py"], tmp_path))
    assert done.code == 0, done.text
    found = [line.split() for line in done.text.splitlines()]
    assert len(found) == ranks, done.text
    shared = 1 if binding else ranks
    for threads, alone, _ in found:
        assert int(threads) == max(int(alone) // shared, 1), done.text
    assert len({own for _, _, own in found}) == (ranks if binding else 1), done.text
