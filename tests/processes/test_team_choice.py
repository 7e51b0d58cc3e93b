"""How many threads a call takes: what teams cost, other threads' teams, and where a team's threads run."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest

from selfattn import _core

pytestmark = pytest.mark.skipif(
    not _core.parallel_backend().endswith("openmp"), reason="this build does not use OpenMP"
)

# A fake runtime whose regions take the time that a test sets. Its teams have one thread.
SLOW = """
import ctypes, threading, time
import numpy as np
import selfattn as sa
from selfattn import _core

regions, delay, inside, leave = [], 0.0, threading.Event(), threading.Event()
leave.set()
Work = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

@ctypes.CFUNCTYPE(None, Work, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
def run(work, data, threads, flags):
    regions.append(threads)
    inside.set()
    leave.wait()
    work(data)
    time.sleep(delay)

usual = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 1)
_core.share_runtime(*(ctypes.cast(f, ctypes.c_void_p).value for f in (run, usual)))
sa.set_num_threads(3)
# Takes far less than the millisecond from which work always gets all threads, also on a busy machine.
x = np.random.default_rng(0).standard_normal((1, 12, 64, 64), dtype=np.float32)
expected = sa.attention(x, x, x, num_threads=1)
"""


@pytest.mark.uncounted  # in such a build, the work itself takes longer than the delay
def test_teams_that_cost_more_than_they_give_are_not_called_again(run_python: Any) -> None:
    code = """
for delay in (0, 5e-3):
    del regions[:]
    for _ in range(300):
        time.sleep(1e-4)
        assert np.array_equal(sa.attention(x, x, x), expected)
    print(len(regions))
del regions[:]
sa.attention(x, x, x, num_threads=3)  # the caller's own choice is kept
print(regions)
"""
    free, dear, own = run_python(SLOW + code).splitlines()
    assert 0 < int(dear) < 40
    assert own == "[3]"
    assert int(free) >= 0  # any number is right: a team of one thread gains nothing


def test_teams_of_several_python_threads_leave_a_cpu_to_each(run_python: Any) -> None:
    code = """
leave.clear()
first = threading.Thread(target=lambda: sa.attention(x, x, x, num_threads=2))
first.start()
inside.wait()
leave_later = threading.Timer(0.2, leave.set)
leave_later.start()
before = list(regions)
assert np.array_equal(sa.attention(x, x, x, num_threads=3), expected)  # 3 CPUs, of which 2 are taken: no region
print(before, regions)
first.join()
sa.attention(x, x, x, num_threads=3)
print(regions)
"""
    assert run_python(SLOW + code).splitlines() == ["[2] [2]", "[2, 3]"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks the Linux kernel")
def test_a_thread_that_wakes_on_its_callers_cpu_makes_way(run_python: Any) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two CPUs")
    code = """
        import os
        import numpy as np
        import selfattn as sa
        cpus = set(sorted(os.sched_getaffinity(0))[:2])
        os.sched_setaffinity(0, cpus)
        x = np.zeros((1, 8, 200, 64), np.float32)
        def cpu_of(task):
            with open(f"/proc/self/task/{task}/stat") as file:
                return file.read().rpartition(")")[2].split()[36]
        before = set(os.listdir("/proc/self/task"))
        sa.attention(x, x, x, num_threads=2)
        (member,) = map(int, set(os.listdir("/proc/self/task")) - before)
        for only in [{min(cpus)}, {max(cpus)}] * 3:
            os.sched_setaffinity(0, only)  # where the caller is
            os.sched_setaffinity(member, only)
            os.sched_setaffinity(0, cpus)
            apart = 0
            for _ in range(40):
                sa.attention(x, x, x, num_threads=2)
                apart += cpu_of(member) != cpu_of(os.getpid())
            print(apart > 20, os.sched_getaffinity(0) == cpus)
        os.sched_setaffinity(0, {min(cpus)})
        sa.attention(x, x, x, num_threads=2)  # with only one CPU, no thread can be moved
    """
    assert set(run_python(code, OMP_PROC_BIND="false").splitlines()) == {"True True"}
