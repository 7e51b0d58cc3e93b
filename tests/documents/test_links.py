"""Pages in the repository, as a hosting site shows them: links and names of files lead to files that exist.

`test_site.py` checks the links of the built site, places within pages included.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pages import DOCS, PAGES, name
from places import ROOT

FILES = [*PAGES, *(file for file in ROOT.glob("*.md") if file not in PAGES), *sorted(DOCS.rglob("*.ipynb"))]


@pytest.mark.parametrize("file", FILES, ids=name)
def test_files_exist(file: Path) -> None:
    text = file.read_text(encoding="utf8")
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if ":" not in link]
    assert [link for link in links if not (file.parent / link).exists()] == []
    named = re.findall(r"\b(?:examples|benchmarks|selfattn|tests|csrc)/[\w/]+\.(?:py|cpp|h|md|toml)\b", text)
    assert [path for path in named if not (ROOT / path).exists()] == []
