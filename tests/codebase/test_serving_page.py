"""The page "Serving": its code runs unchanged, and the files that it names exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from places import ROOT

PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf8")


def test_examples_run_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.M | re.S)
    assert len(blocks) == 6
    namespace: dict[str, object] = {}
    for code in blocks:
        exec(compile(code, "serving.md", "exec"), namespace)
    assert (tmp_path / "prompt.cache").stat().st_size > 0


def test_links_and_files_exist() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", PAGE)
    files = re.findall(r"\bexamples/[\w/]+\.py\b", PAGE)
    assert links
    assert files
    for name in [f"docs/{link}" for link in links] + files:
        assert (ROOT / name).exists(), name
