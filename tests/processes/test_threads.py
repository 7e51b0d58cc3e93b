"""Threads: the GIL, teams, limits, and an import without side effects."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import selfattn as sa
from selfattn import _core

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks the Linux kernel")


def test_gil_is_released(normal: Any) -> None:
    # While one thread is inside the core, the other one runs Python code.
    x = normal(1, 8, 1500, 64)
    inside, progress, done = threading.Event(), [0], threading.Event()

    def count() -> None:
        inside.wait()
        while not done.is_set():
            progress[0] += 1

    counter = threading.Thread(target=count)
    counter.start()
    inside.set()
    before = progress[0]
    sa.attention(x, x, x, num_threads=1)
    during = progress[0] - before
    done.set()
    counter.join()
    assert during > 1000


@pytest.mark.parametrize("threads", [1, 2, None])
def test_many_python_threads_get_right_answers(rng: Any, threads: int | None) -> None:
    problems = []
    for length in (5, 60, 150, 260, 700):
        q, k, v = rng.standard_normal((3, 2, length, 16)).astype(np.float32)
        problems.append((q, k, v, sa.attention(q, k, v, causal=True, num_threads=1)))
    barrier = threading.Barrier(8)
    wrong: list[str] = []

    def work(seed: int) -> None:
        order = np.random.default_rng(seed)
        barrier.wait()
        for _ in range(40):
            q, k, v, expected = problems[order.integers(len(problems))]
            if not np.array_equal(sa.attention(q, k, v, causal=True, num_threads=threads), expected):
                wrong.append("different results")

    workers = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


def test_set_and_get_num_threads() -> None:
    detected = sa.get_num_threads()
    assert 1 <= detected <= (os.cpu_count() or 1)
    try:
        sa.set_num_threads(3)
        assert sa.get_num_threads() == 3
        runtime = sa.show_runtime(mode="dicts")
        assert runtime is not None
        assert (runtime["threads"], runtime["threads_source"]) == (3, "set_num_threads")
    finally:
        sa.set_num_threads(None)
    assert sa.get_num_threads() == detected
    for bad in (0, -1, 1.5, True, "2"):
        with pytest.raises((TypeError, ValueError), match="set_num_threads: num_threads is"):
            sa.set_num_threads(bad)  # type: ignore[arg-type]


def test_threadpoolctl_sees_and_limits() -> None:
    threadpoolctl = pytest.importorskip("threadpoolctl")
    if not _core.parallel_backend().endswith("openmp"):
        pytest.skip("this build does not use OpenMP")
    assert any(pool["user_api"] == "openmp" for pool in threadpoolctl.threadpool_info())
    with threadpoolctl.threadpool_limits(1, user_api="openmp"):
        assert sa.get_num_threads() == 1


@linux
def test_openmp_and_affinity_set_the_default(run_python: Any) -> None:
    code = """
        import os
        import selfattn as sa
        first = sa.get_num_threads()
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        print(first, sa.get_num_threads())
    """
    if _core.parallel_backend().endswith("openmp"):
        assert run_python(code, OMP_NUM_THREADS="1").split() == ["1", "1"]
    environment = {name: "" for name in ("OMP_NUM_THREADS",) if name in os.environ}
    first, second = map(int, run_python(code, **environment).split())
    assert first <= len(os.sched_getaffinity(0))
    assert second == 1


@linux
def test_import_has_no_side_effects(run_python: Any) -> None:
    code = """
        import os, signal, threading
        import numpy
        def state():
            return (
                dict(os.environ),
                os.sched_getaffinity(0),
                [signal.getsignal(s) for s in signal.valid_signals()],
                threading.active_count(),
                len(os.listdir("/proc/self/task")),
                float(numpy.finfo(numpy.float32).smallest_subnormal),
                float(numpy.float32(1e-38) * numpy.float32(0.01)),
            )
        before = state()
        import selfattn
        assert state() == before
        assert before[-1] > 0
        # A tiny call starts no thread either.
        x = numpy.ones((16, 8), numpy.float32)
        selfattn.attention(x, x, x)
        assert state() == before
        print("same")
    """
    assert run_python(code).strip() == "same"


@linux
@pytest.mark.parametrize("given", ["", "GOMP_SPINCOUNT=7", "OMP_WAIT_POLICY=active"])
def test_idle_threads_soon_sleep(given: str, tmp_path: Path) -> None:
    if not _core.parallel_backend().endswith("openmp"):
        pytest.skip("this build does not use OpenMP")
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment |= dict([given.split("=")] if given else [], OMP_DISPLAY_ENV="verbose")
    code = "import os, selfattn; print(*(os.environ.get(name) for name in ('GOMP_SPINCOUNT', 'OMP_WAIT_POLICY')))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    wanted = {"": "'600'", "GOMP_SPINCOUNT=7": "'7'", "OMP_WAIT_POLICY=active": "'30000000000'"}[given]
    assert f"GOMP_SPINCOUNT = {wanted}" in result.stderr
    assert result.stdout.split() == [environment.get(name, "None") for name in names]  # left as it was


@linux
def test_import_loads_nothing_heavy(run_python: Any) -> None:
    heavy = "{'torch', 'matplotlib', 'scipy', 'threadpoolctl', 'ml_dtypes'}"
    code = f"import sys, selfattn; print(sorted({heavy} & set(sys.modules)))"
    assert run_python(code).strip() == "[]"
