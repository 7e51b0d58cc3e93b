"""The options and control flow shared by `python -m selfattn bench` and `benchmarks/attention.py`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence

import selfattn

from .._typing import Precision
from .numbers import DTYPES, PRECISIONS, why_no_numbers
from .peers import PEERS, choose
from .plot import write_plot
from .report import table, write_json
from .worker import COMMAND, WorkerFailed, measure_in_process
from .workload import Workload
from .workloads import WORKLOADS, find, from_shape


def add_arguments(
    parser: argparse.ArgumentParser,
    default: Sequence[str] | None,
    known: Mapping[str, Workload] = WORKLOADS,
    worker: Sequence[str] = COMMAND,
) -> None:
    """Add the options of a benchmark.

    Parameters
    ----------
    parser : ArgumentParser
    default : sequence of str, optional
        Workloads to run if the user names none; by default all of `WORKLOADS`.
    known : mapping of name to Workload
        Workloads that the user can name.
    worker : sequence of str
        The command that starts the measuring process.
    """
    which = "all" if default is None else ", ".join(default)
    parser.add_argument("--workloads", nargs="+", metavar="NAME", help=f"what to run (default: {which})")
    parser.add_argument("--list", action="store_true", help="list the workloads and stop")
    parser.add_argument("--shape", metavar="B,H,S,D", help="run this shape instead")
    add_axes(parser, "run the workloads")
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
    parser.set_defaults(default_workloads=default, known=known, worker=worker)


def add_axes(parser: argparse.ArgumentParser, verb: str) -> None:
    """Add the options that choose dtypes and precisions."""
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, metavar="TYPE", help=f"{verb} in {', '.join(DTYPES)}")
    levels = ", ".join(PRECISIONS)
    parser.add_argument(
        "--precision", nargs="+", choices=PRECISIONS, metavar="LEVEL", help=f"{verb} of float32 at {levels}"
    )


def positive_int(text: str) -> int:
    """Parse an argument that must be an integer above 0."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def run(args: argparse.Namespace) -> int:
    """Measure and report as the options say.

    Returns
    -------
    int
        0, or 1 if an option or a peer's result was wrong.
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
            for result in measure_in_process(workloads, args.peers, threads, args.seconds, args.worker)
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
        workloads = list(WORKLOADS.values()) if names is None else find(list(names), args.known)
    return varied(workloads, args.dtype, args.precision)


def varied(
    workloads: Sequence[Workload], dtypes: Sequence[str] | None, precisions: Sequence[Precision] | None
) -> list[Workload]:
    """Return the workloads in each of the dtypes, and float32 workloads at each precision.

    Raises
    ------
    ValueError
        If no workload is left, or a dtype is not available here.
    """
    found = {
        variant.name: variant
        for workload in workloads
        for dtype in dtypes or [workload.dtype]
        for precision in precisions or [workload.precision]
        if dtype == "float32" or precision == "highest"
        for variant in [workload.varied(dtype, precision)]
    }
    if not found:
        raise ValueError(f"bench: precision {' and '.join(precisions or ())} is for float32 only")
    for variant in found.values():
        reason = why_no_numbers(variant.dtype)
        if reason:
            raise ValueError(f"bench: {reason}")
    return list(found.values())
