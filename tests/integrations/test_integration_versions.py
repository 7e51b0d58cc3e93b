"""Versions of other libraries that integrations need: reported if missing, equal to those in pyproject.toml."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
from places import ROOT

versions = import_module("selfattn.integrations._versions")

PYPROJECT = ROOT / "pyproject.toml"


def version(library: str, text: str) -> ModuleType:
    module = ModuleType(library)
    module.__version__ = text
    return module


@pytest.mark.parametrize("library", ["torch", "transformers", "jax"])
def test_bounds_are_those_of_the_project(library: str) -> None:
    bounds = set(re.findall(rf'"{library}>=([\d.]+)"', PYPROJECT.read_text(encoding="utf8")))
    assert bounds == {".".join(map(str, versions._LOWEST[library]))}


@pytest.mark.parametrize(
    ("library", "old"), [("torch", "2.4.1+cpu"), ("torch", "1.13.1"), ("transformers", "4.57.6"), ("jax", "0.5.3")]
)
def test_older_versions_are_refused(library: str, old: str) -> None:
    with pytest.raises(ImportError, match=rf"^selfattn: {library} is {re.escape(old)}, but [\d.]+ or newer is needed"):
        versions.check_version(version(library, old))


@pytest.mark.parametrize(
    ("library", "new"), [("torch", "2.5.0+cpu"), ("torch", "3.0.0"), ("transformers", "5.100.0"), ("jax", "0.6.0")]
)
def test_newer_versions_pass(library: str, new: str) -> None:
    versions.check_version(version(library, new))


def test_import_with_an_old_transformers_says_what_is_needed(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    (tmp_path / "transformers.py").write_text("__version__ = '5.14.1'")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import selfattn.integrations.transformers"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert found.stderr.splitlines()[-1] == (
        'ImportError: selfattn: transformers is 5.14.1, but 5.15 or newer is needed: pip install "transformers>=5.15"'
    )
