"""The options and the flow shared by `python -m selfattn bench` and `benchmarks/attention.py`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

import selfattn

from .check import UNIT_ROUNDOFF
from .grid import EVERY
from .peers import PEERS, choose
from .plot import write_plot
from .report import table, write_json
from .worker import WorkerFailed, measure_in_process
from .workload import Workload
from .workloads import WORKLOADS, find, from_shape


def add_arguments(parser: argparse.ArgumentParser, default: Sequence[str] | None) -> None:
    """Add the options of a benchmark.

    Parameters
    ----------
    parser : ArgumentParser
    default : sequence of str, optional
        Workloads to run when none is named; all by default.
    """
    which = "all" if default is None else ", ".join(default)
    parser.add_argument("--workloads", nargs="+", metavar="NAME", help=f"what to run (default: {which})")
    parser.add_argument("--list", action="store_true", help="list the workloads and stop")
    parser.add_argument("--shape", metavar="B,H,S,D", help="run this shape instead")
    parser.add_argument("--dtype", choices=list(UNIT_ROUNDOFF), help="run the workloads in it")
    parser.add_argument("--threads", nargs="+", type=positive_int, metavar="N", help="numbers of threads to use")
    parser.add_argument(
        "--peers",
        nargs="+",
        metavar="PEER",
        help=f"some of {', '.join(PEERS)} (default: installed)",
    )
    parser.add_argument("--seconds", type=float, default=2.0, metavar="S", help="time per workload (default 2)")
    parser.add_argument("--json", metavar="FILE", help="write everything to this file")
    parser.add_argument("--plot", metavar="FILE", help="draw ratios to PyTorch (needs matplotlib)")
    parser.set_defaults(default_workloads=default)


def positive_int(text: str) -> int:
    """Parse an argument that must be an integer above 0."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def run(args: argparse.Namespace) -> int:
    """Measure and report what the options ask for.

    Returns
    -------
    int
        0, or 1 if an option was wrong or a peer's result was.
    """
    if args.list:
        width = max(map(len, WORKLOADS))
        print("\n".join(f"{name:{width}}  {w.why}" for name, w in WORKLOADS.items()))
        return 0
    try:
        workloads = _chosen_workloads(args)
        choose(args.peers)
        results = [
            result
            for threads in args.threads or [selfattn.get_num_threads()]
            for result in measure_in_process(workloads, args.peers, threads, args.seconds)
        ]
    except (ValueError, WorkerFailed) as error:
        print(error, file=sys.stderr)
        return 1
    print(table(results))
    if args.json:
        write_json(results, args.json)
    if args.plot:
        write_plot(results, args.plot)
    return 0


def _chosen_workloads(args: argparse.Namespace) -> list[Workload]:
    if args.shape:
        workloads = [from_shape(args.shape)]
    else:
        names = args.workloads or args.default_workloads
        workloads = list(WORKLOADS.values()) if names is None else find(list(names), EVERY)
    if args.dtype:
        workloads = [replace(workload, dtype=args.dtype) for workload in workloads]
    return workloads
