"""The program that tests run on several ranks: calls the functions of a file, and prints what they return as JSON.

Each function is collective and gets a Group. An exception on any rank is the function's result.
"""

from __future__ import annotations

import faulthandler
import importlib.util
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

faulthandler.dump_traceback_later(float(os.environ["RANK_SECONDS"]), exit=True)  # a watchdog: no rank hangs

from mpi4py import MPI  # noqa: E402

from selfattn.distributed import Group  # noqa: E402


def outcome(check: Callable[[Group], Any], group: Group) -> Any:
    """Return what a check returned on rank 0, or the errors of all ranks."""
    result, error = None, ""
    try:
        result = check(group)
    except Exception:
        error = f"rank {group.rank}: {traceback.format_exc()}"
    errors = list(filter(None, MPI.COMM_WORLD.allgather(error)))
    return {"errors": errors} if errors else {"result": result}


def main(file: str) -> None:
    specification = importlib.util.spec_from_file_location("checks", file)
    assert specification is not None
    assert specification.loader is not None
    sys.path.insert(0, str(Path(file).parent))
    checks = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(checks)
    group = Group(MPI.COMM_WORLD, timeout=float(os.environ["RANK_SECONDS"]))
    found = {}
    for name, check in vars(checks).items():
        if name.startswith("check_"):
            found[name] = outcome(check, group)
    group.close()
    if MPI.COMM_WORLD.rank == 0:
        print("RESULTS" + json.dumps(found))


main(*sys.argv[1:])
