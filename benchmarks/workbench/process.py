"""Commands that run modules of this package, independent of the current folder."""

from __future__ import annotations

import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[1]


def command(module: str) -> tuple[str, ...]:
    """Return the command that runs a module as the main program; arguments may follow."""
    start = f"import runpy, sys; sys.path.insert(1, {str(BENCHMARKS)!r}); "
    return (sys.executable, "-c", f"{start}runpy.run_module({module!r}, run_name='__main__', alter_sys=True)")


WORKER = command("workbench.worker")
