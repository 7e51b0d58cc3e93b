"""Yardsticks for results: a peer's time, the machine's peak, fewer queries, or absolute time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace

from selfattn._bench.measure import Result
from selfattn._bench.peers import OWN, PEERS
from selfattn._bench.report import format_seconds
from selfattn._bench.workload import Workload

from .cache_variants import CONTIGUOUS, ONE_QUERY, TWICE

PEAK = "peak"
UNIT = "unit"
FEWER = "fewer"
TIME = "time"
OVERHEAD = "overhead"


class Yardstick(ABC):
    """Assigns every result a value: a ratio, higher is better, unless `limits` is True.

    Attributes
    ----------
    label : str
        The name that is shown.
    limits : bool
        Whether a target is an upper limit of the value, so that lower is better.
    """

    label: str
    limits = False

    @abstractmethod
    def value(self, result: Result, results: Sequence[Result]) -> float | None:
        """Return a result's value; None if it cannot be determined.

        Parameters
        ----------
        result : Result
        results : sequence of Result
            All results of the group with the same number of threads.
        """

    def seconds(self, result: Result) -> float:
        """Return the seconds of the yardstick's own call; infinity if the yardstick is not a call."""
        return float("inf")

    def written(self, value: float) -> str:
        """Format a value for display."""
        return f"{value:.2f}x"

    def share(self, value: float, target: float) -> float:
        """Return the fraction of a target that is reached; it is met from 1 on."""
        return target / value if self.limits else value / target


class PeerTime(Yardstick):
    """A peer's time divided by selfattn's."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.label = PEERS[name].label

    def value(self, result: Result, results: Sequence[Result]) -> float | None:
        """See `Yardstick.value`."""
        ratio = result.ratios.get(self.name)
        return None if ratio is None else ratio.median

    def seconds(self, result: Result) -> float:
        """See `Yardstick.seconds`."""
        times = result.times.get(self.name)
        return 0.0 if times is None else times.median


class Peak(Yardstick):
    """The fraction of the machine's peak rate."""

    label = "peak"

    def value(self, result: Result, results: Sequence[Result]) -> float | None:
        """See `Yardstick.value`."""
        return result.fraction_of_peak

    def written(self, value: float) -> str:
        """See `Yardstick.written`."""
        return f"{value:.0%}"


class UnitPeak(Peak):
    """The fraction of the peak rate of the execution unit, for calls that read little for each multiplication."""

    label = "peak of the unit"

    def value(self, result: Result, results: Sequence[Result]) -> float | None:
        """See `Yardstick.value`."""
        return result.workload.flops() / result.times[OWN.name].median / result.flop_peak


class FewerQueries(Yardstick):
    """Queries per second, relative to the next smaller number of queries that was measured in the same series.

    At the switch from one kernel to another, the time must not grow much more than in proportion to the queries.
    """

    label = "queries per second with fewer queries"

    def value(self, result: Result, results: Sequence[Result]) -> float | None:
        """See `Yardstick.value`."""
        series, count = _series(result.workload), result.workload.q_len
        fewer = [r for r in results if r.workload.q_len < count and _series(r.workload) == series]
        if not fewer:
            return None
        return _queries_per_second(result) / _queries_per_second(max(fewer, key=lambda r: r.workload.q_len))


class CallTime(Yardstick):
    """The seconds of a call from Python, including the return."""

    label = "time of a call"
    limits = True

    def value(self, result: Result, results: Sequence[Result]) -> float | None:
        """See `Yardstick.value`."""
        return result.times[OWN.name].median

    def written(self, value: float) -> str:
        """See `Yardstick.written`."""
        return format_seconds(value)


class TimesOf(PeerTime):
    """selfattn's time divided by that of one of its variants."""

    limits = True

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.label = f"time over that of {PEERS[name].label}"

    def value(self, result: Result, results: Sequence[Result]) -> float | None:
        """See `Yardstick.value`."""
        ratio = super().value(result, results)
        return None if ratio is None else 1 / ratio


class StepOverhead(CallTime):
    """The part of a step's time that does not grow with its keys: a line through two numbers of keys, at 0 keys."""

    label = "overhead of a step"

    def value(self, result: Result, results: Sequence[Result]) -> float | None:
        """See `Yardstick.value`."""
        twice = result.times.get(TWICE)
        return None if twice is None else max(2 * result.times[OWN.name].median - twice.median, 1e-9)


def _series(workload: Workload) -> Workload:
    """Return a key that is equal for workloads that differ only in the number of queries."""
    return replace(workload, name="", why="", q_len=0)


def _queries_per_second(result: Result) -> float:
    return result.workload.q_len / result.times[OWN.name].median


YARDSTICKS: dict[str, Yardstick] = {
    **{name: PeerTime(name) for name in PEERS if name != OWN.name},
    PEAK: Peak(),
    UNIT: UnitPeak(),
    FEWER: FewerQueries(),
    TIME: CallTime(),
    **{name: TimesOf(name) for name in (CONTIGUOUS, ONE_QUERY)},
    OVERHEAD: StepOverhead(),
}
