"""The program in docs/distributed.md runs as written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import ranks
from places import ROOT


@pytest.mark.parametrize("size", [1, 3])
def test_program_runs_as_written(tmp_path: Path, size: int) -> None:
    text = (ROOT / "docs" / "distributed.md").read_text(encoding="utf8")
    (program,) = re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S)
    file = tmp_path / "program.py"
    file.write_text(program + "print(out.shape)\n", encoding="utf8")
    done = ranks.run(size, "-m", "mpi4py", str(file), folder=tmp_path)
    assert done.code == 0, done.text
    assert done.text.splitlines() == ["(1, 8, 1, 64)"] * size
