"""Programs on several hosts of this machine, see benchmarks/emulated_hosts.py."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import mpi_run
import pytest

from emulated_hosts import Hosts, why_not


@contextmanager
def hosts(count: int) -> Iterator[Hosts]:
    """Make hosts, or skip the test if this is not allowed."""
    if reason := why_not():
        pytest.skip(reason)
    with ExitStack() as stack:
        try:
            network = stack.enter_context(Hosts(count))
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"cannot make hosts: {getattr(error, 'stderr', None) or error}")
        yield network


def start_on(network: Hosts, *arguments: str, folder: Path, seconds: int = mpi_run.SECONDS) -> subprocess.Popen[str]:
    """Start Python with these arguments on one rank per host."""
    settings = {"RANK_SECONDS": str(seconds), "OMP_NUM_THREADS": "1"}
    command = network.mpiexec(mpi_run.mpiexec(), folder, settings)
    return mpi_run.spawn([*command, sys.executable, *arguments], folder)
