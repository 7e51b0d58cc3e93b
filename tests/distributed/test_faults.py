"""Ranks that raise, die or wait: nothing hangs, and waiting costs no time of the CPU. Imports without MPI."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path
from typing import Any

import mpi_run
import pytest

PROGRAM = str(Path(mpi_run.__file__).with_name("rank_faults.py"))


def test_a_rank_that_raises_ends_all_ranks(tmp_path: Path) -> None:
    start = time.monotonic()
    done = mpi_run.run(3, "-m", "mpi4py", PROGRAM, "raises", "50", folder=tmp_path)
    assert done.code != 0
    assert "KeyError: 'not this rank'" in done.text
    assert time.monotonic() - start < 60


def test_a_rank_that_raises_in_flight(tmp_path: Path) -> None:
    """The others meet their time limit; a new group works."""
    done = mpi_run.run(2, PROGRAM, "raises_in_flight", "2", folder=tmp_path)
    assert "rank 1: MemoryError: no memory for this piece" in done.text
    assert "rank 0: TimeoutError: Group.attention: rank 0 has waited 2 s for the others (timeout=2)" in done.text
    for rank in (0, 1):
        assert f"rank {rank} again: Group.attention: an earlier call failed while messages travelled" in done.text
        assert f"rank {rank} anew: 1" in done.text


def test_a_rank_that_dies_in_flight(tmp_path: Path) -> None:
    start = time.monotonic()
    done = mpi_run.run(3, PROGRAM, "dies_in_flight", "50", folder=tmp_path)
    assert done.code != 0
    assert time.monotonic() - start < 60


def test_ranks_that_wait_sleep(tmp_path: Path) -> None:
    done = mpi_run.run(3, PROGRAM, "absent", "50", folder=tmp_path)
    assert done.code == 0, done.text
    found = [(float(a), float(b)) for a, b in re.findall(r"used ([\d.]+) of ([\d.]+) s", done.text)]
    assert len(found) == 2
    for used, waited in found:
        assert waited > 1
        assert used < 0.2 * waited


def test_ctrl_c_ends_all_ranks(tmp_path: Path) -> None:
    process = mpi_run.start(3, PROGRAM, "waits", "50", folder=tmp_path)
    assert process.stdout is not None
    assert "waiting" in process.stdout.readline()
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert mpi_run.finish(process).code != 0
    assert time.monotonic() - start < 60


def test_nothing_of_mpi_is_imported_with_selfattn(run_python: Any) -> None:
    assert run_python("import sys, selfattn; print('mpi4py' in sys.modules)") == "False\n"


def test_without_mpi4py_the_error_names_the_extra(run_python: Any) -> None:
    code = """
        import sys
        sys.modules["mpi4py"] = None
        import selfattn.distributed
    """
    text = run_python(code, expected_exit=1)
    assert "ImportError: selfattn.distributed needs mpi4py: pip install 'selfattn[mpi]'" in text


def test_an_old_mpi4py_is_refused(run_python: Any) -> None:
    pytest.importorskip("mpi4py")
    code = "import mpi4py; mpi4py.__version__ = '3.1.6'; import selfattn.distributed"
    assert 'mpi4py is 3.1.6, but 4.1 or newer is needed: pip install "mpi4py>=4.1"' in run_python(code, expected_exit=1)
