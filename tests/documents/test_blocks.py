"""Blocks of code on pages: each page's Python runs unchanged, as one program. Commands have a test of their own."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from pages import DOCS, PAGES, blocks, name, program
from places import ROOT

LANGUAGES = {"python", "bash", "text", "dockerfile"}
ELSEWHERE = {"docs/distributed.md"}  # a program for several ranks: tests/distributed/test_document.py
SECONDS = 240


def run(code: str, where: str, folder: Path) -> str:
    """Run a program in a process of its own; skip the test if it imports something that is not installed."""
    names = [ast.unparse(node) for node in ast.walk(ast.parse(code)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    modules = {text.split()[1].split(".")[0] for text in names}
    if "selfattn.viz" in code or "from selfattn import viz" in code:
        modules.add("matplotlib")
    for module in sorted(modules):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    (folder / "page.py").write_text(code, encoding="utf8")
    command = [sys.executable, str(folder / "page.py")]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, f"{where}\n{done.stderr}"
    return done.stdout


WITH_PYTHON = [
    file for file in PAGES if name(file) not in ELSEWHERE and program(file.read_text(encoding="utf8")).strip()
]


@pytest.mark.parametrize("file", WITH_PYTHON, ids=name)
def test_python_runs_as_written(file: Path, tmp_path: Path) -> None:
    run(program(file.read_text(encoding="utf8")), name(file), tmp_path)


@pytest.mark.parametrize("file", PAGES, ids=name)
def test_languages_are_named(file: Path) -> None:
    assert {block.language for block in blocks(file.read_text(encoding="utf8"))} <= LANGUAGES


def test_lines_keep_their_numbers() -> None:
    text = "# Title\n\n```python\nx = 1\n```\n\n```text\nno\n```\n```python\ny = 2\n\nz = 3\n```\n"
    assert program(text).splitlines()[3] == "x = 1"
    assert program(text).splitlines()[10:13] == ["y = 2", "", "z = 3"]
    assert "no" not in program(text)


@pytest.mark.parametrize("file", sorted(DOCS.rglob("*.ipynb")), ids=name)
def test_notebooks_print_what_they_show(file: Path, tmp_path: Path) -> None:
    cells = [cell for cell in json.loads(file.read_text(encoding="utf8"))["cells"] if cell["cell_type"] == "code"]
    shown = [
        "".join(output["text"]) for cell in cells for output in cell["outputs"] if output["output_type"] == "stream"
    ]
    code = "\n\n".join("".join(cell["source"]) for cell in cells)
    assert run(code, file.relative_to(ROOT).as_posix(), tmp_path) == "".join(shown)
