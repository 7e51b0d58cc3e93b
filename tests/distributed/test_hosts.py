"""Several hosts, with TCP between them: right, and an error if a host disappears."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import mpi_run
import pytest
from hosts import hosts, start_on

HERE = Path(__file__).parent


@pytest.mark.parametrize("checks", ["checks_attention", "checks_backward", "checks_caches"])
def test_checks_on_three_hosts(tmp_path: Path, checks: str) -> None:
    """Keys, heads, gradients, caches and errors; each check compares with one process."""
    with hosts(3) as network:
        program = ("-m", "mpi4py", str(mpi_run.PROGRAM), str(HERE / f"{checks}.py"))
        process = start_on(network, *program, folder=tmp_path)
        done = mpi_run.finish(process)
    printed = re.search(r"^RESULTS(.*)$", done.text, flags=re.M)
    assert printed, done.text
    found = json.loads(printed[1])
    assert len(found) > 3
    assert all("errors" not in outcome for outcome in found.values()), done.text


def test_a_host_that_disappears_ends_in_an_error(tmp_path: Path) -> None:
    program = str(Path(mpi_run.__file__).with_name("rank_faults.py"))
    with hosts(2) as network:
        process = start_on(network, "-m", "mpi4py", program, "goes_on", "3", folder=tmp_path)
        assert process.stdout is not None
        assert "going on" in process.stdout.readline()
        network.unplug(2)
        start = time.monotonic()
        done = mpi_run.finish(process)
    assert done.code != 0
    assert "TimeoutError: Group.attention: rank 0 has waited 3 s" in done.text
    assert time.monotonic() - start < 60
