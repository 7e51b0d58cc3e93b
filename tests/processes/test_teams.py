"""Where teams of threads come from: OpenMP, std::thread, a shared runtime, and fewer threads than a call asks for."""

from __future__ import annotations

import ctypes
import sys
import threading
from typing import Any

import numpy as np
import pytest

import selfattn as sa
from selfattn import _core

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks the Linux kernel")


@pytest.mark.parametrize("backend", ["threads", "serial"])
def test_other_back_ends_give_the_same_bits(run_python: Any, backend: str) -> None:
    code = """
        import hashlib
        import numpy as np
        import selfattn as sa
        x = np.random.default_rng(0).standard_normal((2, 4, 300, 32)).astype(np.float32)
        out = sa.attention(x, x, x, causal=True, num_threads=2)
        print(sa.show_runtime(mode="dicts")["parallel"], hashlib.sha256(out.tobytes()).hexdigest())
    """
    name, digest = run_python(code, SELFATTN_PARALLEL=backend).split()
    assert name == backend
    assert digest == run_python(code).split()[1]


Work = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@pytest.mark.parametrize("team", [1, 2, 5, 9])
def test_regions_run_in_a_shared_runtime(normal: Any, team: int) -> None:
    if not _core.parallel_backend().endswith("openmp"):
        pytest.skip("this build does not use OpenMP")
    x = normal(2, 8, 300, 16)
    expected = sa.attention(x, x, x, num_threads=1)
    asked = []

    @ctypes.CFUNCTYPE(None, Work, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    def run(work: Any, data: int, threads: int, flags: int) -> None:
        asked.append((threads, flags))
        others = [threading.Thread(target=work, args=(data,)) for _ in range(team - 1)]
        for other in others:
            other.start()
        work(data)
        for other in others:
            other.join()

    usual = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 5)
    _core.share_runtime(*(ctypes.cast(f, ctypes.c_void_p).value or 0 for f in (run, usual)))
    try:
        assert _core.parallel_backend() == "shared openmp"
        for threads in (3, 7):  # below and above the team's usual size
            assert np.array_equal(sa.attention(x, x, x, num_threads=threads), expected)
        sa.attention(x, x, x, num_threads=1)
    finally:
        _core.share_runtime(0, 0)
    assert _core.parallel_backend() == "openmp"
    assert asked == [(5, 0), (7, 0)]


@linux
@pytest.mark.parametrize("backend", ["openmp", "threads"])
def test_a_call_goes_on_with_the_threads_that_the_system_grants(run_python: Any, backend: str) -> None:
    code = """
        import os, resource, threading
        import numpy as np
        import selfattn as sa

        x = np.random.default_rng(0).standard_normal((4, 8, 300, 64), dtype=np.float32)
        expected = sa.attention(x, x, x, num_threads=1)
        if os.getuid() == 0:
            os.setuid(1_000_000 + os.getpid())  # root has no limit, and other tests have their own users
        late = threading.Thread(target=lambda: (go.wait(), found.append(sa.attention(x, x, x, num_threads=4))))
        go, found = threading.Event(), []
        late.start()
        resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
        go.set()
        late.join()  # every Python thread has a team of its own
        found.append(sa.attention(x, x, x, num_threads=4))
        print([np.array_equal(out, expected) for out in found])
    """
    if backend == "openmp" and not sa.show_config("dicts")["openmp"]:  # type: ignore[index]
        pytest.skip("built without OpenMP")
    assert run_python(code, SELFATTN_PARALLEL=backend).split("\n")[-2] == "[True, True]"


@linux
def test_teams_that_start_at_once_share_the_threads_that_the_system_grants(run_python: Any) -> None:
    code = """
        import os, resource, threading
        import numpy as np
        import selfattn as sa

        x = np.zeros((1, 8, 512, 64), np.float32)
        if os.getuid() == 0:
            os.setuid(1_000_000 + os.getpid())  # root has no limit, and other tests have their own users
        go = threading.Barrier(4)
        def work():
            go.wait()
            sa.attention(x, x, x, num_threads=2)
        threads = [threading.Thread(target=work) for _ in range(4)]
        resource.setrlimit(resource.RLIMIT_NPROC, (GRANTED, GRANTED))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print("all went on")
    """
    for limit in [6, 7, 8] * 3:
        assert run_python(code.replace("GRANTED", str(limit))).split("\n")[-2] == "all went on"
