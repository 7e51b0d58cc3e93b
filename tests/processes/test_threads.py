"""Threads: the GIL, teams, limits, signals, and an import without side effects."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
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


def write(folder: Path, files: dict[str, str]) -> str:
    for name, text in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return str(folder)


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, 0),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 0),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        (
            {
                "proc/self/cgroup": "0::/app/worker\n",
                "sys/fs/cgroup/app/worker/cpu.max": "400000 100000\n",
                "sys/fs/cgroup/app/cpu.max": "200000 100000\n",
            },
            2,
        ),
        ({"proc/self/cgroup": "0::/gone\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 0.5),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "rubbish\n"}, 0),
        (
            {
                "proc/self/cgroup": "5:memory:/docker/x\n4:cpu,cpuacct:/docker/x\n",
                "sys/fs/cgroup/cpu/docker/x/cpu.cfs_quota_us": "300000\n",
                "sys/fs/cgroup/cpu/docker/x/cpu.cfs_period_us": "100000\n",
            },
            3,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            0,
        ),
        (
            {
                "proc/self/cgroup": "5:cpuset:/a\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "300000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            0,
        ),
    ],
)
def test_quota_of_the_control_group(tmp_path: Path, files: dict[str, str], quota: float) -> None:
    assert _core.cgroup_quota(write(tmp_path, files)) == quota


INTERRUPTED = """
    import os, signal, sys, threading, time
    import numpy as np
    import selfattn as sa

    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start what runs in the background without it

    def gradients(x, num_threads):
        sa.attention_backward(x, x, x, x, x, x[..., 0], num_threads=num_threads)

    def attention(x, num_threads):
        sa.attention(x, x, x, num_threads=num_threads)

    def measure(threads, call=attention):
        x = np.zeros((1, 64, 20000, 64), np.float32)
        sent = []
        def send():
            time.sleep(0.3)
            sent.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGINT)
        sender = threading.Thread(target=send)
        sender.start()
        try:
            call(x, threads)
        except KeyboardInterrupt:
            delay = time.monotonic() - sent[0]
        else:
            delay = None
        sender.join()
        y = np.ones((60, 8), np.float32)
        assert np.array_equal(sa.attention(y, y, y), y)  # the next call works
        return delay
"""


@linux
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("call", ["attention", "gradients"])
def test_ctrl_c(run_python: Any, threads: int, call: str) -> None:
    code = textwrap.dedent(INTERRUPTED) + f"\ndelay = measure({threads}, {call})\nprint(delay)\n"
    assert float(run_python(code)) < 0.2


@linux
def test_ctrl_c_in_a_forked_child(run_python: Any) -> None:
    code = textwrap.dedent(INTERRUPTED) + textwrap.dedent("""
        import warnings
        warnings.simplefilter("ignore")
        x = np.zeros((1, 8, 500, 64), np.float32)
        sa.attention(x, x, x, num_threads=2)
        child = os.fork()
        if child == 0:
            delay = measure(2)
            os._exit(0 if delay is not None and delay < 0.2 else 1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """)
    assert run_python(code).strip() == "0"


@linux
@pytest.mark.parametrize("forked", [False, True])
def test_calls_in_a_signal_handler(run_python: Any, forked: bool) -> None:
    # The handler runs while a call of the same thread polls. Neither call may take the other's end for its own.
    code = f"""
        import os, signal, time, warnings
        import numpy as np
        import selfattn as sa

        warnings.simplefilter("ignore")
        x = np.random.default_rng(0).standard_normal((1, 16, 3000, 64)).astype(np.float32)
        y = x[:, :, :500].copy()
        expected = sa.attention(x, x, x, num_threads=2), sa.attention(y, y, y, num_threads=2)
        inner = []

        def handle(*_):
            inner.append(sa.attention(y, y, y, num_threads=2))

        def calls():
            signal.signal(signal.SIGALRM, handle)
            signal.setitimer(signal.ITIMER_REAL, 0.02, 0.03)
            end = time.monotonic() + 30
            while len(inner) < 4 and time.monotonic() < end:
                assert np.array_equal(sa.attention(x, x, x, num_threads=2), expected[0])
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert len(inner) >= 4
            assert all(np.array_equal(result, expected[1]) for result in inner)

        if {forked}:
            child = os.fork()
            if child == 0:
                try:
                    calls()
                    os._exit(0)
                finally:
                    os._exit(1)
            assert os.waitpid(child, 0)[1] == 0
        else:
            calls()
        print("right")
    """
    assert run_python(textwrap.dedent(code)).strip() == "right"


@linux
def test_ctrl_c_in_a_forked_child_whose_cpus_are_taken(run_python: Any) -> None:
    code = textwrap.dedent(INTERRUPTED) + textwrap.dedent("""
        import warnings
        warnings.simplefilter("ignore")
        x = np.zeros((1, 8, 500, 64), np.float32)
        sa.attention(x, x, x, num_threads=2)
        sa.set_num_threads(2)
        child = os.fork()
        if child == 0:
            y = np.zeros((1, 16, 20000, 64), np.float32)
            other = threading.Thread(target=attention, args=(y, 1), daemon=True)
            other.start()
            time.sleep(0.05)  # the other thread is in its call, and leaves one CPU
            delay = measure(2)
            os._exit(0 if delay is not None and delay < 0.5 else 1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """)
    assert run_python(code).strip() == "0"


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
