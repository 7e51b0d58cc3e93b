"""The targets of groups of workloads, and whether they were met."""

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
    """Values that results must reach, measured by one yardstick.

    Attributes
    ----------
    against : str
        A key of `YARDSTICKS`: a peer's name, or a yardstick that is not a peer.
    each : float
        Value that every workload must reach.
    mean : float, optional
        Value that the geometric mean must reach.
    threads : int, optional
        The number of threads for which the target applies; any by default.
    only : tuple of str
        Workloads to which the target applies; by default all of the group.
    longer_than : float
        The target applies only if the yardstick's own call takes longer than this, in seconds.
    needs, without : str
        The target applies to ISAs whose name contains `needs` and does not contain `without`; by default to all.
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
        """The yardstick that measures the values."""
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
        """Whether the target applies to results of this instruction set."""
        return self.needs in isa and not (self.without and self.without in isa)

    def values(self, results: Sequence[Result]) -> dict[str, float]:
        """Return the values of the applicable workloads, by name, from results with one number of threads."""
        counted = [r for r in results if not self.only or r.workload.name in self.only]
        counted = [r for r in counted if self.yardstick.seconds(r) > self.longer_than]
        found = {r.workload.name: self.yardstick.value(r, results) for r in counted}
        return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class Group:
    """Workloads of one kind in one dtype, and their targets.

    Attributes
    ----------
    name, title : str
    workloads : tuple of Workload
    targets : tuple of Target
    family : str
        The name of the group with the same workloads in their original dtype; by default this group's own name.
    variants : tuple of str
        Variants that are measured without a target.
    """

    name: str
    title: str
    workloads: tuple[Workload, ...]
    targets: tuple[Target, ...]
    family: str = ""
    variants: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "family", self.family or self.name)

    @property
    def dtype(self) -> str:
        """The dtype of all its workloads."""
        return self.workloads[0].dtype

    @property
    def precision(self) -> Precision:
        """The precision of all its workloads."""
        return self.workloads[0].precision

    def varied(self, dtype: str, precision: Precision) -> Group:
        """Return the same workloads in another dtype or at another precision, without targets."""
        label, suffix = (dtype, dtype) if precision == "highest" else (f'{dtype} at precision "{precision}"', precision)
        workloads = tuple(workload.varied(dtype, precision) for workload in self.workloads)
        return Group(f"{self.name}-{SUFFIXES[suffix]}", f"{self.title}, {label}", workloads, (), self.family)

    def judged_by(self, targets: tuple[Target, ...], variants: tuple[str, ...] = ()) -> Group:
        """Return the same group with these targets, and additional variants to measure."""
        return replace(self, targets=targets, variants=variants)

    def peers(self, names: Sequence[str], threads: int) -> list[str]:
        """Return the peers to measure: those with these names, and others that its targets refer to."""
        wanted = {target.against for target in self.targets if target.threads in (None, threads)} | {*self.variants}
        return [*names, *(name for name in PEERS if name in wanted and not PEERS[name].by_default)]


@dataclass(frozen=True)
class Verdict:
    """The outcome of one target for a group with one number of threads.

    Attributes
    ----------
    target : Target
    threads : int
    values : dict of str to float
        The ratio or fraction of every applicable workload, by name; empty if nothing was measured.
    judged : bool
        Whether the target applies to the ISA that was used.
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
        """Name of the workload that misses its target by most, or exceeds it by least."""
        return min(self.values, key=lambda name: self._share(self.values[name], self.target.each))

    @property
    def missed(self) -> bool:
        """Whether something was measured and is too low."""
        return self.state == "missed"

    @property
    def state(self) -> str:
        """Return "met" if all values and their mean reach the target, else "missed"; or why it is not judged."""
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
    """Compare a group's results with its targets; a peer without a target must not be faster than selfattn."""
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
    """Yield targets for measured peers that have none: they must not be faster."""
    names = [workload.name for workload in group.workloads]
    isas = {result.isa for result in results}
    judging = [target for target in group.targets if all(map(target.counts, isas))]
    for peer in others():
        targets = [target for target in judging if target.against == peer.name]
        covered = {name for target in targets for name in target.only or names}
        measured = {result.workload.name for result in results if peer.name in result.ratios} - covered
        if measured:
            yield Target(peer.name, each=1.0, only=tuple(sorted(measured, key=names.index)) if covered else ())
