"""Writes results as Markdown tables, and inserts them into a document."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from selfattn._bench.measure import Result
from selfattn._bench.peers import OWN, PEERS
from selfattn._bench.report import format_seconds, heading, peers_seen

from .grid import GROUPS
from .target import Group, judge

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
ABSENT = "–"


def markdown(record: dict[str, Any], results: Sequence[Result], groups: Mapping[str, Group] = GROUPS) -> str:
    """Return a table for every group with any measurement, followed by its verdicts."""
    parts = ["\n".join(f"- {line}" for line in heading(record).splitlines())]
    for group in groups.values():
        shown: dict[str, dict[int, Result]] = {workload.name: {} for workload in group.workloads}
        for result in results:
            if result.workload.name in shown:
                shown[result.workload.name][result.threads] = result
        parts += _group_parts(group, {name: by_threads for name, by_threads in shown.items() if by_threads})
    return "\n\n".join(parts)


def _group_parts(group: Group, shown: dict[str, dict[int, Result]]) -> list[str]:
    """Return heading, table and verdicts; an empty list if no workload was measured."""
    results = [result for by_threads in shown.values() for result in by_threads.values()]
    if not results:
        return []
    threads = sorted({result.threads for result in results})
    peers = peers_seen(results)
    header = ["workload", "time", "rate", "of peak", *(PEERS[name].label for name in peers)]
    lines = [_line(header), _line(["---", *["--:"] * (len(header) - 1)])]
    for name, by_threads in shown.items():
        columns = [_cells(by_threads[count], peers) if count in by_threads else None for count in threads]
        lines.append(_line([f"`{name}`", *_joined(columns, len(header) - 1)]))
    verdicts = [f"- {verdict}" for verdict in judge(group, results)]
    counts = " / ".join(map(str, threads))
    return [f"### {group.title}", f"Threads: {counts}.", "\n".join(lines), "\n".join(verdicts)]


def _cells(result: Result, peers: Sequence[str]) -> list[str]:
    return [
        format_seconds(result.times[OWN.name].median),
        f"{result.rate() / 1e9:.0f} {result.unit}",
        f"{result.fraction_of_peak:.0%}",
        *(f"{result.ratios[name].median:.2f}×" if name in result.ratios else ABSENT for name in peers),
    ]


def _joined(columns: Sequence[list[str] | None], count: int) -> list[str]:
    """Join the cells of several numbers of threads; a cell that is absent for all of them becomes a single sign."""
    rows = [[ABSENT] * count if column is None else column for column in columns]
    return [ABSENT if set(cells) == {ABSENT} else " / ".join(cells) for cells in zip(*rows, strict=True)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def fill(
    path: str | Path,
    record: dict[str, Any],
    results: Sequence[Result],
    picture: str | Path | None = None,
    groups: Mapping[str, Group] = GROUPS,
) -> None:
    """Replace the text between the two marks of a Markdown file.

    Parameters
    ----------
    path : str or Path
    record, results
        The results of `read_records`.
    picture : str or Path, optional
        A roofline to show above the tables.
    groups : mapping of name to Group
        The grid that the results come from.

    Raises
    ------
    ValueError
        If the file does not contain each mark exactly once, in order.
    """
    text = Path(path).read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after or END in before or END in after:
        raise ValueError(f"bench: {path} must hold {BEGIN} and {END}, once each and in this order")
    shown = ""
    if picture is not None:
        target = Path(os.path.relpath(picture, Path(path).parent)).as_posix()
        shown = f"![Roofline: FLOP per byte against GFLOP/s]({target})\n\n"
    tables = markdown(record, results, groups)
    Path(path).write_text(f"{before}{BEGIN}\n\n{shown}{tables}\n\n{END}{after}", encoding="utf-8")
