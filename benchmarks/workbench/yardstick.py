"""What results are held against: a peer's time, the machine's peak, fewer queries, or nothing but the clock."""

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
FEWER = "fewer"
TIME = "time"
OVERHEAD = "overhead"


class Yardstick(ABC):
    """Gives every result a value: a ratio, the higher the better, unless `limits` says otherwise.

    Attributes
    ----------
    label : str
        What people read.
    limits : bool
        Whether a target is the most that is allowed, of a value that means something by itself.
    """

    label: str
    limits = False

    @abstractmethod
    def value(self, result: Result, results: Sequence[Result]) -> float | None:
        """Measure a result by this; None if that cannot be done.

        Parameters
        ----------
        result : Result
        results : sequence of Result
            All of the group with as many threads.
        """

    def seconds(self, result: Result) -> float:
        """Return what the yardstick's own call took, if it is one; infinity otherwise."""
        return float("inf")

    def written(self, value: float) -> str:
        """Write a value as it is read."""
        return f"{value:.2f}x"

    def share(self, value: float, target: float) -> float:
        """Return how much of a target is reached; 1 and more meet it."""
        return target / value if self.limits else value / target


class PeerTime(Yardstick):
    """A peer's time over selfattn's."""

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
    """The fraction of what bounds the machine."""

    label = "peak"

    def value(self, result: Result, results: Sequence[Result]) -> float | None:
        """See `Yardstick.value`."""
        return result.fraction_of_peak

    def written(self, value: float) -> str:
        """See `Yardstick.written`."""
        return f"{value:.0%}"


class FewerQueries(Yardstick):
    """Queries per second over those of the next smaller number of queries that was measured of the same series.

    Where one kernel hands over to another, more queries must not take much longer than in proportion.
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
    """The seconds of a call, from Python and back."""

    label = "time of a call"
    limits = True

    def value(self, result: Result, results: Sequence[Result]) -> float | None:
        """See `Yardstick.value`."""
        return result.times[OWN.name].median

    def written(self, value: float) -> str:
        """See `Yardstick.written`."""
        return format_seconds(value)


class TimesOf(PeerTime):
    """selfattn's time over a variant's of its own."""

    limits = True

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.label = f"time over that of {PEERS[name].label}"

    def value(self, result: Result, results: Sequence[Result]) -> float | None:
        """See `Yardstick.value`."""
        ratio = super().value(result, results)
        return None if ratio is None else 1 / ratio


class StepOverhead(CallTime):
    """The seconds of a step that do not grow with its keys: a straight line through two numbers of keys, at none."""

    label = "overhead of a step"

    def value(self, result: Result, results: Sequence[Result]) -> float | None:
        """See `Yardstick.value`."""
        twice = result.times.get(TWICE)
        return None if twice is None else max(2 * result.times[OWN.name].median - twice.median, 1e-9)


def _series(workload: Workload) -> Workload:
    """Leave out what tells apart workloads that differ in the number of queries only."""
    return replace(workload, name="", why="", q_len=0)


def _queries_per_second(result: Result) -> float:
    return result.workload.q_len / result.times[OWN.name].median


YARDSTICKS: dict[str, Yardstick] = {
    **{name: PeerTime(name) for name in PEERS if name != OWN.name},
    PEAK: Peak(),
    FEWER: FewerQueries(),
    TIME: CallTime(),
    **{name: TimesOf(name) for name in (CONTIGUOUS, ONE_QUERY)},
    OVERHEAD: StepOverhead(),
}
