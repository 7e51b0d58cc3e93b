"""The command line: `selfattn info`, `selftest`, `demo`, `bench`; without arguments it says what there is."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import selfattn

from . import _overview, _selftest
from ._bench import command
from ._bench.workloads import QUICK
from ._demo import command as demo


def main(argv: Sequence[str] | None = None, *, attention: Callable[..., Any] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv : sequence of str, optional
        Command-line arguments; by default the process's arguments.
    attention : callable, optional
        Function that `selftest` checks instead of `selfattn.attention`.

    Returns
    -------
    int
        The exit code: 0, or 1 on failure.
    """
    try:
        try:
            return _run(argv, attention)
        finally:
            print(end="", flush=True)
    except BrokenPipeError:  # the reader has closed the pipe, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that Python's flush at exit does not fail
        return 1


def _run(argv: Sequence[str] | None, attention: Callable[..., Any] | None) -> int:
    args = _parser().parse_args(argv)
    if args.command is None:
        print(_overview.text())
        return 0
    if args.command == "info":
        return _info(as_json=args.json)
    if args.command == "selftest":
        return 1 if _selftest.run(attention) else 0
    return demo.run(args) if args.command == "demo" else command.run(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="selfattn", description=selfattn.__doc__)
    parser.add_argument("--version", action="version", version=f"selfattn {selfattn.__version__}")
    commands = parser.add_subparsers(dest="command")
    info = commands.add_parser("info", help="how selfattn was built and what it runs on here")
    info.add_argument("--json", action="store_true", help="print JSON")
    commands.add_parser("selftest", help="check results against float64 on this machine")
    demo.add_arguments(commands.add_parser("demo", help="draw where the words of a text look, in a trained model"))
    bench = commands.add_parser("bench", help="measure against NumPy, and PyTorch where installed")
    command.add_arguments(bench, QUICK)
    return parser


def _info(*, as_json: bool) -> int:
    if as_json:
        facts = {
            "config": selfattn.show_config(mode="dicts"),
            "runtime": selfattn.show_runtime(mode="dicts"),
        }
        print(json.dumps(facts, indent=1, default=str))
    else:
        print("Build")
        selfattn.show_config()
        print("\nRun time")
        selfattn.show_runtime()
    return 0


if __name__ == "__main__":
    sys.exit(main())
