"""The program in docs/distributed.md runs as written."""

from __future__ import annotations

import re
from pathlib import Path

import mpi_run
from places import ROOT


def test_program_runs_as_written(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "distributed.md").read_text(encoding="utf8")
    (program,) = re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S)
    file = tmp_path / "program.py"
    # In one write, so that ranks do not print into each other's lines.
    file.write_text(program + "import sys; sys.stdout.write(f'{out.shape}\\n')\n", encoding="utf8")
    done = mpi_run.run(3, "-m", "mpi4py", str(file), folder=tmp_path)
    assert done.code == 0, done.text
    assert done.text.splitlines() == ["(1, 8, 1, 64)"] * 3


def test_generation_over_ranks_is_that_of_one_rank(tmp_path: Path) -> None:
    program = str(ROOT / "examples" / "generate_ranks.py")
    done = mpi_run.run(3, "-m", "mpi4py", program, "--tokens", "30", folder=tmp_path)
    assert done.code == 0, done.text
    assert "\nthe same tokens as on one rank" in done.text
    held = [int(n) for n in re.search(r"caches: \[(.*)\]", done.text)[1].split(",")]
    assert max(held) - min(held) <= 16
