"""The program that tests of faults run on several ranks: one call that something goes wrong with."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import time
from typing import Any

import numpy as np

faulthandler.dump_traceback_later(float(os.environ["RANK_SECONDS"]), exit=True)  # a watchdog: no rank hangs

from mpi4py import MPI  # noqa: E402

import selfattn as sa  # noqa: E402
from selfattn.distributed import Group  # noqa: E402


def call(group: Group, length: int = 5000) -> Any:
    rows = group.rows(length)
    x = np.ones((1, 8, len(rows), 64), np.float32)
    return group.attention(x, x, x, rows=rows, causal=True)


def before_second_piece(action: Any) -> None:
    """Do something when a state absorbs its second piece."""
    absorb, seen = sa.AttentionState.absorb, []

    def changed(*args: Any, **kwargs: Any) -> None:
        seen.append(None)
        if len(seen) == 2:
            action()
        absorb(*args, **kwargs)

    sa.AttentionState.absorb = changed  # type: ignore[method-assign]


def raises(group: Group, odd: bool) -> None:
    """One rank raises before the call."""
    if odd:
        raise KeyError("not this rank")
    call(group)


def raises_in_flight(group: Group, odd: bool) -> None:
    def fail() -> None:
        raise MemoryError("no memory for this piece")

    if odd:
        before_second_piece(fail)
    try:
        call(group)
    except (MemoryError, TimeoutError) as error:
        print(f"rank {group.rank}: {type(error).__name__}: {error}", flush=True)
    try:
        call(group)
    except RuntimeError as error:
        print(f"rank {group.rank} again: {error}", flush=True)
    other = Group(MPI.COMM_WORLD, timeout=60)  # which works
    print(f"rank {group.rank} anew: {call(other, 100).shape[0]}", flush=True)


def dies_in_flight(group: Group, odd: bool) -> None:
    if odd:
        before_second_piece(lambda: os.kill(os.getpid(), signal.SIGKILL))
    call(group)


def absent(group: Group, odd: bool) -> None:
    """One rank does something else; the others sleep while they wait."""
    if odd:
        time.sleep(2)
        call(group, 100)
        return
    before, start = time.process_time(), time.monotonic()
    call(group, 100)
    used, waited = time.process_time() - before, time.monotonic() - start
    print(f"used {used:.3f} of {waited:.3f} s", flush=True)


def waits(group: Group, odd: bool) -> None:
    """Until Ctrl-C."""
    if odd:
        print("waiting", flush=True)
        time.sleep(50)
    call(group)


def goes_on(group: Group, odd: bool) -> None:
    """One call after another."""
    for i in range(10**6):
        call(group, 100)
        if i == 3 and not odd:
            print("going on", flush=True)


FAULTS = (raises, raises_in_flight, dies_in_flight, absent, waits, goes_on)


def main(name: str, timeout: str) -> None:
    group = Group(MPI.COMM_WORLD, timeout=float(timeout))
    fault = next(x for x in FAULTS if x.__name__ == name)
    fault(group, group.rank == group.size - 1)


main(*sys.argv[1:])
