"""The pages of the documentation and their blocks of code."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from places import ROOT

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


class Block(NamedTuple):
    """A fenced block: its language, the number of its first line of code, and the code."""

    language: str
    line: int
    code: str


def blocks(text: str) -> Iterator[Block]:
    """Yield the fenced blocks of a page."""
    for found in re.finditer(r"^```(.*)\n((?:.*\n)*?)```$", text, flags=re.M):
        yield Block(found[1], text.count("\n", 0, found.start(2)) + 1, found[2])


def program(text: str) -> str:
    """Return the page's blocks of Python as one program in which every line has the number that it has on the page."""
    lines = [""] * (text.count("\n") + 1)
    for block in blocks(text):
        if block.language == "python":
            code = block.code.splitlines()
            lines[block.line - 1 : block.line - 1 + len(code)] = code
    return "\n".join(lines)


def name(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()
