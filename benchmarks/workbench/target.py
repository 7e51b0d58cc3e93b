"""What a group of workloads must reach, and whether it did."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from selfattn._bench.measure import Result
from selfattn._bench.numbers import SUFFIXES
from selfattn._bench.peers import PEERS, others
from selfattn._bench.report import count_threads
from selfattn._bench.workload import Workload
from selfattn._typing import Precision

from .yardstick import YARDSTICKS, Yardstick


@dataclass(frozen=True)
class Target:
    """Values that must be reached by one yardstick.

    Attributes
    ----------
    against : str
        A key of `YARDSTICKS`: a peer's name, or one of those that are no peers.
    each : float
        What every workload must reach.
    mean : float, optional
        What the geometric mean must reach.
    threads : int, optional
        It counts with so many threads only; with any number by default.
    only : tuple of str
        Workloads it counts for; all of the group by default.
    longer_than : float
        Seconds that the yardstick's own call must take for the target to count.
    needs, without : str
        Part of the names of the ISAs that it counts for, and of those that it does not; all by default.
    """

    against: str
    each: float
    mean: float | None = None
    threads: int | None = None
    only: tuple[str, ...] = ()
    longer_than: float = 0.0
    needs: str = ""
    without: str = ""

    @property
    def yardstick(self) -> Yardstick:
        """What gives the values."""
        return YARDSTICKS[self.against]

    def __str__(self) -> str:
        written = self.yardstick.written
        mean = "" if self.mean is None else f"geomean {written(self.mean)}, "
        threads = "" if self.threads is None else f", {count_threads(self.threads)}"
        only = f" ({', '.join(self.only)})" if self.only else ""
        each = "each at most" if self.yardstick.limits else "each"
        isa = f", needs {self.needs.upper()}" if self.needs else ""
        isa += f", without {self.without.upper()}" if self.without else ""
        return f"{self.yardstick.label}{threads}{isa}: {mean}{each} {written(self.each)}{only}"

    def counts(self, isa: str) -> bool:
        """Whether results of this instruction set are judged."""
        return self.needs in isa and not (self.without and self.without in isa)

    def values(self, results: Sequence[Result]) -> dict[str, float]:
        """Values of the workloads it counts for, by name, out of a group's results with one number of threads."""
        counted = [r for r in results if not self.only or r.workload.name in self.only]
        counted = [r for r in counted if self.yardstick.seconds(r) > self.longer_than]
        found = {r.workload.name: self.yardstick.value(r, results) for r in counted}
        return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class Group:
    """Workloads of one kind in one type of numbers, and their targets.

    Attributes
    ----------
    name, title : str
    workloads : tuple of Workload
    targets : tuple of Target
    family : str
        The name of the group with the same workloads in their first type of numbers; its own by default.
    beside : tuple of str
        Variants that are measured without a target.
    """

    name: str
    title: str
    workloads: tuple[Workload, ...]
    targets: tuple[Target, ...]
    family: str = ""
    beside: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "family", self.family or self.name)

    @property
    def dtype(self) -> str:
        """Type of all its numbers."""
        return self.workloads[0].dtype

    @property
    def precision(self) -> Precision:
        """Precision of all its products."""
        return self.workloads[0].precision

    def varied(self, dtype: str, precision: Precision) -> Group:
        """Return the same workloads in another type of numbers or at another precision, without targets."""
        label, suffix = (dtype, dtype) if precision == "highest" else (f'{dtype} at precision "{precision}"', precision)
        workloads = tuple(workload.varied(dtype, precision) for workload in self.workloads)
        return Group(f"{self.name}-{SUFFIXES[suffix]}", f"{self.title}, {label}", workloads, (), self.family)

    def judged_by(self, targets: tuple[Target, ...], beside: tuple[str, ...] = ()) -> Group:
        """Return the same group with these targets, and variants measured beside."""
        return replace(self, targets=targets, beside=beside)

    def peers(self, names: Sequence[str], threads: int) -> list[str]:
        """Peers to measure: those of these names, and what else its targets are held against."""
        wanted = {target.against for target in self.targets if target.threads in (None, threads)} | {*self.beside}
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
    judged : bool
        Whether the target counts for the ISA that ran.
    """

    target: Target
    threads: int
    values: dict[str, float]
    judged: bool = True

    @property
    def mean(self) -> float:
        """Geometric mean of the values."""
        return float(np.exp(np.mean(np.log(list(self.values.values())))))

    @property
    def worst(self) -> str:
        """Name of the workload that is furthest from its target, or least beyond it."""
        return min(self.values, key=lambda name: self._share(self.values[name], self.target.each))

    @property
    def missed(self) -> bool:
        """Whether something was measured and is too low."""
        return self.state == "missed"

    @property
    def state(self) -> str:
        """Say "met" or "missed": whether all values and their mean are good enough; or why that is not the question."""
        if not self.judged:
            return f"needs {self.target.needs.upper()}"
        if not self.values:
            return "not measured"
        shares = [self._share(self.values[self.worst], self.target.each)]
        if self.target.mean is not None:
            shares.append(self._share(self.mean, self.target.mean))
        return "met" if min(shares) >= 1.0 else "missed"

    def _share(self, value: float, target: float) -> float:
        return self.target.yardstick.share(value, target)

    def __str__(self) -> str:
        head = f"{self.target.yardstick.label}, {count_threads(self.threads)}"
        if not self.judged or not self.values:
            return f"{head}: {self.state}"
        if self.target.only:
            count = len(self.values)
            head += f", {count} workload{'s'[: count - 1]}"
        summary = self._against_limit() if self.target.yardstick.limits else self._against_least()
        return f"{head}: {summary}: {self.state}"

    def _against_limit(self) -> str:
        written = self.target.yardstick.written
        return f"{self.worst} at most {written(self.target.each)}: {written(self.values[self.worst])}"

    def _against_least(self) -> str:
        target, written = self.target, self.target.yardstick.written
        mean, worst = written(self.mean), written(self.values[self.worst])
        if target.mean is not None:
            mean += f" (target {written(target.mean)})"
        return f"geomean {mean}, worst {worst} (target {written(target.each)}) {self.worst}"


def judge(group: Group, results: Sequence[Result]) -> list[Verdict]:
    """Hold the group's results against its targets; a peer must be no faster where it has no target."""
    names = {workload.name for workload in group.workloads}
    results = [result for result in results if result.workload.name in names]
    verdicts = []
    for target in (*group.targets, *_no_faster(group, results)):
        for threads in sorted({result.threads for result in results}):
            if target.threads in (None, threads):
                measured = [result for result in results if result.threads == threads]
                judged = all(target.counts(result.isa) for result in measured)
                if judged or target.needs:
                    verdicts.append(Verdict(target, threads, target.values(measured), judged))
    return verdicts


def _no_faster(group: Group, results: Sequence[Result]) -> Iterator[Target]:
    """Targets for what peers were measured on without one."""
    names = [workload.name for workload in group.workloads]
    isas = {result.isa for result in results}
    judging = [target for target in group.targets if all(map(target.counts, isas))]
    for peer in others():
        targets = [target for target in judging if target.against == peer.name]
        covered = {name for target in targets for name in target.only or names}
        measured = {result.workload.name for result in results if peer.name in result.ratios} - covered
        if measured:
            yield Target(peer.name, each=1.0, only=tuple(sorted(measured, key=names.index)) if covered else ())
