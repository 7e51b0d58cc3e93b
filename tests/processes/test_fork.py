"""After fork: no hang, bit-identical results, still several threads."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

PREPARE = """
import os, sys, threading, warnings
import multiprocessing as mp
import numpy as np
import selfattn as sa

warnings.simplefilter("ignore")  # Python 3.12 warns of fork where there are threads

x = np.random.default_rng(0).standard_normal((2, 4, 400, 32)).astype(np.float32)
SERIAL = sa.show_runtime(mode="dicts")["parallel"] == "serial"

def compute():
    return sa.attention(x, x, x, causal=True, num_threads=2)

def thread_count():
    return len(os.listdir("/proc/self/task"))

expected = compute()  # warm: the parent's team exists

def right():
    "The same bits, several times, with more than one thread at work."
    most = []
    stop = threading.Event()
    def watch():
        while not stop.is_set():
            most.append(thread_count())
    big = np.zeros((1, 8, 1500, 32), np.float32)
    good = all(np.array_equal(compute(), expected) for _ in range(5))
    before = thread_count()
    watcher = threading.Thread(target=watch)
    watcher.start()
    sa.attention(big, big, big, num_threads=2)
    stop.set()
    watcher.join()
    # The watcher itself, and the team's second thread (which may have been there before).
    parallel = SERIAL or not sys.platform.startswith("linux") or max(most) >= 3
    return good and parallel

def in_child(action):
    child = os.fork()
    if child == 0:
        try:
            ok = action()
        except BaseException as error:
            print("child:", repr(error), file=sys.stderr)
            ok = False
        os._exit(0 if ok else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""

CASES = {
    "fork": "assert in_child(right) and right()",
    "nested": "assert in_child(lambda: right() and in_child(lambda: right() and in_child(right)) and right())",
    "nested without a call between": "assert in_child(lambda: in_child(right))",
    "many children": "assert all(in_child(right) for _ in range(3))",
    "from another thread": """
        results = []
        def work():
            compute()
            results.append(in_child(right))
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert results == [True] and in_child(right)
    """,
    "threads of a child": """
        def threads():
            results = []
            job = lambda: results.append(np.array_equal(compute(), expected))
            workers = [threading.Thread(target=job) for _ in range(4)]
            for worker in workers: worker.start()
            for worker in workers: worker.join()
            return results == [True] * 4 and right()
        assert in_child(threads)
    """,
    "fork from a thread of a child": """
        def action():
            results = []
            job = lambda: results.append(np.array_equal(compute(), expected) and in_child(right))
            worker = threading.Thread(target=job)
            worker.start()
            worker.join()
            return results == [True] and right()
        assert in_child(action)
    """,
    "while other threads compute": """
        stop = threading.Event()
        def busy():
            while not stop.is_set():
                compute()
        workers = [threading.Thread(target=busy) for _ in range(2)]
        for worker in workers: worker.start()
        good = all(in_child(right) for _ in range(4))
        stop.set()
        for worker in workers: worker.join()
        assert good
    """,
    "gradients": """
        def gradients():
            return sa.attention_backward(x, x, x, x, x, x[..., 0], num_threads=2)
        before = gradients()
        def right_gradients():
            return right() and all(np.array_equal(a, b) for a, b in zip(gradients()[:3], before[:3], strict=True))
        assert in_child(right_gradients) and right_gradients()
    """,
    "layer": """
        rng = np.random.default_rng(1)
        w = [rng.standard_normal((64, 64)).astype(np.float32) for _ in range(4)]
        layer = sa.SelfAttention(*w, num_heads=4, rope=True)
        data = rng.standard_normal((4, 200, 64)).astype(np.float32)
        before = layer(data, num_threads=2)
        assert in_child(lambda: np.array_equal(layer(data, num_threads=2), before))
    """,
    "feed-forward": """
        w = np.random.default_rng(1).standard_normal((64, 64)).astype(np.float32)
        norm = sa.LayerNorm(np.ones(64, np.float32))
        model = sa.FeedForward(w, w, norm=norm)
        data = np.random.default_rng(2).standard_normal((800, 64)).astype(np.float32)
        before = model(data, num_threads=2)
        assert in_child(lambda: np.array_equal(model(data, num_threads=2), before))
    """,
}


def run(code: str, folder: Path) -> None:
    """Run a program from a file, because spawn imports the main module again."""
    file = folder / "main.py"
    file.write_text(PREPARE + textwrap.dedent(code), encoding="utf8")
    result = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, timeout=90, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("case", CASES)
def test_fork(case: str, tmp_path: Path) -> None:
    run(CASES[case], tmp_path)


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_multiprocessing(method: str, tmp_path: Path) -> None:
    code = f"""
        def job(_):
            return np.array_equal(compute(), expected)

        if __name__ == "__main__":
            with mp.get_context({method!r}).Pool(2) as pool:
                assert pool.map(job, range(6)) == [True] * 6
    """
    run(code, tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")
def test_fork_with_a_warm_torch(tmp_path: Path) -> None:
    code = """
        import torch
        torch.set_num_threads(2)
        t = torch.randn(500, 500)
        t @ t
        torch.nn.functional.softmax(torch.randn(4000, 4000), -1)
        assert in_child(right) and right()
    """
    run(code, tmp_path)
