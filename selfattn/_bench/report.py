"""Reports results as a table for people and as JSON for programs."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import selfattn

from .measure import Result
from .peers import OWN, PEERS, others

ISA_VARIABLES = ("SELFATTN_ISA", "ATEN_CPU_CAPABILITY")  # variables that limit the ISA of selfattn and PyTorch
VARIABLES = (
    *ISA_VARIABLES,
    "MKL_ENABLE_INSTRUCTIONS",
    "ONEDNN_MAX_CPU_ISA",
    "XLA_FLAGS",
    "OMP_WAIT_POLICY",
    "OMP_PROC_BIND",
    "GOMP_SPINCOUNT",
)


def table(results: Sequence[Result]) -> str:
    """Return one line per workload and number of threads, then geometric means and what was skipped."""
    lines = [heading(to_record(results)), "", *table_lines(results)]
    lines.append("\nvs: the peer's time over selfattn's, median of interleaved rounds [quartiles].")
    return "\n".join(lines)


def table_lines(results: Sequence[Result]) -> list[str]:
    """Return the lines of the table, without the heading that is common to all results."""
    peers = peers_seen(results)
    header = ["workload", "threads", "time", "rate", "of peak"]
    rows = [header + [f"vs {PEERS[name].label}" for name in peers]]
    rows += [_row(result, peers) for result in results]
    for threads in sorted({result.threads for result in results}):
        rows.append(_mean_row([r for r in results if r.threads == threads], threads, peers))
    return [*_aligned(rows), *_storage_lines(results), *_skipped_lines(results)]


def heading(record: Mapping[str, Any]) -> str:
    """Return a description of the run: ISA, versions, processor, environment variables and missing peers."""
    isas = ", ".join(sorted({result["isa"] for result in record["results"]}))
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    environment = {**dict.fromkeys(ISA_VARIABLES, "not set"), **record["environment"]}
    lines = [
        f"ISA {isas}; {versions}",
        f"processor: {record['machine']['processor']}",
        f"environment: {', '.join(f'{name} {value}' for name, value in environment.items())}",
    ]
    if record["missing"]:
        lines.append(f"not installed: {', '.join(record['missing'])}")
    return "\n".join(lines)


def peers_seen(results: Sequence[Result]) -> list[str]:
    """Return the names of all requested peers except selfattn, in the order of the columns."""
    seen = {name for result in results for name in (*result.times, *result.skipped)}
    return [name for name in PEERS if name in seen and name != OWN.name and PEERS[name].in_tables]


def _row(result: Result, peers: Sequence[str]) -> list[str]:
    return [
        result.workload.name,
        str(result.threads),
        format_seconds(result.times[OWN.name].median),
        f"{result.rate() / 1e9:.1f} {result.unit}",
        f"{result.fraction_of_peak:.0%}",
        *(_ratio(result, name) for name in peers),
    ]


def _ratio(result: Result, peer: str) -> str:
    if peer not in result.ratios:
        return "-"
    ratio = result.ratios[peer]
    return f"{ratio.median:.2f}x [{ratio.q1:.2f}, {ratio.q3:.2f}]"


def _mean_row(results: Sequence[Result], threads: int, peers: Sequence[str]) -> list[str]:
    means = (geometric_mean(results, name) for name in peers)
    return [
        "geometric mean",
        str(threads),
        "",
        "",
        "",
        *("-" if mean is None else f"{mean:.2f}x" for mean in means),
    ]


def geometric_mean(results: Sequence[Result], peer: str) -> float | None:
    """Return the geometric mean of the median ratios to a peer over the workloads that it ran."""
    medians = [result.ratios[peer].median for result in results if peer in result.ratios]
    return float(np.exp(np.mean(np.log(medians)))) if medians else None


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align columns to their widest cell: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _storage_lines(results: Sequence[Result]) -> list[str]:
    """Return lines with the errors from rounding to a cache's dtype."""
    errors = {r.workload.name: r.storage_error for r in results if r.storage_error is not None}
    lines = [f"  {name}: {error:.2%} of sum p|v|" for name, error in errors.items()]
    return ["", "largest error by storing k and v:", *lines] if lines else []


def _skipped_lines(results: Sequence[Result]) -> list[str]:
    reasons: dict[tuple[str, str], list[str]] = {}
    for result in results:
        for peer, reason in result.skipped.items():
            if not PEERS[peer].in_tables:
                continue
            names = reasons.setdefault((peer, reason), [])
            if result.workload.name not in names:
                names.append(result.workload.name)
    lines = [f"  {PEERS[peer].label}: {', '.join(names)}: {reason}" for (peer, reason), names in reasons.items()]
    return ["", "not run:", *lines] if lines else []


def format_seconds(seconds: float) -> str:
    """Format with three significant digits in a suitable unit."""
    for factor, unit in ((1e6, "us"), (1e3, "ms")):
        if seconds * factor < 1000:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds:.3g} s"


def count_threads(threads: int) -> str:
    """Return "1 thread" or "n threads"."""
    return f"{threads} thread" if threads == 1 else f"{threads} threads"


def to_record(results: Sequence[Result]) -> dict[str, Any]:
    """Return all results and everything known about the machine and software, as plain types."""
    return {
        "versions": _versions(results),
        "missing": [peer.label for peer in others() if not peer.available()],
        "machine": {
            "platform": platform.platform(),
            "processor": processor_name(),
            "cpu_count": os.cpu_count(),
        },
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "config": selfattn.show_config(mode="dicts"),
        "runtime": selfattn.show_runtime(mode="dicts"),
        "results": [result.to_dict() for result in results],
    }


def write_json(results: Sequence[Result], path: str | Path) -> None:
    """Write `to_record` to a file."""
    text = json.dumps(to_record(results), indent=1, default=str)
    Path(path).write_text(text + "\n", encoding="utf-8")


def processor_name() -> str:
    """Return the processor's model name if the system reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _versions(results: Sequence[Result]) -> dict[str, str]:
    """Return the versions of Python and of everything that was measured."""
    measured = {name for result in results for name in result.times} | {OWN.name}
    versions = {peer.label: peer.version() for peer in (OWN, *others()) if peer.name in measured}
    return {**versions, "Python": platform.python_version()}
