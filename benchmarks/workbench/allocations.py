"""Counts heap allocations of repeated calls, by a preloaded library that intercepts the C library's `malloc`.

The counting process runs this module with that library preloaded. Calls of `malloc`, `calloc`, `realloc`,
`aligned_alloc` and `posix_memalign` by every thread and every library are counted. Python's own small objects come from
arenas that it has already allocated.
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

import selfattn
from selfattn._bench.peers import OWN, PEERS
from selfattn._bench.workloads import WORKLOADS

from .cache_grid import ON_CACHES
from .process import command

WARM_CALLS = 20  # fill the pools of scratch memory and of threads
CALLS = 100
CASES = (
    "tiny-16",
    "vit-197",
    "padded-lens-128",
    "mask-bool-512",
    "alibi-causal-1k",
    "decode-4k-gqa",
    "f64-512",
    "projection-layer-384",
    "projection-layer",
    "Linear",
    "FeedForward",
    "layer_norm",
    "rms_norm",
)
STEPS = ("cache-step", "cache-step-paged")  # WARM_CALLS + CALLS are fewer than cached.STEPS, so no rewind is counted
RESULT_CASE = "vit-197"  # also called without `out`, which allocates, to verify that the counter works
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
        Names of workloads, or of functions and classes of the package.

    Returns
    -------
    dict
        By case: the allocations of `CALLS` calls in the whole process, and those by selfattn's core.
    """
    with tempfile.TemporaryDirectory() as folder:
        library = str(Path(folder) / "counting_malloc.so")
        subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", library, str(source), "-ldl"], check=True)
        printed = subprocess.check_output(
            [*command("workbench.allocations"), str(threads), *cases],
            text=True,
            cwd=folder,  # in the project's folder, Python would import the sources, which lack the core
            env={**os.environ, "LD_PRELOAD": library},
        )
    return {name: (total, core) for name, (total, core) in json.loads(printed).items()}


def show(source: Path, threads: int, cases: Sequence[str] = CASES) -> bool:
    """Print the allocations of repeated calls; return whether those with `out` allocate nothing."""
    reason = why_not()
    if reason:
        print(f"\nAllocations: not counted, {reason}")
        return True
    print(f"\nAllocations in {CALLS} repeated calls with out=, threads {threads}; malloc and its relatives,")
    print("counted by a preloaded library over all threads and libraries of the process")
    counts = count(source, threads, cases)
    for name, (total, core) in counts.items():
        print(f"{name:>20} {total:6}, of these by the core {core}")
    return all(total == 0 for name, (total, _) in counts.items() if not name.endswith(NO_OUT))


def count_here(threads: int, cases: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Count in this process, which must have the library preloaded."""
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
    around = _around_attention(threads)
    for name in cases:
        call = around[name] if name in around else _attention(name, threads)
        yield name, partial(call, out=np.empty_like(call()))
        if name == RESULT_CASE:
            yield f"{name}{NO_OUT}", call


def _attention(name: str, threads: int) -> Callable[..., Any]:
    workload = {**WORKLOADS, **ON_CACHES}[name]
    return PEERS[OWN.name].prepare(workload, workload.make_arrays(), threads)


def _around_attention(threads: int) -> dict[str, Callable[..., Any]]:
    """Return calls of what surrounds attention in a layer, by name."""
    x, w = np.ones((64, 384), np.float32), np.ones((384, 384), np.float32)
    weight, linear = np.ones(384, np.float32), selfattn.Linear(w, activation="gelu")
    feed_forward = selfattn.FeedForward(w, w, norm=selfattn.LayerNorm(weight))
    return {
        "Linear": partial(linear, x, residual=x, num_threads=threads),
        "FeedForward": partial(feed_forward, x, residual=x, num_threads=threads),
        "layer_norm": partial(selfattn.layer_norm, x, weight, residual=x),
        "rms_norm": partial(selfattn.rms_norm, x, weight),
    }


if __name__ == "__main__":
    print(json.dumps(count_here(int(sys.argv[1]), sys.argv[2:])))
