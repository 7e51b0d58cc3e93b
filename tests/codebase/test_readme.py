"""The README: short, and its first two blocks are what CI runs."""

from __future__ import annotations

import re

from pages import blocks
from places import ROOT

README = (ROOT / "README.md").read_text(encoding="utf8")


def test_the_first_two_blocks_are_the_two_commands() -> None:
    job, tests = list(blocks(README))[:2]
    assert job.language == tests.language == "bash"
    assert "examples/norway.py" in job.code
    assert tests.code.rstrip().endswith("pytest")


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 100


def test_tables_of_speed_name_existing_workloads() -> None:
    from selfattn._bench import workloads

    names = {workload.name for workload in workloads.ALL}
    speed = (ROOT / "docs" / "speed.md").read_text(encoding="utf8")
    table = set(re.findall(r"^\| `([a-z0-9-]+)` \|", speed, flags=re.M))
    assert len(table) > 10
    assert table <= names
    in_short = set(re.findall(r"^\| .*\(`([a-z0-9-]+)`\) \|", README, flags=re.M))
    assert len(in_short) > 3
    assert in_short <= table
