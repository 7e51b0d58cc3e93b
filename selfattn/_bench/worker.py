"""A process that measures with one number of threads: `python -m selfattn._bench.worker`.

NumPy's BLAS and OpenMP read their number of threads when they start, so each number of threads
needs its own process. Reads a request as JSON from standard input, writes results to a file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from .check import Mismatch
from .measure import Result, measure
from .peers import OWN, choose
from .report import count_threads, format_seconds
from .workload import Workload

COMMAND = (sys.executable, "-m", "selfattn._bench.worker")
THREAD_LIMITS = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NPROC",  # read by XLA
)


class WorkerFailed(RuntimeError):
    """The measuring process failed; its output contains the error."""


def measure_in_process(
    workloads: Sequence[Workload],
    peers: Sequence[str] | None,
    threads: int,
    seconds: float,
    command: Sequence[str] = COMMAND,
) -> list[Result]:
    """Measure workloads in a new process whose thread pools all have `threads` threads.

    Progress goes to standard error. Pass another command for a process that registers more peers.

    Raises
    ------
    WorkerFailed
        If a result was wrong, or the process failed in another way.
    """
    environment = {**os.environ, **dict.fromkeys(THREAD_LIMITS, str(threads))}
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "results.json"
        request = {
            "workloads": [asdict(workload) for workload in workloads],
            "peers": peers,
            "threads": threads,
            "seconds": seconds,
            "answer": str(answer),
        }
        done = subprocess.run(
            command,
            input=json.dumps(request),
            text=True,
            cwd=folder,  # in the project's folder, Python would import the sources, which lack the core
            env=environment,
            check=False,
        )
        if done.returncode != 0:
            raise WorkerFailed(f"measuring with {threads} threads failed")
        records = json.loads(answer.read_text(encoding="utf-8"))
    return [Result.from_dict(record) for record in records]


def main() -> int:
    """Serve one request; return 1 if a result was wrong."""
    request = json.load(sys.stdin)
    peers = choose(request["peers"])
    results = []
    for record in request["workloads"]:
        workload = Workload.from_dict(record)
        try:
            result = measure(workload, peers, request["threads"], request["seconds"])
        except Mismatch as error:
            print(f"bench: wrong result, nothing timed: {error}", file=sys.stderr)
            return 1
        taken = format_seconds(result.times[OWN.name].median)
        line = f"{workload.name}, {count_threads(result.threads)}: {taken}, {result.rounds} rounds"
        print(line, file=sys.stderr, flush=True)
        results.append(result.to_dict())
    Path(request["answer"]).write_text(json.dumps(results), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
