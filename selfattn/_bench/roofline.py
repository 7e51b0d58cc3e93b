"""Results as a roofline: arithmetic intensity against FLOP/s, below what the machine allows."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .grid import GROUPS
from .measure import Result
from .report import count_threads

MARKERS = "osD^vP*X"
COLORS = ("#2a7f9e", "#c8553d", "#6a4c93", "#2e8b57", "#b8860b", "#444444", "#d1495b", "#00798c")
FEW_BYTES = 2**20  # K and V below this size say nothing about a memory
INTENSITY_MARGIN = 2.0


def intensity(result: Result) -> float:
    """FLOPs per byte of operands and result."""
    return result.workload.flops() / result.workload.operand_bytes()


def roofs(results: Sequence[Result]) -> tuple[float, float, float]:
    """FLOP/s of registers, and bytes/s of the largest and of the smallest K and V above a MiB.

    The largest come from memory; the smallest stay in a cache.
    """
    sized = [result for result in results if result.workload.kv_bytes() >= FEW_BYTES] or list(results)
    by_size = sorted(sized, key=lambda result: result.workload.kv_bytes())
    return max(result.flop_peak for result in results), by_size[-1].bandwidth, by_size[0].bandwidth


def write_roofline(results: Sequence[Result], path: str | Path) -> None:
    """Draw float32 results, one panel per number of threads; the suffix of `path` gives the format.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    ValueError
        If there is no float32 result.
    """
    results = [result for result in results if result.workload.dtype == "float32"]
    if not results:
        raise ValueError("plot: no float32 result to draw")
    # The figure is built without pyplot, which would keep it alive and might want a screen.
    figure_class = importlib.import_module("matplotlib.figure").Figure
    threads = sorted({result.threads for result in results})
    figure = figure_class(figsize=(6.5 * len(threads), 5), layout="constrained")
    panels = figure.subplots(1, len(threads), squeeze=False)[0]
    for axes, count in zip(panels, threads, strict=True):
        shown = [result for result in results if result.threads == count]
        _draw_roofs(axes, shown)
        _draw_points(axes, shown)
        isa = ", ".join(sorted({result.isa for result in shown}))
        axes.set_title(f"{count_threads(count)}, ISA {isa}", fontsize=10)
    figure.savefig(path, dpi=150)


def _draw_roofs(axes: Any, results: Sequence[Result]) -> None:
    peak, memory, cache = roofs(results)
    low = min(map(intensity, results)) / INTENSITY_MARGIN
    high = max(map(intensity, results)) * INTENSITY_MARGIN
    x = np.geomspace(low, high, 200)
    axes.plot(x, np.minimum(peak, memory * x) / 1e9, color="black", linewidth=1.2, zorder=1)
    axes.plot(x, np.minimum(peak, cache * x) / 1e9, color="black", linewidth=0.8, linestyle="--", zorder=1)
    axes.text(high, peak / 1e9, f"multiply-adds: {peak / 1e9:.0f} GFLOP/s ", ha="right", va="bottom", fontsize=7)
    for bandwidth, label in ((memory, "largest K and V"), (cache, "smallest K and V")):
        start = low * 1.1
        text = f"read stream, {label}: {bandwidth / 1e9:.0f} GB/s"
        axes.text(start, bandwidth * start / 1e9, text, rotation=35, rotation_mode="anchor", fontsize=7)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.grid(which="major", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("FLOP per byte of operands and result")
    axes.set_ylabel("GFLOP/s")


def _draw_points(axes: Any, results: Sequence[Result]) -> None:
    """One sign per group; workloads of no group share one."""
    by_group: dict[str, list[Result]] = {}
    group_of = {workload.name: group.name for group in GROUPS.values() for workload in group.workloads}
    for result in results:
        by_group.setdefault(group_of.get(result.workload.name, "other"), []).append(result)
    for index, (name, members) in enumerate(by_group.items()):
        axes.scatter(
            [intensity(result) for result in members],
            [result.workload.flops() / result.times["selfattn"].median / 1e9 for result in members],
            s=22,
            marker=MARKERS[index % len(MARKERS)],
            color=COLORS[index % len(COLORS)],
            label=name,
            zorder=2,
        )
    axes.legend(fontsize=7, loc="lower right")
