"""Commands that run modules of this package, independent of the current folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from selfattn._bench.worker import THREAD_LIMITS

BENCHMARKS = Path(__file__).resolve().parents[1]


def command(module: str) -> tuple[str, ...]:
    """Return the command that runs a module as the main program; arguments may follow."""
    start = f"import runpy, sys; sys.path.insert(1, {str(BENCHMARKS)!r}); "
    return (sys.executable, "-c", f"{start}runpy.run_module({module!r}, run_name='__main__', alter_sys=True)")


def answer_of(module: str, threads: int, *options: str) -> Any | None:
    """Run a module in a new process whose thread pools all have `threads` threads; return what it answers, or None.

    The module gets the options, `--threads`, and `--answer` with the name of the file that it must write.
    """
    environment = {**os.environ, **dict.fromkeys(THREAD_LIMITS, str(threads))}
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "rows.json"
        whole = [*command(module), "--answer", str(answer), "--threads", str(threads), *options]
        if subprocess.run(whole, cwd=folder, env=environment, check=False).returncode:
            return None
        return json.loads(answer.read_text(encoding="utf-8"))


WORKER = command("workbench.worker")
