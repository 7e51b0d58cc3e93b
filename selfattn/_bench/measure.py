"""Measures one workload with all peers: checks every result, then times the peers in alternation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

import selfattn

from .check import Mismatch, check, check_coarsely, check_everywhere, coarse_error, expected_parts, storage_error
from .peer import CannotRun, Own, Peer, Run
from .peers import OWN, PEERS
from .timing import BANDWIDTH, Gauges, Peaks, Quartiles, interleave, ratios
from .workload import Arrays, Workload

PEAK_SHARE = 0.05  # share of a workload's time budget for each of four peak measurements
PEAK_SECONDS = (0.005, 0.1)  # shortest and longest peak measurement
MAX_STORAGE_ERROR = 0.02  # relative to sum p|v|: above the error of any cache dtype, below the error of a wrong scale


@dataclass(frozen=True)
class Result:
    """The measurements of one workload with one number of threads.

    Attributes
    ----------
    workload : Workload
    threads : int
    isa : str
        The ISA that selfattn used.
    rounds : int
    times : dict of str to Quartiles
        Seconds per call, by peer.
    ratios : dict of str to Quartiles
        The peer's time divided by selfattn's in the same round.
    errors : dict of str to float
        Largest error found before timing, as a fraction of its bound.
    skipped : dict of str to str
        Peers that did not run, and why.
    flop_peak : float
        FLOP/s of register-only multiply-adds on the unit for the products' dtype, measured in the same run.
    bandwidth : float
        Bytes/s when reading an array as large as K and V, measured in the same run. If K and V come from a cache, it is
        measured in every round: this is the median, and times and ratios have an entry "bandwidth".
    storage_error : float, optional
        Largest error from rounding to a cache's dtype, as a fraction of sum p|v|.
    """

    workload: Workload
    threads: int
    isa: str
    rounds: int
    times: dict[str, Quartiles]
    ratios: dict[str, Quartiles]
    errors: dict[str, float]
    skipped: dict[str, str] = field(default_factory=dict)
    flop_peak: float = float("nan")
    bandwidth: float = float("nan")
    storage_error: float | None = None

    @property
    def peak(self) -> float:
        """Return the upper bound of the workload's rate: bandwidth if it is memory-bound, otherwise FLOP/s."""
        return self.bandwidth if self.workload.memory_bound else self.flop_peak

    @property
    def work(self) -> int:
        """Bytes of K and V if the workload is memory-bound, otherwise FLOPs."""
        return self.workload.kv_bytes() if self.workload.memory_bound else self.workload.flops()

    @property
    def unit(self) -> str:
        """Unit of rate and peak after division by 1e9."""
        return "GB/s" if self.workload.memory_bound else "GFLOP/s"

    def rate(self, peer: str = OWN.name) -> float:
        """Work per second at the median time."""
        return self.work / self.times[peer].median

    @property
    def fraction_of_peak(self) -> float:
        """selfattn's rate divided by the peak; if each round measured the peak, the median over the rounds."""
        if BANDWIDTH in self.ratios:
            return self.ratios[BANDWIDTH].median
        return self.rate() / self.peak

    def to_dict(self) -> dict[str, Any]:
        """Return all fields and derived figures as plain types."""
        record = asdict(self)
        record["flops"] = self.workload.flops()
        record["kv_bytes"] = self.workload.kv_bytes()
        record["unit"] = self.unit
        record["rates"] = {name: self.rate(name) / 1e9 for name in self.times}
        record["operand_bytes"] = self.workload.operand_bytes()
        record["fraction_of_peak"] = self.fraction_of_peak
        return record

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Result:
        """Restore a result from `to_dict`."""
        return cls(
            workload=Workload.from_dict(record["workload"]),
            threads=record["threads"],
            isa=record["isa"],
            rounds=record["rounds"],
            times={name: Quartiles(**value) for name, value in record["times"].items()},
            ratios={name: Quartiles(**value) for name, value in record["ratios"].items()},
            errors=record["errors"],
            skipped=record["skipped"],
            flop_peak=record["flop_peak"],
            bandwidth=record["bandwidth"],
            storage_error=record.get("storage_error"),
        )


def measure(workload: Workload, peers: Sequence[Peer], threads: int, seconds: float) -> Result:
    """Check and time one workload.

    Parameters
    ----------
    workload : Workload
    peers : sequence of Peer
        selfattn is always measured, even if it is not among them.
    threads : int
        Number of threads for selfattn and every peer.
    seconds : float
        Time budget of the interleaved rounds.

    Raises
    ------
    Mismatch
        If any peer's result is outside the error bound; nothing is timed in that case.
    """
    arrays = workload.make_arrays()
    runs, skipped = prepare(workload, peers, arrays, threads)
    errors = check_all(workload, arrays, runs, peers)
    stored = check_storage(workload, arrays, runs[OWN.name])
    peaks = Peaks(threads, float(np.clip(PEAK_SHARE * seconds, *PEAK_SECONDS)))
    before = _both_peaks(peaks, workload)
    samples = interleave(runs, seconds, _gauges(peaks, workload))
    after = _both_peaks(peaks, workload)
    times = {name: Quartiles.of(taken) for name, taken in samples.items()}
    bandwidth = max(before[1], after[1])
    if BANDWIDTH in times:
        bandwidth = workload.kv_bytes() / times[BANDWIDTH].median
    return Result(
        workload=workload,
        threads=threads,
        isa=selfattn.active_isa(),
        rounds=len(samples[OWN.name]),
        times=times,
        ratios=ratios(samples, OWN.name),
        errors=errors,
        skipped=skipped,
        flop_peak=max(before[0], after[0]),
        bandwidth=bandwidth,
        storage_error=stored,
    )


def prepare(
    workload: Workload, peers: Sequence[Peer], arrays: Arrays, threads: int
) -> tuple[dict[str, Run], dict[str, str]]:
    """Prepare the call of every peer that can run the workload; also return why the others cannot."""
    runs = {OWN.name: PEERS[OWN.name].prepare(workload, arrays, threads)}
    skipped = {}
    for peer in peers:
        if peer.name in runs:
            continue
        reason = peer.why_not(workload) or _why_no_cache(peer, workload)
        if not reason:
            try:
                runs[peer.name] = peer.prepare(workload, arrays, threads)
            except CannotRun as error:
                reason = str(error)
        if reason:
            skipped[peer.name] = reason
    return runs, skipped


def check_all(workload: Workload, arrays: Arrays, runs: dict[str, Run], peers: Sequence[Peer]) -> dict[str, float]:
    """Return every peer's largest error as a fraction of its bound; raises `Mismatch` above 1."""
    known = {peer.name: peer for peer in (OWN, *peers)}
    parts = expected_parts(workload, PEERS[OWN.name].held(workload, arrays))
    trusted = np.asarray(runs[OWN.name]())
    errors = {OWN.name: check(f"{OWN.name} on {workload.name}", trusted, parts)}
    for name, run in runs.items():
        if name == OWN.name:
            continue
        out, label = np.asarray(run()), f"{name} on {workload.name}"
        peer, allowed = known[name], coarse_error(workload)
        answered = peer.answered(workload)
        if answered != workload:
            held = peer.held(answered, peer.operands(workload, arrays))
            errors[name] = check(label, out, expected_parts(answered, held))
        elif allowed and not isinstance(peer, Own):
            errors[name] = check_coarsely(label, out, trusted, allowed)
        else:
            check_everywhere(label, out, trusted, parts)
            errors[name] = check(label, out, parts)
    return errors


def check_storage(workload: Workload, arrays: Arrays, run: Run) -> float | None:
    """Return the error from rounding to a cache's dtype; None if nothing is rounded.

    Raises
    ------
    Mismatch
        If it is larger than any dtype explains.
    """
    if not _rounds(workload):
        return None
    error = storage_error(workload, arrays, np.asarray(run()))
    if not error <= MAX_STORAGE_ERROR:
        raise Mismatch(f"{workload.name}: storing k and v has an error of {error:.2g} of sum p|v|")
    return error


def _rounds(workload: Workload) -> bool:
    return workload.cache is not None and workload.cache.storage(workload.dtype) != workload.dtype


def _why_no_cache(peer: Peer, workload: Workload) -> str:
    if workload.cache is None or isinstance(peer, Own):
        return ""
    if workload.cache.step:
        return "it appends nothing"
    return "its keys and values are not stored in another type" if _rounds(workload) else ""


def _gauges(peaks: Peaks, workload: Workload) -> Gauges:
    """Return the gauges of every round: for caches, the time to read as many bytes as the cache holds."""
    size = workload.kv_bytes()
    return {} if workload.cache is None else {BANDWIDTH: lambda: size / peaks.bandwidth(size)}


def _both_peaks(peaks: Peaks, workload: Workload) -> tuple[float, float]:
    return peaks.flops(workload.product_dtype), peaks.bandwidth(workload.kv_bytes())
