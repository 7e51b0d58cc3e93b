"""The program in docs/distributed.md runs as written."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import mpi_run
from places import ROOT

import rank_model

TEXT = (ROOT / "docs" / "distributed.md").read_text(encoding="utf8")
# As srun, but all ranks are on this machine.
SRUN = """#!/bin/sh
while [ "${1#-}" != "$1" ]; do shift; done
exec MPIEXEC -n 2 --bind-to numa "$@"
"""


def write_program(folder: Path) -> Path:
    (program,) = re.findall(r"^```python\n(.*?)^```", TEXT, flags=re.M | re.S)
    file = folder / "program.py"
    # In one write, so that ranks do not print into each other's lines.
    file.write_text(program + "import sys; sys.stdout.write(f'{out.shape}\\n')\n", encoding="utf8")
    return file


def test_program_runs_as_written(tmp_path: Path) -> None:
    done = mpi_run.run(3, "-m", "mpi4py", str(write_program(tmp_path)), folder=tmp_path)
    assert done.code == 0, done.text
    assert done.text.splitlines() == ["(1, 8, 1, 64)"] * 3


def test_script_for_slurm(tmp_path: Path) -> None:
    write_program(tmp_path)
    (script,) = re.findall(r"^```bash\n(#!/bin/bash\n.*?)^```", TEXT, flags=re.M | re.S)
    for name, text in (("program.sh", script), ("srun", SRUN.replace("MPIEXEC", mpi_run.mpiexec()))):
        (tmp_path / name).write_text(text, encoding="utf8")
        (tmp_path / name).chmod(0o755)
    subprocess.run(["bash", "-n", "program.sh"], cwd=tmp_path, check=True)
    python = Path(sys.executable).parent
    settings = {"PATH": os.pathsep.join(map(str, (tmp_path, python, os.environ["PATH"])))}
    done = mpi_run.finish(mpi_run.spawn(["./program.sh"], tmp_path, settings))
    assert done.code == 0, done.text
    assert done.text.splitlines() == ["(1, 8, 1, 64)"] * 2


def test_tables_are_those_of_the_model() -> None:
    for table in rank_model.tables(rank_model.Work(0), 1e12, 1e-5):
        assert f"\n\n{table}\n\n" in TEXT


def test_generation_over_ranks_is_that_of_one_rank(tmp_path: Path) -> None:
    program = str(ROOT / "examples" / "generate_ranks.py")
    done = mpi_run.run(3, "-m", "mpi4py", program, "--tokens", "30", folder=tmp_path)
    assert done.code == 0, done.text
    assert "\nthe same tokens as on one rank" in done.text
    held = [int(n) for n in re.search(r"caches: \[(.*)\]", done.text)[1].split(",")]
    assert max(held) - min(held) <= 16
