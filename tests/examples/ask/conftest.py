"""Fixtures of the tests of examples/ask.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ask_index import NOTES, build
from places import ROOT


@pytest.fixture(scope="module")
def ask(load_example: Any) -> Any:
    return load_example("ask")


@pytest.fixture(scope="module")
def passages(load_example: Any) -> Any:
    return load_example("passages")


@pytest.fixture(scope="module")
def indexing(load_example: Any) -> Any:
    return load_example("passage_index")


@pytest.fixture(scope="module")
def model(load_example: Any) -> Any:
    return load_example("minilm").MiniLM()


@pytest.fixture(scope="module")
def docs(passages: Any, indexing: Any, model: Any) -> Any:
    """Return the index of the project's own pages."""
    files = passages.find_files([ROOT / "README.md", ROOT / "docs"])
    return build(indexing, model, {str(file): file.read_bytes() for file in files})


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    folder = tmp_path / "notes"
    for name, text in NOTES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def run(ask: Any, model: Any, monkeypatch: Any, capsys: Any) -> Callable[..., tuple[int, str, str]]:
    """Run the program in this process: exit code, standard output and standard error."""
    monkeypatch.setattr(ask, "MiniLM", lambda: model)

    def start(*arguments: Any) -> tuple[int, str, str]:
        code = ask.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return start
