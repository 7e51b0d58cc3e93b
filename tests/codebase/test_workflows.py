"""The workflows of a public CI: what they run, what they may do, and that they agree with the project's other files."""

from __future__ import annotations

import re
import sys

import pytest
import yaml
from places import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = ROOT / ".github" / "workflows"
WORKFLOWS = {file.stem: yaml.safe_load(file.read_text(encoding="utf8")) for file in sorted(FOLDER.glob("*.yml"))}
JOBS = {f"{name}/{job}": made for name, workflow in WORKFLOWS.items() for job, made in workflow["jobs"].items()}
STEPS = [(name, step) for name, job in JOBS.items() for step in job["steps"]]
COMMANDS = [step["run"] for _, step in STEPS if "run" in step]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))
WHEELS = PROJECT["tool"]["cibuildwheel"]

# What a job may write; every other job only reads the repository.
WRITES = {
    "docs/deploy": {"pages": "write", "id-token": "write"},
    "wheels/attest": {"id-token": "write", "attestations": "write"},
    "wheels/publish": {"id-token": "write"},
}

pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="the sdist leaves the workflows out")


def wheel_platforms() -> list[str]:
    return [entry["platform"] for entry in JOBS["wheels/wheels"]["strategy"]["matrix"]["include"]]


def test_there_is_a_workflow_for_each_purpose() -> None:
    assert set(WORKFLOWS) == {"ci", "docs", "wheels"}


def test_changes_run_what_developers_run() -> None:
    events = WORKFLOWS["ci"][True]  # YAML 1.1 reads the key `on` as true
    assert events["push"] == {"branches": ["main"]}
    assert "pull_request" in events
    job = JOBS["ci/run"]
    assert "bash .ci/run" in [step.get("run") for step in job["steps"]]
    assert job["strategy"]["matrix"]["image"] == ["debian:12", "debian:13"]  # those that .ci/run names
    assert job["container"]["image"] == "${{ matrix.image }}"


def test_jobs_may_do_only_what_they_need() -> None:
    assert {name for name, workflow in WORKFLOWS.items() if workflow["permissions"] != {}} == set()
    reads = {name: {"contents": "read"} for name in JOBS}
    assert {name: job["permissions"] for name, job in JOBS.items()} == reads | WRITES


def test_jobs_that_may_write_run_no_code_of_the_project() -> None:
    assert [name for name, step in STEPS if name in WRITES and ("run" in step or "checkout" in step["uses"])] == []


def test_checkouts_leave_no_credentials() -> None:
    checkouts = [step for _, step in STEPS if "actions/checkout@" in step.get("uses", "")]
    assert len(checkouts) == 5
    assert [step for step in checkouts if step["with"]["persist-credentials"] is not False] == []


def test_each_action_has_one_version() -> None:
    uses = {tuple(step["uses"].split("@")) for _, step in STEPS if "uses" in step}
    assert [use for use in uses if not re.fullmatch(r"v\d+|release/v\d+|[0-9a-f]{40}", use[1])] == []
    assert len({action for action, _ in uses}) == len(uses)


def test_every_job_ends() -> None:
    assert [name for name, job in JOBS.items() if not 0 < job.get("timeout-minutes", 0) <= 360] == []


def test_only_tags_are_published_and_only_after_all_checks() -> None:
    for name, needed in (("wheels/attest", "check"), ("wheels/publish", "attest")):
        assert JOBS[name]["if"] == "startsWith(github.ref, 'refs/tags/v')"
        assert JOBS[name]["needs"] == needed
    assert JOBS["wheels/check"]["needs"] == ["sdist", "wheels"]
    assert JOBS["wheels/publish"]["environment"] == "release"
    assert JOBS["docs/deploy"]["if"] == "github.ref == 'refs/heads/main'"


def test_tools_have_the_versions_of_the_project() -> None:
    installs = [command for command in COMMANDS if "pip install" in command]
    assert len(installs) == 4
    pinned = set(re.findall(r"^([\w-]+)==", (ROOT / ".ci" / "constraints.txt").read_text(encoding="utf8"), flags=re.M))
    for command in installs:
        found = re.fullmatch(r"python -m pip install -c \.ci/constraints\.txt (\w+)", command)
        assert found, command
        assert found[1] in pinned
    assert "cibuildwheel" in pinned


def test_workflows_run_sessions_that_exist() -> None:
    sessions = set(re.findall(r"^def (\w+)\(session", (ROOT / "noxfile.py").read_text(encoding="utf8"), flags=re.M))
    run = {name for command in COMMANDS for name in re.findall(r"nox -s (\w+)", command)}
    assert run == {"docs", "release", "wheels"}
    assert run <= sessions


def test_versions_of_python_agree() -> None:
    listed = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["project"]["classifiers"]))
    assert WHEELS["build"] == [f"cp{version.replace('.', '')}-*" for version in listed]
    assert PROJECT["project"]["requires-python"] == f">={listed[0]}"
    minors = [int(version.partition(".")[2]) for version in listed]
    assert minors == list(range(minors[0], minors[-1] + 1))
    used = {step["with"]["python-version"] for _, step in STEPS if "python-version" in step.get("with", {})}
    assert used <= set(listed)


def test_wheels_are_tested_with_what_the_suite_needs() -> None:
    suite = set(PROJECT["project"]["optional-dependencies"]["test"])
    for settings in (WHEELS, *WHEELS["overrides"]):
        assert set(settings["test-requires"]) <= suite
        own, tests = settings["test-command"]
        assert own == "python -m selfattn selftest"
        folders = tests.partition(" -n auto ")[2].split()
        assert folders
        assert [name for name in folders if not any((ROOT / "tests" / name).glob("test_*.py"))] == []


def test_the_page_on_platforms_names_every_platform_of_a_wheel() -> None:
    page = (ROOT / "docs" / "project" / "platforms.md").read_text(encoding="utf8")
    assert re.findall(r"^\| .*`((?:many|musl)linux_\w+|macosx_\w+)`", page, flags=re.M) == wheel_platforms()
