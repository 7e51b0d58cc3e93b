"""The README: its examples run and use every public name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from places import ROOT

import selfattn as sa

README = (ROOT / "README.md").read_text(encoding="utf8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.M | re.S)


def test_examples_run_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    try:
        for code in blocks("python"):
            exec(compile(code, "README.md", "exec"), namespace)
    finally:
        sa.set_num_threads(None)
    assert (tmp_path / "weights.png").stat().st_size > 0


def test_every_public_function_has_an_example() -> None:
    code = "\n".join(blocks("python"))
    missing = [name for name in sa.__all__ if not name.startswith("_") and not re.search(rf"\bsa\.{name}\b", code)]
    assert missing == []


def test_the_first_two_blocks_are_the_two_commands() -> None:
    fences = re.findall(r"^```(\w+)$", README, flags=re.M)
    assert fences[:2] == ["bash", "bash"]
    job, tests = blocks("bash")[:2]
    assert "examples/norway.py" in job
    assert tests.rstrip().endswith("pytest")


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_documents_of_the_benchmark_name_existing_workloads() -> None:
    from selfattn._bench import workloads

    names = {workload.name for workload in workloads.ALL}
    table = re.findall(r"^\| `([a-z0-9-]+)` \|", README, flags=re.M)
    assert len(table) > 10
    assert set(table) <= names


def test_docstrings_examples() -> None:
    import doctest
    import importlib

    for name in (
        "_apply_rope",
        "_attention",
        "_bias",
        "_cache",
        "_cached",
        "_layer",
        "_paged",
        "_relative",
        "_rope",
        "_states",
        "_threads",
        "_varlen",
        "compat._flash_attn",
        "compat._flash_kvcache",
        "compat._flash_packed",
        "compat._jax",
        "compat._pytorch",
    ):
        result = doctest.testmod(importlib.import_module(f"selfattn.{name}"))
        assert result.attempted > 0
        assert result.failed == 0
