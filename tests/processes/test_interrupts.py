"""Signals during calls: Ctrl-C, and handlers that call again."""

from __future__ import annotations

import sys
import textwrap
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks the Linux kernel")

INTERRUPTED = """
    import os, signal, sys, threading, time
    import numpy as np
    import selfattn as sa

    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background processes with SIGINT ignored

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


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("call", ["attention", "gradients"])
def test_ctrl_c(run_python: Any, threads: int, call: str) -> None:
    code = textwrap.dedent(INTERRUPTED) + f"\ndelay = measure({threads}, {call})\nprint(delay)\n"
    assert float(run_python(code)) < 0.2


@pytest.mark.parametrize("threads", [1, 2])
def test_ctrl_c_while_a_state_absorbs(run_python: Any, threads: int) -> None:
    code = textwrap.dedent(INTERRUPTED) + textwrap.dedent(f"""
        def absorb(x, num_threads):
            global state
            state = sa.AttentionState(x[:, :, :3000], kv_len=20000, num_threads=num_threads)
            state.absorb(x, x)

        print(measure({threads}, absorb))
        y = np.zeros((1, 64, 0, 64), np.float32)
        for call in (lambda: state.absorb(y, y), state.result):
            try:
                call()
            except RuntimeError as error:
                print(error)
    """)
    delay, absorbing, asking = run_python(code).splitlines()
    assert float(delay) < 0.2
    assert absorbing.startswith("AttentionState.absorb: an absorb was interrupted")
    assert asking.startswith("AttentionState.result: an absorb was interrupted")


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
            signal.setitimer(signal.ITIMER_REAL, 0.02)  # from now on, so that a slow handler does not interrupt itself

        def calls():
            signal.signal(signal.SIGALRM, handle)
            signal.setitimer(signal.ITIMER_REAL, 0.02)
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
