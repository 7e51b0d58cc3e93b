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


def names_in(text: str) -> list[str]:
    return re.findall(r"`([^`\s]+)`", text)


def unnamed(files: list[Path], patterns: list[str]) -> set[str]:
    """Return the files that no name or pattern matches; `name` matches name.h and name.cpp."""
    return {
        file.name for file in files if not any(fnmatch(name, p) for p in patterns for name in (file.name, file.stem))
    }


def names_by_folder(text: str) -> dict[str, list[str]]:
    """Return the names in the first column, by the folder at the start of the row, "." without one."""
    found: dict[str, list[str]] = {}
    for row in re.findall(r"^\| (.*?) \|", text, flags=re.M):
        names = names_in(row)
        folder = names.pop(0).rstrip("/") if names and names[0].endswith("/") else "."
        found.setdefault(folder, []).extend(names)
    return found


def test_every_file_of_the_core_is_on_its_map() -> None:
    for folder, title in (
        (".", "The core"),
        ("kernels", "`kernels/`"),
        ("simd", "`simd/`"),
        ("bindings", "`bindings/`"),
    ):
        files = [file for file in (ROOT / "csrc" / folder).iterdir() if file.suffix in {".h", ".cpp"}]
        assert len(files) > 5
        assert unnamed(files, names_in(section(ROOT / "csrc" / "README.md", title))) == set(), folder


def test_every_python_module_is_on_the_map() -> None:
    package = ROOT / "selfattn"
    files = [file for file in package.rglob("*.py*") if file.suffix in {".py", ".pyi"}]
    assert len(files) > 50
    named = names_by_folder(section(ROOT / "docs" / "architecture.md", "Python modules"))
    for folder in {file.parent for file in files}:
        # A folder on the map includes its __init__.py.
        inside = [file for file in files if file.parent == folder and (folder == package or file.stem != "__init__")]
        path = folder.relative_to(package).as_posix()
        assert unnamed(inside, named.get(path, [])) == set(), path


def test_files_on_the_maps_exist() -> None:
    core = (ROOT / "csrc" / "README.md").read_text(encoding="utf8")
    known = {name for file in (ROOT / "csrc").rglob("*.*") for name in (file.name, file.stem)}
    for row in re.findall(r"^\| (.*?) \|", core, flags=re.M):
        for pattern in re.findall(r"`([^`\s/]+)`", row):
            assert any(fnmatch(name, pattern) for name in known), f"csrc/README.md names {pattern}"
    for folder, names in names_by_folder(section(ROOT / "docs" / "architecture.md", "Python modules")).items():
        for name in names:
            assert (ROOT / "selfattn" / folder / name).is_file(), f"architecture.md names {folder}/{name}"


def test_a_file_without_a_place_is_found() -> None:
    files = [Path("a.h"), Path("a.cpp"), Path("b.h"), Path("isa_c.cpp")]
    assert unnamed(files, names_in("| `a` | `isa_*.cpp` |")) == {"b.h"}


def test_a_name_counts_in_its_own_folder_only() -> None:
    text = "| `a.py`, `b.py` | of `c.py` |\n| `inner/`: `d.py` | more |\n| `inner/`: `e.py` | more |\n"
    assert names_by_folder(text) == {".": ["a.py", "b.py"], "inner": ["d.py", "e.py"]}
