"""The reference: every public name is on a page, has an example, and its examples give what they show."""

from __future__ import annotations

import ast
import doctest
import importlib
import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pages import DOCS
from places import ROOT

import selfattn

# The modules with public names, and the packages that they need.
PUBLIC = {
    "selfattn": (),
    "selfattn.compat": (),
    "selfattn.masks": (),
    "selfattn.distributed": ("mpi4py",),
    "selfattn.integrations.jax": ("jax",),
    "selfattn.integrations.torch": ("torch", "ml_dtypes"),
    "selfattn.integrations.transformers": ("transformers", "torch", "ml_dtypes"),
}
# Their pages say it for all functions.
WITHOUT_ERRORS = {"selfattn.compat", "selfattn.reference"}
NEEDED = {**PUBLIC, "selfattn.integrations": ("transformers", "torch", "jax", "ml_dtypes")}


def listed() -> dict[str, set[str]]:
    """Return the names that the pages of the reference describe, by module."""
    found: dict[str, set[str]] = {}
    for page in sorted((DOCS / "reference").glob("*.rst")):
        module = ""
        for line in page.read_text(encoding="utf8").splitlines():
            if current := re.match(r"\.\. currentmodule:: (\S+)", line):
                module = current[1]
            elif described := re.match(r"\.\. auto(?:function|class):: (\S+)", line):
                found.setdefault(module, set()).add(described[1])
    return found


def names(module: str) -> set[str]:
    """Return a module's list of public names, without importing it."""
    path = ROOT.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    (value,) = re.findall(r"^__all__ = (\[[^\]]*\])", file.read_text(encoding="utf8"), flags=re.M)
    return {name for name in ast.literal_eval(value) if not name.startswith("_")}


def skip_unless_installed(module: str) -> None:
    needed = max((name for name in NEEDED if module.startswith(name)), key=len)
    for package in NEEDED[needed]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_is_on_a_page(module: str) -> None:
    assert names(module) == listed()[module], "docs/reference/*.rst describe the public names"


@pytest.mark.parametrize("module", listed())
def test_every_public_name_has_an_example(module: str) -> None:
    skip_unless_installed(module)
    found = importlib.import_module(module)
    assert [name for name in sorted(listed()[module]) if ">>> " not in (getattr(found, name).__doc__ or "")] == []


@pytest.mark.parametrize("module", [name for name in listed() if name not in WITHOUT_ERRORS])
def test_every_public_name_says_what_it_raises(module: str) -> None:
    skip_unless_installed(module)
    found = {name: getattr(importlib.import_module(module), name) for name in sorted(listed()[module])}
    with_arguments = [name for name, value in found.items() if parameters(value) and not is_tuple(value)]
    assert [name for name in with_arguments if "\nRaises\n" not in (inspect.getdoc(found[name]) or "")] == []


def parameters(value: Any) -> list[str]:
    return list(inspect.signature(value).parameters)


def is_tuple(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, tuple)


def modules() -> list[str]:
    """Return the names of the modules with examples, without importing them."""
    files = sorted((ROOT / "selfattn").rglob("*.py"))
    with_examples = [file.relative_to(ROOT) for file in files if ">>> " in file.read_text(encoding="utf8")]
    return [".".join(file.with_suffix("").parts) for file in with_examples]


@pytest.mark.parametrize("module", modules())
def test_examples_give_what_they_show(module: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    skip_unless_installed(module)
    monkeypatch.chdir(tmp_path)
    if module.startswith("selfattn.distributed"):  # starts MPI
        code = f"import doctest, {module} as m; assert doctest.testmod(m).failed == 0"
        subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
        return
    try:
        result = doctest.testmod(importlib.import_module(module))
    finally:
        selfattn.set_num_threads(None)
    assert result.attempted > 0
    assert result.failed == 0
