"""Plots results: the speedup over one peer for each workload."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .measure import Result
from .peers import PEERS
from .report import count_threads
from .timing import Quartiles

FASTER, SLOWER = "#2a7f9e", "#c8553d"  # distinguishable in grey and by colour-blind readers
BAR_HEIGHT = 0.8
TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)


def write_plot(results: Sequence[Result], path: str | Path, peer: str = "pytorch") -> None:
    """Draw horizontal bars of the ratio to a peer on a logarithmic axis.

    Parameters
    ----------
    results : sequence of Result
    path : str or Path
        The suffix gives the format.
    peer : str
        The peer to compare with; if it was not measured, the first peer that was.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    ValueError
        If no peer was measured.
    """
    # Avoid pyplot, which would keep the figure alive and might need a display.
    figure_class = importlib.import_module("matplotlib.figure").Figure
    peer = _measured_peer(results, peer)
    shown = [result for result in results if peer in result.ratios]
    names = list(dict.fromkeys(result.workload.name for result in shown))
    threads = sorted({result.threads for result in shown})
    bars = len(names) * len(threads)
    figure = figure_class(figsize=(8, 1.4 + 0.24 * max(bars, 4)), layout="constrained")
    axes = figure.add_subplot()
    height = BAR_HEIGHT / len(threads)
    for index, count in enumerate(threads):
        chosen = [result for result in shown if result.threads == count]
        shift = (index - (len(threads) - 1) / 2) * height
        places = [names.index(result.workload.name) + shift for result in chosen]
        suffix = f" ({count_threads(count)})" if len(threads) > 1 else ""
        _draw_bars(axes, places, [result.ratios[peer] for result in chosen], height, suffix)
    _finish_axes(axes, names, shown, peer)
    figure.savefig(path, dpi=150)


def _measured_peer(results: Sequence[Result], wanted: str) -> str:
    measured = {name for result in results for name in result.ratios}
    if wanted in measured:
        return wanted
    for name in PEERS:
        if name in measured:
            return name
    raise ValueError("plot: no peer was measured to compare selfattn with")


def _draw_bars(axes: Any, places: Sequence[float], ratios: Sequence[Quartiles], height: float, suffix: str) -> None:
    """Draw bars from 1 to the median, with the quartiles as error bars and the median as text."""
    median = np.array([ratio.median for ratio in ratios])
    low = median - [ratio.q1 for ratio in ratios]
    high = np.array([ratio.q3 for ratio in ratios]) - median
    axes.barh(
        places,
        median - 1,
        left=1,
        height=height * 0.9,
        xerr=np.stack([low, high]).clip(min=0),
        color=[FASTER if value >= 1 else SLOWER for value in median],
        error_kw={"elinewidth": 0.8, "ecolor": "#333333"},
    )
    for y, ratio in zip(places, ratios, strict=True):
        axes.text(max(ratio.q3, 1), y, f" {ratio.median:.2f}{suffix}", va="center", fontsize=7)


def _finish_axes(axes: Any, names: Sequence[str], results: Sequence[Result], peer: str) -> None:
    label = PEERS[peer].label
    medians = [result.ratios[peer].median for result in results]
    low, high = min(1 / 1.5, *medians), max(1.5, *medians)
    axes.set_xscale("log")
    axes.set_xlim(low / 1.2, high * 1.6)
    ticks = [tick for tick in TICKS if low / 1.2 <= tick <= high * 1.6]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.axvline(1, color="black", linewidth=1)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    threads = ", ".join(str(count) for count in sorted({result.threads for result in results}))
    isa = ", ".join(sorted({result.isa for result in results}))
    axes.set_xlabel(f"{label} time / selfattn time: right of the line selfattn is faster")
    axes.set_title(f"selfattn against {label} (ISA {isa}, threads {threads})", fontsize=10)
