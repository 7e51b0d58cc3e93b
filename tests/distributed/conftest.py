"""Each file of checks runs once for each number of ranks; its tests look at what it found."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mpi_run
import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Return a function that returns what a check returned on rank 0; its errors fail the test."""
    found: dict[tuple[str, int], Any] = {}

    def results(name: str, size: int) -> Any:
        if (name, size) not in found:
            found[name, size] = "the program failed before"
            command = ("-m", "mpi4py", str(mpi_run.PROGRAM), str(HERE / f"{name}.py"))
            done = mpi_run.run(size, *command, folder=tmp_path_factory.mktemp("ranks"))
            printed = re.search(r"^RESULTS(.*)$", done.text, flags=re.M)
            found[name, size] = json.loads(printed[1]) if printed and done.code == 0 else done.text
        return found[name, size]

    def check(name: str, check: str, size: int) -> Any:
        mpi_run.mpiexec()
        all_found = results(name, size)
        assert isinstance(all_found, dict), all_found
        outcome = all_found[f"check_{check}"]
        assert "errors" not in outcome, "\n".join(outcome["errors"])
        return outcome["result"]

    return check
