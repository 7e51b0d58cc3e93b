"""What a group of workloads must reach, and whether it did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .measure import Result
from .peers import OTHERS, PEERS
from .report import count_threads
from .workload import Workload

PEAK = "peak"  # the yardstick that is no peer: the fraction of what bounds the machine


@dataclass(frozen=True)
class Target:
    """Ratios that must be reached against one yardstick.

    Attributes
    ----------
    against : str
        A peer's name, or `PEAK`.
    floor : float
        What every workload must reach.
    mean : float, optional
        What the geometric mean must reach.
    threads : int, optional
        It counts with so many threads only; with any number by default.
    only : tuple of str
        Workloads it counts for; all of the group by default.
    longer_than : float
        Seconds that the yardstick's own call must take for the target to count.
    """

    against: str
    floor: float
    mean: float | None = None
    threads: int | None = None
    only: tuple[str, ...] = ()
    longer_than: float = 0.0

    @property
    def label(self) -> str:
        """Name the yardstick."""
        return "peak" if self.against == PEAK else PEERS[self.against].label

    def written(self, value: float) -> str:
        """Write a value as it is read: a fraction of the peak, or so many times."""
        return f"{value:.0%}" if self.against == PEAK else f"{value:.2f}x"

    def __str__(self) -> str:
        mean = "" if self.mean is None else f"geomean {self.written(self.mean)}, "
        threads = "" if self.threads is None else f", {count_threads(self.threads)}"
        only = f" ({', '.join(self.only)})" if self.only else ""
        return f"{self.label}{threads}: {mean}each {self.written(self.floor)}{only}"

    def applies(self, result: Result) -> bool:
        """Whether the target says anything about a result."""
        if self.only and result.workload.name not in self.only:
            return False
        if self.threads not in (None, result.threads):
            return False
        if self.against == PEAK:
            return True
        times = result.times.get(self.against)
        return times is not None and times.median > self.longer_than


@dataclass(frozen=True)
class Group:
    """Workloads of one kind, and their targets."""

    name: str
    title: str
    workloads: tuple[Workload, ...]
    targets: tuple[Target, ...]

    def peers(self, names: Sequence[str], threads: int) -> list[str]:
        """Peers to measure: those of these names, and what else its targets are held against."""
        wanted = {target.against for target in self.targets if target.threads in (None, threads)}
        return [*names, *(name for name in PEERS if name in wanted and not PEERS[name].by_default)]


@dataclass(frozen=True)
class Verdict:
    """How a group did against one target with one number of threads.

    Attributes
    ----------
    target : Target
    threads : int
    values : dict of str to float
        The ratio or fraction of every workload that counts, by name; empty if nothing was measured.
    """

    target: Target
    threads: int
    values: dict[str, float]

    @property
    def mean(self) -> float:
        """Geometric mean of the values."""
        return float(np.exp(np.mean(np.log(list(self.values.values())))))

    @property
    def worst(self) -> str:
        """Name of the workload with the lowest value."""
        return min(self.values, key=self.values.__getitem__)

    @property
    def missed(self) -> bool:
        """Whether something was measured and is too low."""
        return self.state == "missed"

    @property
    def state(self) -> Literal["met", "missed", "not measured"]:
        """Whether all values and their mean are high enough."""
        if not self.values:
            return "not measured"
        enough = self.values[self.worst] >= self.target.floor
        return "met" if enough and self.mean >= (self.target.mean or 0.0) else "missed"

    def __str__(self) -> str:
        target, head = self.target, f"{self.target.label}, {count_threads(self.threads)}"
        if not self.values:
            return f"{head}: not measured"
        mean, worst = target.written(self.mean), target.written(self.values[self.worst])
        if target.mean is not None:
            mean += f" (target {target.written(target.mean)})"
        floor = f"(target {target.written(target.floor)})"
        if target.only:
            count = len(self.values)
            head += f", {count} workload{'s'[: count - 1]}"
        return f"{head}: geomean {mean}, worst {worst} {floor} {self.worst}: {self.state}"


def judge(group: Group, results: Sequence[Result]) -> list[Verdict]:
    """Hold the group's results against its targets; a peer without a target must be no faster than selfattn."""
    names = {workload.name for workload in group.workloads}
    results = [result for result in results if result.workload.name in names]
    measured = {peer for result in results for peer in result.ratios}
    given = {target.against for target in group.targets}
    others = [peer.name for peer in OTHERS if peer.name in measured - given]
    verdicts = []
    for target in (*group.targets, *(Target(name, floor=1.0) for name in others)):
        for threads in sorted({result.threads for result in results}):
            if target.threads in (None, threads):
                counted = [r for r in results if r.threads == threads and target.applies(r)]
                verdicts.append(Verdict(target, threads, {r.workload.name: _value(target, r) for r in counted}))
    return verdicts


def _value(target: Target, result: Result) -> float:
    if target.against == PEAK:
        return result.fraction_of_peak
    return result.ratios[target.against].median
