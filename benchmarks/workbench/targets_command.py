"""The options and control flow of `benchmarks/targets.py` and `benchmarks/caches.py`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from selfattn._bench.command import add_axes, positive_int
from selfattn._bench.measure import Result
from selfattn._bench.numbers import why_no_numbers
from selfattn._bench.peers import OWN, choose, others
from selfattn._bench.report import heading, table_lines, to_record, write_json
from selfattn._bench.worker import WorkerFailed, measure_in_process
from selfattn._bench.workload import Workload

from .grid import GROUPS
from .limits import LIMITS, hold
from .markdown import fill, markdown
from .parts import write_parts
from .process import WORKER
from .record import read_records
from .roofline import write_roofline
from .target import Group, judge
from .vllm_peer import LIBRARY_VARIABLE

NOTE = """\
vs: the peer's time over selfattn's, median of interleaved rounds [quartiles].
A target holds for every workload ("worst") and, where "geomean" has one, for the geometric mean."""


def add_arguments(
    parser: argparse.ArgumentParser, grid: Mapping[str, Group] = GROUPS, peers: Sequence[str] | None = None
) -> None:
    """Add the command's options.

    Parameters
    ----------
    parser : ArgumentParser
    grid : mapping of name to Group
        Groups that can be measured. Only the first grid can be drawn.
    peers : sequence of str, optional
        Peers that are measured, if installed, when the user names none; by default all except NumPy.
    """
    parser.set_defaults(grid=grid, usual_peers=peers, roofline=None, parts=None)
    families = list(dict.fromkeys(group.family for group in grid.values()))
    parser.add_argument("--groups", nargs="+", choices=[*grid], metavar="GROUP", help=", ".join(families))
    add_axes(parser, "only groups")
    parser.add_argument("--isa", choices=list(LIMITS), help="hold selfattn and the peers to it")
    parser.add_argument("--workloads", nargs="+", metavar="NAME", help="only these of the groups' workloads")
    parser.add_argument("--list", action="store_true", help="list groups, workloads and targets, and stop")
    parser.add_argument("--threads", nargs="+", type=positive_int, default=[1, 2], metavar="N", help="default: 1 2")
    known = ", ".join(peer.name for peer in others())
    usual = "installed, not numpy" if peers is None else f"{', '.join(peers)} if installed"
    parser.add_argument("--peers", nargs="+", metavar="PEER", help=f"some of {known} (default: {usual})")
    parser.add_argument("--vllm", metavar="FILE", help=f"vLLM's shared library (default: {LIBRARY_VARIABLE})")
    parser.add_argument("--seconds", type=float, default=2.0, metavar="S", help="time per workload (default 2)")
    parser.add_argument("--json", metavar="FILE", help="write results to this file, after every group")
    parser.add_argument("--from", dest="files", nargs="+", metavar="FILE", help="measure nothing, report these files")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    parser.add_argument("--fill", metavar="FILE", help="put the tables into this Markdown file, at its marks")
    if grid is GROUPS:
        _add_drawings(parser)


def _add_drawings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--roofline", metavar="FILE", help="draw the roofline (needs matplotlib)")
    parser.add_argument("--parts", metavar="FILE", help="draw products and softmax of 16-bit prefill (the same)")


def run(args: argparse.Namespace) -> int:
    """Measure or read, and report.

    Returns
    -------
    int
        0, or 1 if a target was missed, or a result or an option was wrong.
    """
    if args.vllm:
        os.environ[LIBRARY_VARIABLE] = str(Path(args.vllm).resolve())
    try:
        if args.isa:
            hold(args.isa)
        groups = _chosen(args)
        if args.list:
            print("\n".join(_listed(groups)))
            return 0
        if args.files:
            record, results = read_records(args.files)
            failed = False
        else:
            results, failed = _measured(args, groups)
            record = to_record(results)
        missed = _report(args, groups, record, results)
        if args.roofline:
            write_roofline(results, args.roofline)
        if args.parts:
            write_parts(results, args.parts)
        if args.fill:
            fill(args.fill, record, results, picture=args.roofline, groups=args.grid)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 1 if failed or missed else 0


def _chosen(args: argparse.Namespace) -> list[tuple[Group, list[Workload]]]:
    """Return the requested groups, each with its requested workloads."""
    groups = _asked(args)
    wanted = args.workloads or [workload.name for group in groups for workload in group.workloads]
    known = {workload.name for group in groups for workload in group.workloads}
    for name in wanted:
        if name not in known:
            raise ValueError(f"bench: no workload {name!r} in {', '.join(group.name for group in groups)}")
    chosen = [(group, [workload for workload in group.workloads if workload.name in wanted]) for group in groups]
    return [(group, workloads) for group, workloads in chosen if workloads]


def _asked(args: argparse.Namespace) -> list[Group]:
    """Return the groups of the named families, dtypes and precisions; if none is named, those with targets."""
    groups = [group for group in args.grid.values() if not args.groups or {group.name, group.family} & {*args.groups}]
    groups = [group for group in groups if not args.dtype or group.dtype in args.dtype]
    groups = [group for group in groups if not args.precision or group.precision in args.precision]
    if not groups:
        raise ValueError("bench: no group is of these types and precisions")
    if args.dtype or args.precision or args.workloads:
        return groups
    return [group for group in groups if group.targets or group.name in (args.groups or ())]


def _listed(chosen: Sequence[tuple[Group, Sequence[Workload]]]) -> Iterator[str]:
    width = max(len(workload.name) for _, workloads in chosen for workload in workloads)
    for group, workloads in chosen:
        yield f"{group.name}: {group.title}"
        yield from (f"  {workload.name:{width}}  {workload.why}" for workload in workloads)
        yield from (f"  target {target}" for target in group.targets)


def _measured(
    args: argparse.Namespace, groups: Sequence[tuple[Group, Sequence[Workload]]]
) -> tuple[list[Result], bool]:
    """Measure group by group, so that a failing group does not affect the others; return whether one failed."""
    peers = _peers(args)
    results: list[Result] = []
    failed = False
    for group, workloads in groups:
        reason = why_no_numbers(group.dtype)
        if reason:
            print(f"{group.name}: not measured: {reason}", file=sys.stderr)
            continue
        for threads in args.threads:
            names = group.peers(peers, threads)
            try:
                results += measure_in_process(workloads, names, threads, args.seconds, WORKER)
            except WorkerFailed as error:
                print(f"{group.name}: {error}", file=sys.stderr)
                failed = True
        if args.json:
            write_json(results, args.json)
        if not args.markdown:
            print("\n".join(_group_lines(group, results)), end="\n\n", flush=True)
    return results, failed


def _peers(args: argparse.Namespace) -> list[str]:
    """Return the names of the peers to measure."""
    chosen = [peer.name for peer in choose(args.peers) if peer.name != OWN.name]
    if args.peers:
        return chosen
    return [name for name in chosen if (name in args.usual_peers if args.usual_peers else name != "numpy")]


def _report(
    args: argparse.Namespace,
    groups: Sequence[tuple[Group, Sequence[Workload]]],
    record: dict[str, Any],
    results: Sequence[Result],
) -> bool:
    """Print what has not been printed yet; return whether a target was missed."""
    if args.markdown:
        print(markdown(record, results, args.grid))
    elif args.files:
        for group, _ in groups:
            print("\n".join(_group_lines(group, results)), end="\n\n")
    missed = [
        f"  {group.name}: {verdict}" for group, _ in groups for verdict in judge(group, results) if verdict.missed
    ]
    if not args.markdown:
        print(heading(record), NOTE, *(["missed:", *missed] if missed else ["no target missed"]), sep="\n")
    return bool(missed)


def _group_lines(group: Group, results: Sequence[Result]) -> list[str]:
    """Return the group's table and verdicts, even if only part of it was measured."""
    names = [workload.name for workload in group.workloads]
    shown = sorted((r for r in results if r.workload.name in names), key=lambda r: names.index(r.workload.name))
    if not shown:
        return [f"{group.title}: not measured"]
    return [group.title, "", *table_lines(shown), "", *(f"  {verdict}" for verdict in judge(group, shown))]
