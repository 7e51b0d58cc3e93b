"""Starts programs on several MPI ranks, with time limits: nothing hangs when a test fails."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

SECONDS = 120
PROGRAM = Path(__file__).with_name("rank_checks.py")


class Done(NamedTuple):
    """A program that has ended."""

    code: int
    text: str


def mpiexec() -> str:
    """Return MPICH's mpiexec, or skip the test."""
    if importlib.util.find_spec("mpi4py") is None:
        pytest.skip("mpi4py is not installed")
    own = Path(sys.executable).with_name("mpiexec")
    found = str(own) if own.exists() else shutil.which("mpiexec")
    if found is None:
        pytest.skip("mpiexec is not installed: pip install mpich")
    version = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=SECONDS, check=False).stdout
    if "HYDRA" not in version:
        pytest.skip("mpiexec is not MPICH's, which runs as root and with more ranks than cores")
    return found


def start(size: int, *arguments: str, folder: Path, seconds: int = SECONDS) -> subprocess.Popen[str]:
    """Start Python with these arguments on `size` ranks."""
    settings = {"RANK_SECONDS": str(seconds), "OMP_NUM_THREADS": "2"}
    return spawn([mpiexec(), "-n", str(size), sys.executable, *arguments], folder, settings)


def spawn(command: Sequence[str], folder: Path, settings: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Start a command in a process group of its own."""
    return subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, **(settings or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], seconds: int = SECONDS) -> Done:
    """Wait until a program has ended; it is killed after the time limit."""
    try:
        text, _ = process.communicate(timeout=seconds + 10)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)  # mpiexec ends its ranks
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        text, _ = process.communicate(timeout=5)
        pytest.fail(f"not done after {seconds} s:\n{text}")
    return Done(process.returncode, text)


def run(size: int, *arguments: str, folder: Path, seconds: int = SECONDS) -> Done:
    """Run Python with these arguments on `size` ranks."""
    return finish(start(size, *arguments, folder=folder, seconds=seconds), seconds)
