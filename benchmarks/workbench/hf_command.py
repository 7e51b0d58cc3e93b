"""Time whole transformers models with selfattn and with the attention they use otherwise.

Run as a module, this is the process that measures with one number of threads.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import selfattn
from selfattn._bench.report import format_seconds
from selfattn._bench.timing import Quartiles, interleave, ratios

from . import process
from .hf_models import GROUPS, OWN, Bench, Mismatch

DTYPES = ("float32", "bfloat16")
Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 1 if a result was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS), metavar="NAME", help=_listed())
    parser.add_argument("--lengths", nargs="+", type=int, metavar="N", help="lengths instead of each group's own")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), metavar="TYPE")
    parser.add_argument(
        "--threads", nargs="+", type=int, default=[1], metavar="N", help="numbers of threads (default 1)"
    )
    parser.add_argument("--seconds", type=float, default=4.0, metavar="S", help="time per row (default 4)")
    parser.add_argument("--tiny", action="store_true", help="models of a few kilobytes, to try the command")
    parser.add_argument("--json", metavar="FILE", help="write the rows to this file")
    parser.add_argument("--answer", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.answer:
        return measure(args)
    rows: list[Row] = []
    for threads in args.threads:
        found = _measure_in_process(args, threads)
        if found is None:
            print(f"measuring with {threads} threads failed", file=sys.stderr)
            return 1
        rows += found
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1), encoding="utf-8")
    print(markdown(rows))
    return 0


def _listed() -> str:
    return "; ".join(f"{name}: {group.title}" for name, group in GROUPS.items())


def _measure_in_process(args: argparse.Namespace, threads: int) -> list[Row] | None:
    """Measure in a new process whose thread pools all have `threads` threads."""
    options = ["--groups", *args.groups, "--dtype", *args.dtype, "--seconds", str(args.seconds)]
    options += ["--lengths", *map(str, args.lengths)] if args.lengths else []
    options += ["--tiny"] if args.tiny else []
    return process.answer_of("workbench.hf_command", threads, *options)


def measure(args: argparse.Namespace) -> int:
    """Measure as the options say with one number of threads, and write the rows to the file `answer`."""
    (threads,) = args.threads
    import torch

    torch.set_num_threads(threads)
    selfattn.set_num_threads(threads)
    rows = []
    for name in args.groups:
        for dtype in args.dtype:
            bench = Bench(GROUPS[name], dtype, tiny=args.tiny)
            for length in args.lengths or GROUPS[name].lengths:
                try:
                    rows.append(
                        {"group": name, "dtype": dtype, "threads": threads, **_row(bench, length, args.seconds)}
                    )
                except Mismatch as error:
                    print(error, file=sys.stderr)
                    return 1
                print(_text(rows[-1]), file=sys.stderr)
    Path(args.answer).write_text(json.dumps(rows), encoding="utf-8")
    return 0


def _row(bench: Bench, length: int, seconds: float) -> Row:
    samples = interleave(bench.runs(length), seconds)
    peer = bench.group.peer
    ratio = ratios(samples, OWN)[peer]
    times = {name: Quartiles.of(samples[name]).median for name in (OWN, peer)}
    return {
        "length": length, "rounds": len(samples[OWN]), "peer": peer, "own_seconds": times[OWN],
        "peer_seconds": times[peer], "ratio": ratio.median, "q1": ratio.q1, "q3": ratio.q3,
    }  # fmt: skip


def _text(row: Row) -> str:
    return f"{row['group']} {row['length']} {row['dtype']} {row['threads']}: {row['ratio']:.2f}"


def markdown(rows: Sequence[Row]) -> str:
    """Return a table for every group: a line per length, a column per dtype and number of threads."""
    parts = []
    for name in dict.fromkeys(row["group"] for row in rows):
        of_group = [row for row in rows if row["group"] == name]
        columns = list(dict.fromkeys((row["dtype"], row["threads"]) for row in of_group))
        header = ["length", *(f"{dtype}, {_threads(threads)}" for dtype, threads in columns)]
        lines = [_line(header), _line(["--:"] * len(header))]
        for length in dict.fromkeys(row["length"] for row in of_group):
            by_column = {(row["dtype"], row["threads"]): row for row in of_group if row["length"] == length}
            lines.append(_line([str(length), *(_cell(by_column.get(column)) for column in columns)]))
        parts.append(f"### {GROUPS[name].title}; compared with {GROUPS[name].peer}\n\n" + "\n".join(lines))
    note = "The peer's time over selfattn's, median of interleaved rounds [quartiles]; times are medians."
    return "\n\n".join([*parts, note])


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _cell(row: Row | None) -> str:
    if row is None:
        return "–"
    times = f"{format_seconds(row['peer_seconds'])} → {format_seconds(row['own_seconds'])}"
    return f"{row['ratio']:.2f}× [{row['q1']:.2f}, {row['q3']:.2f}] {times}"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
