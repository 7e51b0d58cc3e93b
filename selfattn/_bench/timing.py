"""Fair timing of several calls in one process, and the machine's peaks to compare them with."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

import selfattn
from selfattn import _core

Timed = Mapping[str, Callable[[], Any]]
Gauges = Mapping[str, Callable[[], float]]

BANDWIDTH = "bandwidth"  # in the times of a round, names the time to read as many bytes as K and V have

MIN_SAMPLE_SECONDS = 2e-3  # far above the clock's resolution and the time of an interrupt
MIN_ROUNDS = 5
MAX_ROUNDS = 1000
WARM_CALL_LIMIT = 20e-3  # for longer calls, it does not matter whether the threads were awake
# A team that wakes up may start with two threads on one core; the scheduler takes some ticks to separate them.
WARM_SECONDS = 30e-3

# After a call, the threads of a pool spin while they wait for more work: for 100 ms in OpenBLAS, 30 ms in ONNX Runtime,
# 5 ms in OpenMP. The next peer would share its cores with them, so each sample waits until the process is idle. The
# kernel counts the time of running threads in ticks of up to 4 ms.
IDLE_WINDOW = 10e-3
IDLE_SHARE = 0.2
MAX_SETTLE_SECONDS = 0.5


@dataclass(frozen=True)
class Quartiles:
    """Median and quartiles of a sample."""

    q1: float
    median: float
    q3: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quartiles:
        """Quartiles of a non-empty sample."""
        q1, median, q3 = np.quantile(np.asarray(values, dtype=np.float64), (0.25, 0.5, 0.75))
        return cls(float(q1), float(median), float(q3))


def interleave(runs: Timed, seconds: float, gauges: Gauges | None = None) -> dict[str, list[float]]:
    """Time calls in rotation, A B C, B C A, ..., until `seconds` have passed.

    Each sample repeats its call for at least 2 ms. At least five rounds are made.

    Parameters
    ----------
    runs : mapping of name to call
    seconds : float
        Time budget of all calls together.
    gauges : mapping of name to gauge, optional
        Functions that measure themselves and return seconds; called in rotation with the calls.

    Returns
    -------
    dict
        Seconds per call in each round, by name; all have the same number of rounds.
    """
    takes: dict[str, Callable[[], float]] = {name: partial(_sample, run, _calibrate(run)) for name, run in runs.items()}
    takes |= {name: partial(_gauged, gauge) for name, gauge in (gauges or {}).items()}
    samples: dict[str, list[float]] = {name: [] for name in takes}
    names = list(takes)
    collecting = gc.isenabled()
    gc.disable()
    try:
        start = time.perf_counter()
        for turn in range(MAX_ROUNDS):
            if turn >= MIN_ROUNDS and time.perf_counter() - start > seconds:
                break
            first = turn % len(names)
            for name in (*names[first:], *names[:first]):
                samples[name].append(takes[name]())
    finally:
        if collecting:
            gc.enable()
    return samples


@dataclass(frozen=True)
class _Plan:
    """How one sample of a call is taken."""

    repeats: int
    warm: bool


def _calibrate(run: Callable[[], Any]) -> _Plan:
    """Choose enough repeats for a sample, based on the faster of two calls."""
    seconds = _time(run, 1)
    if seconds < WARM_CALL_LIMIT:
        seconds = min(seconds, _time(run, 1))
    repeats = max(1, math.ceil(MIN_SAMPLE_SECONDS / seconds))
    return _Plan(repeats, warm=seconds < WARM_CALL_LIMIT)


def _sample(run: Callable[[], Any], plan: _Plan) -> float:
    """Return seconds per call, measured when all other threads are idle and, for short calls, its own are awake."""
    _settle()
    start = time.perf_counter()
    while plan.warm and time.perf_counter() - start < WARM_SECONDS:
        run()
    return _time(run, plan.repeats)


def _gauged(gauge: Callable[[], float]) -> float:
    """Return the seconds that a gauge measures when all other threads are idle."""
    _settle()
    return max(gauge(), 1e-9)


def _settle() -> None:
    """Wait until this process is nearly idle, at most MAX_SETTLE_SECONDS."""
    deadline = time.perf_counter() + MAX_SETTLE_SECONDS
    while time.perf_counter() < deadline:
        start, busy = time.perf_counter(), time.process_time()
        time.sleep(IDLE_WINDOW)
        if time.process_time() - busy < IDLE_SHARE * (time.perf_counter() - start):
            return


def _time(run: Callable[[], Any], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return max((time.perf_counter() - start) / repeats, 1e-9)


def ratios(samples: Mapping[str, Sequence[float]], own: str) -> dict[str, Quartiles]:
    """Return each peer's time divided by `own`'s in the same round; above 1, `own` is faster."""
    return {
        name: Quartiles.of([peer / mine for peer, mine in zip(times, samples[own], strict=True)])
        for name, times in samples.items()
        if name != own
    }


class Peaks:
    """The machine's peak rates, measured together with the workloads.

    Parameters
    ----------
    threads : int
    seconds : float
        Duration of one measurement.
    """

    def __init__(self, threads: int, seconds: float) -> None:
        self.threads = threads
        self.seconds = seconds
        self.isa = selfattn.active_isa()

    def flops(self, dtype: str) -> float:
        """FLOP/s of a multiply-add loop on one core, times the number of threads."""
        return float(_core.measure_product_peak(self.isa, dtype, self.seconds)) * self.threads

    def bandwidth(self, num_bytes: int) -> float:
        """Bytes/s of all threads repeatedly reading an array of this size."""
        return float(_core.measure_read_bandwidth(num_bytes, self.threads, self.seconds))
