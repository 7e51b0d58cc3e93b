"""The runner of mutants must not pass without running any."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
from places import TESTS


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("tomllib")  # new in Python 3.11
    monkeypatch.syspath_prepend(TESTS / "mutants")
    return importlib.import_module("run")


def test_a_run_without_mutants_fails(runner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    skipped = next(mutant.name for mutant in runner.load() if mutant.matrix)
    monkeypatch.setattr(sys, "argv", ["run.py", "--only", skipped])
    monkeypatch.setattr(runner, "has_matrix_unit", lambda: False)
    with pytest.raises(SystemExit, match="no mutant was run"):
        runner.main()


def test_changes_without_mutants_get_the_sample(runner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "--changed", "HEAD", "--sample", "3"])
    mutants, arguments = runner.load(), runner.parse()
    monkeypatch.setattr(runner, "changed_folders", lambda revision: {Path("docs")})
    assert len(runner.choose(mutants, arguments)) == 3
    monkeypatch.setattr(runner, "changed_folders", lambda revision: {Path("csrc/kernels")})
    assert len(runner.choose(mutants, arguments)) == sum(m.file.startswith("csrc/kernels/") for m in mutants)
