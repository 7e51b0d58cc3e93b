"""Files about the project: the changelog's form, one version everywhere, and no unread addresses."""

from __future__ import annotations

import re

from places import ROOT

KINDS = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf8")


def test_changelog_has_the_form_of_keep_a_changelog() -> None:
    versions = re.split(r"^## ", text("CHANGELOG.md"), flags=re.M)[1:]
    titles = [version.partition("\n")[0] for version in versions]
    assert titles[0] == "Unreleased"
    assert [title for title in titles[1:] if not re.fullmatch(r"\d+\.\d+\.\d+ - \d{4}-\d\d-\d\d", title)] == []
    for version in versions:
        kinds = re.findall(r"^### (.*)$", version, flags=re.M)
        assert kinds == [kind for kind in KINDS if kind in kinds]


def test_the_version_is_the_same_everywhere() -> None:
    (version,) = re.findall(r'^version = "(.*)"$', text("pyproject.toml"), flags=re.M)
    assert re.findall(r"^version: (.*)$", text("CITATION.cff"), flags=re.M) == [version]


def test_reports_go_to_the_hosting_site() -> None:
    for name in ("SECURITY.md", "CODE_OF_CONDUCT.md"):
        assert "private reporting" in text(name)
        assert not re.search(r"\w@\w", text(name)), "no addresses of e-mail"
