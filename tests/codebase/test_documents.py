"""Documents: prose is wrapped."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import ROOT

WIDTH = 120
FOLDERS = (ROOT, ROOT / "csrc", ROOT / "benchmarks")
DOCUMENTS = [
    *(file for folder in FOLDERS for file in sorted(folder.glob("*.md"))),
    *sorted(file for kind in ("*.md", "*.rst") for file in (ROOT / "docs").rglob(kind)),
]


def prose(text: str) -> Iterator[tuple[int, str]]:
    """Yield the numbered lines outside of tables, blocks of code, and results that a benchmark has written."""
    kept = {"```": True, "<!--": True}
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            kept["```"] = not kept["```"]
        elif line.startswith("<!-- results:"):
            kept["<!--"] = "end" in line
        elif all(kept.values()) and not line.lstrip().startswith("|"):
            yield number, line


def can_be_wrapped(line: str) -> bool:
    """Whether a line holds more than one word, where inline code and the target of a link each belong to a word."""
    words = re.sub(r"`[^`]*`|\]\([^)]*\)", "x", line).removeprefix("- ").split()
    return len(words) > 1


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_prose_is_wrapped(file: Path) -> None:
    lines = prose(file.read_text(encoding="utf8"))
    assert [number for number, line in lines if len(line) > WIDTH and can_be_wrapped(line)] == []


def test_long_lines_of_prose_are_found() -> None:
    long = "word " * 30
    marks = ("<!-- results: begin -->", "<!-- results: end -->")
    text = [long, f"| {long} |", "```", long, "```", marks[0], long, marks[1], f"- `{long}`", long]
    lines = [number for number, line in prose("\n".join(text)) if len(line) > WIDTH and can_be_wrapped(line)]
    assert lines == [1, 10]
