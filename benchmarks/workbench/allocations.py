"""What repeated calls ask of the heap, counted by a library that stands before the C library's `malloc`.

The counting process runs this module, with that library preloaded:
`malloc`, `calloc`, `realloc`, `aligned_alloc` and `posix_memalign` of every thread and of every library count.
Python's own small objects come from arenas it holds already.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from selfattn._bench.peers import OWN, PEERS
from selfattn._bench.workloads import WORKLOADS

from .cache_grid import ON_CACHES
from .process import command

WARM_CALLS = 20  # fill the pools of scratch memory and threads
CALLS = 100
CASES = (
    "tiny-16",
    "vit-197",
    "padded-lens-128",
    "mask-bool-512",
    "alibi-causal-1k",
    "decode-4k-gqa",
    "f64-512",
    "projection-block-384",
    "projection-block",
)
STEPS = ("cache-step", "cache-step-paged")  # fewer calls than a step rewinds after
RESULT_CASE = "vit-197"  # is also called without `out`, which allocates: the counter must see it
NO_OUT = ", no out"


def why_not() -> str:
    """Why nothing can be counted here; empty if it can."""
    if platform.libc_ver()[0] != "glibc":
        return "needs glibc"
    return "" if shutil.which("cc") else "needs a C compiler"


def count(source: Path, threads: int, cases: Sequence[str] = CASES) -> dict[str, tuple[int, int]]:
    """Count in a new process.

    Parameters
    ----------
    source : Path
        The C source of the library that counts.
    threads : int
    cases : sequence of str
        Names of workloads.

    Returns
    -------
    dict
        Allocations of `CALLS` calls by anybody in the process, and those by selfattn's core, by case.
    """
    with tempfile.TemporaryDirectory() as folder:
        library = str(Path(folder) / "counting_malloc.so")
        subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", library, str(source), "-ldl"], check=True)
        printed = subprocess.check_output(
            [*command("workbench.allocations"), str(threads), *cases],
            text=True,
            cwd=folder,  # in the project's own folder the sources would be found, which lack the core
            env={**os.environ, "LD_PRELOAD": library},
        )
    return {name: (everybody, core) for name, (everybody, core) in json.loads(printed).items()}


def show(source: Path, threads: int, cases: Sequence[str] = CASES) -> bool:
    """Print what repeated calls allocate; return whether those with `out` allocate nothing."""
    reason = why_not()
    if reason:
        print(f"\nAllocations: not counted, {reason}")
        return True
    print(f"\nAllocations in {CALLS} repeated calls with out=, threads {threads}; malloc and its relatives,")
    print("counted by a preloaded library over all threads and libraries of the process")
    counts = count(source, threads, cases)
    for name, (everybody, core) in counts.items():
        print(f"{name:>20} {everybody:6}, of these by the core {core}")
    return all(everybody == 0 for name, (everybody, _) in counts.items() if not name.endswith(NO_OUT))


def count_here(threads: int, cases: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Count in this process, which has the library preloaded."""
    shim = ctypes.CDLL(os.environ["LD_PRELOAD"])
    found = (ctypes.c_long * 2)()
    counts = {}
    for name, call in _calls(threads, cases):
        for _ in range(WARM_CALLS):
            call()
        shim.counting_malloc_start()
        for _ in range(CALLS):
            call()
        shim.counting_malloc_stop(found)
        counts[name] = (found[0], found[1])
    return counts


def _calls(threads: int, cases: Sequence[str]) -> Iterator[tuple[str, Callable[[], Any]]]:
    for name in cases:
        workload = {**WORKLOADS, **ON_CACHES}[name]
        call: Callable[..., Any] = PEERS[OWN.name].prepare(workload, workload.make_arrays(), threads)
        yield name, partial(call, out=np.empty_like(call()))
        if name == RESULT_CASE:
            yield f"{name}{NO_OUT}", call


if __name__ == "__main__":
    print(json.dumps(count_here(int(sys.argv[1]), sys.argv[2:])))
