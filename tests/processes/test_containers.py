"""Limits of containers: control groups in every arrangement, and CPUs that a process may not use."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from selfattn import _core

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="control groups belong to Linux")

SELF = "proc/self/cgroup"
V2 = "sys/fs/cgroup"
V1 = "sys/fs/cgroup/cpu"


def tree(root: Path, files: dict[str, str]) -> str:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return str(root)


def v1(group: str, quota: str, period: str = "100000\n", mount: str = V1) -> dict[str, str]:
    return {f"{mount}{group}/cpu.cfs_quota_us": quota, f"{mount}{group}/cpu.cfs_period_us": period}


NESTED = {
    "the parent is the tightest": (
        {f"{V2}/cpu.max": "max 100000", f"{V2}/a/cpu.max": "150000 100000", f"{V2}/a/b/cpu.max": "300000 100000"},
        1.5,
    ),
    "the group itself is the tightest": (
        {f"{V2}/cpu.max": "800000 100000", f"{V2}/a/cpu.max": "400000 100000", f"{V2}/a/b/cpu.max": "50000 100000"},
        0.5,
    ),
    "the root is the tightest": ({f"{V2}/cpu.max": "200000 100000", f"{V2}/a/b/cpu.max": "300000 100000"}, 2),
    "max all the way": ({f"{V2}/cpu.max": "max 100000", f"{V2}/a/b/cpu.max": "max 100000"}, 0),
    "a sibling's limit is not ours": ({f"{V2}/a/c/cpu.max": "100000 100000", f"{V2}/ab/cpu.max": "100000 100000"}, 0),
    "periods differ": ({f"{V2}/a/cpu.max": "20000 10000", f"{V2}/a/b/cpu.max": "150000 50000"}, 2),
}


@pytest.mark.parametrize("case", NESTED)
def test_every_ancestor_of_a_nested_group_counts(tmp_path: Path, case: str) -> None:
    files, quota = NESTED[case]
    assert _core.cgroup_quota(tree(tmp_path, {SELF: "0::/a/b\n", **files})) == quota


def test_version_1_groups_nest_as_well(tmp_path: Path) -> None:
    files = {SELF: "3:cpuset:/x\n1:cpu:/a/b\n", **v1("", "-1\n"), **v1("/a", "150000\n"), **v1("/a/b", "300000\n")}
    assert _core.cgroup_quota(tree(tmp_path, files)) == 1.5


@pytest.mark.parametrize("controllers", ["cpu", "cpu,cpuacct", "cpuacct,cpu"])
def test_version_1_names_its_controllers_in_any_order(tmp_path: Path, controllers: str) -> None:
    files = {SELF: f"4:{controllers}:/a\n", **v1("/a", "250000\n")}
    assert _core.cgroup_quota(tree(tmp_path, files)) == 2.5


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        (v1("/a", "300000\n"), 3),
        ({f"{V2}/unified/cpu.max": "200000 100000\n"}, 2),
        ({**v1("/a", "300000\n"), f"{V2}/unified/b/cpu.max": "200000 100000\n"}, 2),
        ({**v1("/a", "100000\n"), f"{V2}/unified/b/cpu.max": "200000 100000\n"}, 1),
        ({**v1("/a", "-1\n"), f"{V2}/unified/b/cpu.max": "max 100000\n"}, 0),
    ],
)
def test_both_versions_side_by_side(tmp_path: Path, files: dict[str, str], quota: float) -> None:
    groups = "2:memory:/m\n1:cpu,cpuacct:/a\n0::/b\n"
    assert _core.cgroup_quota(tree(tmp_path, {SELF: groups, **files})) == quota


@pytest.mark.parametrize(
    "text",
    [
        "", "\n", "max", "100000", "100000 ", "max max", "100000 max", "100000 0", "0 100000", "-1 100000",
        "100000 -1", "1e400 100000", "1 1e-300", "inf 100000", "nan nan", "100000x 100000", "100000 100000x",
        "0x10 100000", "\0\0\0\0", "99999999999999999999 1", "１００ １００",
    ],
)  # fmt: skip
def test_garbage_is_no_limit(tmp_path: Path, text: str) -> None:
    files = {SELF: "0::/a\n", f"{V2}/a/cpu.max": text, f"{V2}/cpu.max": "300000 100000\n"}
    # Nor does it hide the limit of an ancestor.
    assert _core.cgroup_quota(tree(tmp_path, files)) == 3


@pytest.mark.parametrize(("quota", "period"), [("", "100000"), ("x", "100000"), ("100000", ""), ("100000", "0")])
def test_garbage_in_version_1_is_no_limit(tmp_path: Path, quota: str, period: str) -> None:
    files = {SELF: "1:cpu:/a\n", **v1("/a", quota, period), **v1("", "300000\n")}
    assert _core.cgroup_quota(tree(tmp_path, files)) == 3


@pytest.mark.parametrize(
    "groups", ["", "\n\n", "rubbish\n", "0:\n", "::\n", "0:cpu\n", "\0\xff:\n", "0::" + "/a" * 9000]
)
def test_garbage_in_the_list_of_groups(tmp_path: Path, groups: str) -> None:
    files = {SELF: groups + "\n0::/b\n", f"{V2}/b/cpu.max": "100000 100000\n"}
    assert _core.cgroup_quota(tree(tmp_path, files)) == 1


@pytest.mark.parametrize(
    ("quota", "threads"),
    [("1000 100000", 1), ("100000 100000", 1), ("100001 100000", 2), ("150000 100000", 2), ("250000 100000", 3),
     ("max 100000", 0), ("900000000000000 1", 10**9)],
)  # fmt: skip
def test_fractions_are_rounded_up(tmp_path: Path, quota: str, threads: int) -> None:
    assert _core.cgroup_cpus(tree(tmp_path, {SELF: "0::/\n", f"{V2}/cpu.max": quota})) == threads


def test_missing_files_and_folders(tmp_path: Path) -> None:
    assert _core.cgroup_quota(str(tmp_path / "nowhere")) == 0
    root = tree(tmp_path, {SELF: "1:cpu:/a\n0::/a\n"})
    assert _core.cgroup_quota(root) == 0
    (tmp_path / V2 / "a" / "cpu.max").mkdir(parents=True)  # opens, but cannot be read
    assert _core.cgroup_quota(root) == 0
    tree(tmp_path, {f"{V1}/a/cpu.cfs_quota_us": "100000\n"})  # no period
    assert _core.cgroup_quota(root) == 0


def test_groups_that_do_not_count(tmp_path: Path) -> None:
    assert _core.cgroup_quota(tree(tmp_path / "other", {SELF: "5:cpuset:/a\n", **v1("", "300000\n")})) == 0
    gone = {SELF: "0::/gone\n", f"{V2}/cpu.max": "50000 100000\n"}  # the root's limit still holds
    assert _core.cgroup_quota(tree(tmp_path / "gone", gone)) == 0.5


def test_symbolic_links(tmp_path: Path) -> None:
    # Version 1 as distributions mount it: one folder for both controllers, and links to it.
    mount = "sys/fs/cgroup/cpu,cpuacct"
    root = tree(tmp_path, {SELF: "4:cpu,cpuacct:/a\n", **v1("/a", "150000\n", mount=mount)})
    (tmp_path / V1).symlink_to("cpu,cpuacct")
    assert _core.cgroup_quota(root) == 1.5
    # A link that leads nowhere, and one that leads to itself.
    for name, target in (("cpu.cfs_quota_us", "gone"), ("cpu.cfs_period_us", "cpu.cfs_period_us")):
        file = tmp_path / mount / "a" / name
        file.unlink()
        file.symlink_to(target)
        assert _core.cgroup_quota(root) == 0


def test_unreadable_files(run_python: Any) -> None:
    # In a child, which drops root's right to read everything; and in a folder that all users may enter,
    # which TMPDIR may not be.
    code = """
        import os, pathlib, tempfile
        from selfattn import _core
        with tempfile.TemporaryDirectory(dir="/tmp") as name:
            root = pathlib.Path(name)
            for file, text in {
                "proc/self/cgroup": "0::/a\\n",
                "sys/fs/cgroup/a/cpu.max": "100000 100000\\n",
                "sys/fs/cgroup/cpu.max": "300000 100000\\n",
            }.items():
                (root / file).parent.mkdir(parents=True, exist_ok=True)
                (root / file).write_text(text)
            root.chmod(0o755)
            before = _core.cgroup_quota(name)
            (root / "sys/fs/cgroup/a/cpu.max").chmod(0)
            if os.geteuid() == 0:
                os.seteuid(65534)
            hidden = _core.cgroup_quota(name)
            if os.getuid() == 0:
                os.seteuid(0)
            (root / "proc/self/cgroup").chmod(0)
            if os.geteuid() == 0:
                os.seteuid(65534)
            print(before, hidden, _core.cgroup_quota(name))
            if os.getuid() == 0:
                os.seteuid(0)
    """
    assert run_python(code).split() == ["1.0", "3.0", "0.0"]


REPORT = """
import selfattn as sa
runtime = sa.show_runtime(mode="dicts")
print(sa.get_num_threads(), runtime["threads"], runtime["affinity"], runtime["cgroup_quota"], runtime["threads_source"])
"""


def test_a_quota_that_the_system_shows_sets_the_default(tmp_path: Path) -> None:
    """In a separate mount namespace, where a sample replaces the control groups' folder."""
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("needs unshare")
    if (os.cpu_count() or 1) < 2 or len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two CPUs, for one of them to be withheld")
    sample = tmp_path / "cgroup"
    tree(sample, {"cpu.max": "50000 100000\n", "cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"})
    isolated = [unshare, "--mount", "sh", "-c", 'mount --bind "$0" /sys/fs/cgroup && exec "$@"', str(sample)]
    if subprocess.run([*isolated, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("may not mount folders")
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    result = subprocess.run(
        [*isolated, sys.executable, "-c", REPORT],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    threads, shown, _, quota, *source = result.stdout.split()
    assert (threads, shown, quota, " ".join(source)) == ("1", "1", "0.5", "control group quota")


PINNED = """
import hashlib, os, sys
import numpy as np
if "pin" in sys.argv[1:]:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import selfattn as sa
x = np.random.default_rng(3).standard_normal((1, 8, 300, 32)).astype(np.float32)
out = sa.attention(x, x, x)
plan = sa.explain(x, x, x)
runtime = sa.show_runtime(mode="dicts")
print(plan["threads"], runtime["threads"], runtime["affinity"], runtime["threads_source"], sep=";")
print(len(os.listdir("/proc/self/task")), hashlib.sha256(out.tobytes()).hexdigest())
"""


@pytest.mark.parametrize("pin", ["taskset", "sched_setaffinity"])
@pytest.mark.parametrize("openmp", [None, "64"])
def test_one_allowed_cpu_means_one_thread(tmp_path: Path, pin: str, openmp: str | None) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two CPUs, for one of them to be withheld")
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment["OPENBLAS_NUM_THREADS"] = "1"  # NumPy's own pool is not ours to count
    if openmp is not None:
        environment["OMP_NUM_THREADS"] = openmp
    program = [sys.executable, "-c", PINNED]
    if pin == "taskset":
        taskset = shutil.which("taskset")
        if taskset is None:
            pytest.skip("needs taskset")
        command = [taskset, "-c", str(min(os.sched_getaffinity(0))), *program]
    else:
        command = [*program, "pin"]

    def lines(arguments: list[str]) -> list[str]:
        result = subprocess.run(
            arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=True
        )
        return result.stdout.splitlines()

    facts, work = lines(command)
    assert facts == "1;1;1;CPU affinity"
    tasks, digest = work.split()
    assert tasks == "1"
    assert lines(program)[1].split()[1] == digest  # bit-identical to an unpinned run


@pytest.mark.skipif(_core.parallel_backend() != "openmp", reason="this build does not use OpenMP")
def test_a_too_large_setting_of_openmp_is_not_believed(run_python: Any) -> None:
    expected = run_python(REPORT).split()[0] if "OMP_NUM_THREADS" not in os.environ else None
    threads, shown, *_, source = run_python(REPORT, OMP_NUM_THREADS="512").split()
    assert threads == shown
    assert int(threads) <= len(os.sched_getaffinity(0))
    assert expected in {None, threads}
    assert source != "OpenMP"
