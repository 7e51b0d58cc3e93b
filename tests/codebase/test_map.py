"""The map names every source file, so that a new one has a place on it."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

from places import ROOT


def section(page: Path, title: str) -> str:
    """Return the text from a heading that contains `title` to the next heading."""
    found = re.search(rf"^#+ [^\n]*{re.escape(title)}.*?(?=^#|\Z)", page.read_text(encoding="utf8"), flags=re.M | re.S)
    assert found, f"{page.name} has no section {title}"
    return found[0]


def unnamed(files: list[Path], text: str) -> set[str]:
    """Return the files that no name or pattern in backticks matches; `name` matches name.h and name.cpp."""
    patterns = re.findall(r"`([^`\s]+)`", text)
    return {
        file.name for file in files if not any(fnmatch(name, p) for p in patterns for name in (file.name, file.stem))
    }


def test_every_file_of_the_core_is_on_its_map() -> None:
    for folder, title in (
        (".", "The core"),
        ("kernels", "`kernels/`"),
        ("simd", "`simd/`"),
        ("bindings", "`bindings/`"),
    ):
        files = [file for file in (ROOT / "csrc" / folder).iterdir() if file.suffix in {".h", ".cpp"}]
        assert len(files) > 5
        assert unnamed(files, section(ROOT / "csrc" / "README.md", title)) == set(), folder


def test_every_python_module_is_on_the_map() -> None:
    files = [file for file in (ROOT / "selfattn").rglob("*.py*") if file.suffix in {".py", ".pyi"}]
    assert len(files) > 50
    assert unnamed(files, section(ROOT / "docs" / "architecture.md", "Python modules")) == set()


def test_files_on_the_maps_exist() -> None:
    for page, title in (("csrc/README.md", ""), ("docs/architecture.md", "Python modules")):
        text = section(ROOT / page, title) if title else (ROOT / page).read_text(encoding="utf8")
        folder = ROOT / ("csrc" if title == "" else "selfattn")
        known = {name for file in folder.rglob("*.*") for name in (file.name, file.stem)}
        for row in re.findall(r"^\| (.*?) \|", text, flags=re.M):
            for pattern in re.findall(r"`([^`\s/]+)`", row):
                assert any(fnmatch(name, pattern) for name in known), f"{page} names {pattern}"


def test_a_file_without_a_place_is_found() -> None:
    assert unnamed([Path("a.h"), Path("a.cpp"), Path("b.h"), Path("isa_c.cpp")], "| `a` | `isa_*.cpp` |") == {"b.h"}
