"""Loads the core with settings that send its idle threads to sleep early.

In GCC's OpenMP runtime, threads that wait for the next parallel region spin for about 5 ms. NumPy's matrix products
have their own threads, which spin as well. Two threads that spin on the same CPU core alternate in time slices of
milliseconds: an attention call right after ``X @ W`` took many times as long as it does alone
(`benchmarks/neighbours.py`). A sleeping thread leaves the core to others immediately. The runtime reads its settings
from the environment only while it is being loaded. A user's own setting takes precedence.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

_SPIN = "GOMP_SPINCOUNT"
_SPIN_COUNT = "600"  # 10 to 30 microseconds: an immediately following call finds the team awake


def _missing_core() -> str:
    """Return the error message for a missing compiled core, which says what to do."""
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
    os.environ[_SPIN] = _SPIN_COUNT
try:
    from . import _core as _core
except ImportError as error:
    if error.name != __package__:  # the core exists, but does not load
        raise
    raise ImportError(_missing_core()) from None
finally:
    if not _own_setting:
        del os.environ[_SPIN]
