"""Plots results as a roofline: FLOP/s over arithmetic intensity, below the machine's limits."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from selfattn._bench.measure import Result
from selfattn._bench.peers import OWN
from selfattn._bench.report import count_threads

from .grid import GROUPS

MARKERS = "osD^vP*X"
COLORS = ("#2a7f9e", "#c8553d", "#6a4c93", "#2e8b57", "#b8860b", "#444444", "#d1495b", "#00798c")
TYPES = ("float32", "bfloat16", "float16")  # the dtypes that are drawn, from the top
FEW_BYTES = 2**20  # smaller K and V say nothing about memory bandwidth
FEW_FLOPS = 1e5  # smaller workloads say nothing about a processor's speed
INTENSITY_MARGIN = 2.0  # factor by which the axes extend beyond the outermost points
LEVEL_MARGIN = 2.0  # factor above the highest roof


class Stream(NamedTuple):
    """A number of bytes, and the bytes/s when they are read repeatedly."""

    size: int
    bandwidth: float


def intensity(result: Result) -> float:
    """Return FLOPs per byte of operands and result."""
    return result.workload.flops() / result.workload.operand_bytes()


def _gflops(result: Result) -> float:
    return result.workload.flops() / result.times[OWN.name].median / 1e9


def roofs(results: Sequence[Result]) -> tuple[float, Stream, Stream]:
    """Return the peak FLOP/s, and the streams for the largest K and V and for the smallest ones above a MiB.

    The largest come from memory; the smallest stay in a CPU cache.
    """
    streams = [Stream(result.workload.kv_bytes(), result.bandwidth) for result in results]
    streams = sorted(stream for stream in streams if stream.size >= FEW_BYTES) or sorted(streams)
    return max(result.flop_peak for result in results), streams[-1], streams[0]


def write_roofline(results: Sequence[Result], path: str | Path) -> None:
    """Draw results: a row per dtype, a column per number of threads. The suffix of `path` determines the format.

    Leaves out float64, float32 at a lower precision, which has a different roof, and workloads that consist only of a
    call's overhead, for which the machine's roofs are meaningless.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    ValueError
        If there is no such result.
    """
    results = [r for r in results if r.workload.precision == "highest" and r.workload.flops() >= FEW_FLOPS]
    types = [dtype for dtype in TYPES if any(result.workload.dtype == dtype for result in results)]
    if not types:
        raise ValueError(f"plot: no result of {', '.join(TYPES)} to draw")
    # Avoid pyplot, which would keep the figure alive and might need a display.
    figure_class = importlib.import_module("matplotlib.figure").Figure
    threads = sorted({result.threads for result in results})
    figure = figure_class(figsize=(6.5 * len(threads), 5 * len(types)), layout="constrained")
    panels = figure.subplots(len(types), len(threads), squeeze=False)
    for row, dtype in zip(panels, types, strict=True):
        for axes, count in zip(row, threads, strict=True):
            shown = [result for result in results if result.threads == count and result.workload.dtype == dtype]
            _draw_panel(axes, shown, dtype, count)
    figure.savefig(path, dpi=150)


def _draw_panel(axes: Any, shown: Sequence[Result], dtype: str, count: int) -> None:
    if not shown:
        axes.set_axis_off()
        return
    _draw_roofs(axes, shown)
    _draw_points(axes, shown)
    isa = ", ".join(sorted({result.isa for result in shown}))
    axes.set_title(f"{dtype}, {count_threads(count)}, ISA {isa}", fontsize=10)


def _draw_roofs(axes: Any, results: Sequence[Result]) -> None:
    peak, memory, cache = roofs(results)
    low = min(map(intensity, results)) / INTENSITY_MARGIN
    high = max(map(intensity, results)) * INTENSITY_MARGIN
    x = np.geomspace(low, high, 200)
    for stream, style in ((memory, "-"), (cache, "--")):
        roof = np.minimum(peak, stream.bandwidth * x)
        text = f"{stream.bandwidth / 1e9:.0f} GB/s, reading {stream.size / 1e6:.3g} MB"
        axes.plot(x, roof / 1e9, color="black", linewidth=1, linestyle=style, label=text, zorder=1)
    axes.text(high, peak / 1e9, f"{peak / 1e9:.0f} GFLOP/s, multiply-adds ", ha="right", va="bottom", fontsize=7)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    slowest = min(map(_gflops, results))
    axes.set_ylim(10.0 ** np.floor(np.log10(slowest)), peak / 1e9 * LEVEL_MARGIN)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(which="major", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("FLOP per byte of operands and result")
    axes.set_ylabel("GFLOP/s")


def _draw_points(axes: Any, results: Sequence[Result]) -> None:
    """Draw the points with one marker per group; workloads without a group share one."""
    by_group: dict[str, list[Result]] = {}
    group_of = {workload.name: group.family for group in GROUPS.values() for workload in group.workloads}
    for result in results:
        by_group.setdefault(group_of.get(result.workload.name, "other"), []).append(result)
    for index, (name, members) in enumerate(by_group.items()):
        axes.scatter(
            [intensity(result) for result in members],
            [_gflops(result) for result in members],
            s=22,
            marker=MARKERS[index % len(MARKERS)],
            color=COLORS[index % len(COLORS)],
            label=name,
            zorder=2,
        )
    axes.legend(fontsize=7, loc="lower right")
