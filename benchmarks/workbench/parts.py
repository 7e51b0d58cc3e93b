"""Plots how results split into the products at peak rate and the softmax, compared with the time of the whole call."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from selfattn._bench.measure import Result
from selfattn._bench.peers import OWN
from selfattn._bench.report import count_threads, format_seconds

from .peers import NARROW_HEADS

PRODUCTS, SOFTMAX = "#2a7f9e", "#e0a458"  # distinguishable in grey and by colour-blind readers
BAR_HEIGHT = 0.7


class Parts(NamedTuple):
    """Seconds of a call, and of its unavoidable parts.

    Attributes
    ----------
    products : float
        Time of the products' FLOPs at the peak rate measured together with the call.
    softmax : float
        Time that does not grow with head_dim: a line through the times of two narrower head sizes, at head_dim 0.
    reached : float
    """

    products: float
    softmax: float
    reached: float


def parts(result: Result) -> Parts | None:
    """Split a result into its parts; None if the narrower heads were not measured with it."""
    reached = result.times[OWN.name].median
    seconds = []
    for heads in NARROW_HEADS:
        if heads.name in result.times:
            seconds.append(result.times[heads.name].median)
        elif result.workload.head_dim == heads.head_dim:
            seconds.append(reached)
        else:
            return None
    low, high = (heads.head_dim for heads in NARROW_HEADS)
    softmax = (high * seconds[0] - low * seconds[1]) / (high - low)
    return Parts(result.workload.flops() / result.flop_peak, max(softmax, 0.0), reached)


def write_parts(results: Sequence[Result], path: str | Path) -> None:
    """Draw all results that can be split into parts: a row per dtype, a column per number of threads.

    Times are fractions of the whole call. If a bar ends below 1, the rest of the time is lost. If it ends above 1, the
    parts overlapped.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    ValueError
        If there is no such result.
    """
    taken = [(result, found) for result in results if (found := parts(result)) is not None]
    if not taken:
        raise ValueError("plot: no result was measured with narrower heads: measure the group prefill in a 16-bit type")
    # Avoid pyplot, which would keep the figure alive and might need a display.
    figure_class = importlib.import_module("matplotlib.figure").Figure
    types = list(dict.fromkeys(result.workload.dtype for result, _ in taken))
    threads = sorted({result.threads for result, _ in taken})
    longest = max(sum(r.workload.dtype == dtype for r, _ in taken) for dtype in types) / len(threads)
    size = (6.5 * len(threads), (1.2 + 0.22 * max(longest, 4)) * len(types))
    figure = figure_class(figsize=size, layout="constrained")
    panels = figure.subplots(len(types), len(threads), squeeze=False)
    for row, dtype in zip(panels, types, strict=True):
        for axes, count in zip(row, threads, strict=True):
            shown = [(r, p) for r, p in taken if r.workload.dtype == dtype and r.threads == count]
            _draw(axes, shown)
            isa = ", ".join(sorted({result.isa for result, _ in shown}))
            axes.set_title(f"{dtype}, {count_threads(count)}, ISA {isa}", fontsize=10)
    figure.savefig(path, dpi=150)


def _draw(axes: Any, shown: Sequence[tuple[Result, Parts]]) -> None:
    names = [result.workload.name for result, _ in shown]
    products = [found.products / found.reached for _, found in shown]
    softmax = [found.softmax / found.reached for _, found in shown]
    places = range(len(names))
    axes.barh(places, products, height=BAR_HEIGHT, color=PRODUCTS, label="products at the peak")
    axes.barh(places, softmax, left=products, height=BAR_HEIGHT, color=SOFTMAX, label="softmax")
    axes.axvline(1, color="black", linewidth=1, label="reached")
    for place, (_, found) in enumerate(shown):
        text = f" {format_seconds(found.reached)}"
        axes.text(max(1.0, products[place] + softmax[place]), place, text, va="center", fontsize=7)
    axes.set_yticks(places, names, fontsize=7)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, 1.2 * max([1.0, *(p + s for p, s in zip(products, softmax, strict=True))]))
    axes.set_xlabel("share of the time of the whole call")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.08 - 1.0 / max(len(names), 4)), ncols=3)
