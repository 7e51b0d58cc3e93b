"""Loads the core so that its idle threads soon sleep.

GCC's OpenMP runtime lets threads that wait for the next parallel region spin for some 5 ms. NumPy's matrix products
do the same with threads of their own, and two threads that spin on one core take turns in slices of milliseconds: an
attention call behind ``X @ W`` took many times as long as alone (`benchmarks/neighbours.py`). A thread that sleeps
gets the core at once. The runtime reads its settings from the environment while it is being loaded, and only then; who
sets one is heard.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

_SPIN = "GOMP_SPINCOUNT"
_TURNS = "600"  # some 10 microseconds: a call that follows at once finds the team awake


def _missing_core() -> str:
    """Return what to do if there is no compiled core for this Python."""
    folder = Path(__file__).resolve().parent
    if not (folder.parent / "csrc").is_dir():
        version = ".".join(map(str, sys.version_info[:2]))
        return f"selfattn: {folder} has no compiled core for Python {version}: install selfattn again"
    return (
        f"selfattn: Python found the source code in {folder}, which has no compiled core, instead of the installed "
        "package: `python`, `python -c` and `python -m` look in the current folder first. Start Python in another "
        "folder, or run commands and scripts: `.venv/bin/selfattn info`, `.venv/bin/python examples/norway.py`. "
        "If selfattn is not installed yet: pip install ."
    )


_own_setting = _SPIN in os.environ or "OMP_WAIT_POLICY" in os.environ
if not _own_setting:
    os.environ[_SPIN] = _TURNS
try:
    from . import _core as _core
except ImportError as error:
    if error.name != __package__:  # it is there, but does not load
        raise
    raise ImportError(_missing_core()) from None
finally:
    if not _own_setting:
        del os.environ[_SPIN]
