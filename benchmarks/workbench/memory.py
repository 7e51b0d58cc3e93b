"""Peak memory of one call, and the scratch memory that `explain` reports.

Every peak is measured in a fresh process that runs this module: the peak resident size during
the call, minus the resident size before it, which includes q, k and v. Reads /proc, so it needs Linux.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import selfattn
from selfattn._bench.numbers import DTYPES, numpy_dtype, why_no_numbers
from selfattn._bench.peer import MAX_SCORES_BYTES
from selfattn._bench.peers import PEERS
from selfattn._bench.workload import Array, Workload
from selfattn._bench.workloads import attention_workload

from .process import command

HEAD_DIM = 64
GRADIENT_HEADS = 8
WARM_LENGTH = 32  # length of a first call that starts the thread pools, whose stacks must not be counted
WIDE_DIMS = (256, 512, 1024, 4096)  # heads wider than those of the benchmarks, for scratch memory


def resident_bytes(field: str) -> int:
    """Return VmRSS (current) or VmHWM (peak) of this process."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def peak_of(run: Callable[[], Any]) -> tuple[int, Any]:
    """Return the bytes of peak resident memory that a call adds in this process, and its result."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak
    before = resident_bytes("VmRSS")
    result = run()
    return max(0, resident_bytes("VmHWM") - before), result


def measure_call(name: str, length: int, threads: int) -> int:
    """Return the bytes of peak resident memory that one causal call adds in this process."""
    added = 0
    for size in (WARM_LENGTH, length):
        workload = attention_workload("memory", "", 1, size, HEAD_DIM, causal=True)
        added, _ = peak_of(PEERS[name].prepare(workload, workload.make_arrays(), threads))
    return added


def measure_passes(length: int, threads: int) -> tuple[int, int]:
    """Return the bytes that forward and backward pass add in this process, their results left out.

    The gradient of a bias (H, 1, Sk) is among the results.
    """
    found = (0, 0)
    rng = np.random.default_rng(0)
    for size in (WARM_LENGTH, length):
        shape = (1, GRADIENT_HEADS, size, HEAD_DIM)
        q, k, v, grad_out = (rng.standard_normal(shape, dtype=np.float32) for _ in range(4))
        bias = rng.standard_normal((GRADIENT_HEADS, 1, size), dtype=np.float32)
        attend = partial(selfattn.attention, q, k, v, bias=bias, num_threads=threads, return_lse=True)
        forward, (out, lse) = peak_of(attend)
        wrt = ("q", "k", "v", "bias")
        differentiate = partial(
            selfattn.attention_backward, grad_out, q, k, v, out, lse, bias=bias, num_threads=threads, wrt=wrt
        )
        backward, gradients = peak_of(differentiate)
        size_of_gradients = sum(gradient.nbytes for gradient in gradients if gradient is not None)
        found = (forward - out.nbytes - lse.nbytes, backward - size_of_gradients)
    return found


def _in_new_process(*arguments: str | int) -> Any:
    running = [*command("workbench.memory"), *map(str, arguments)]
    # In the project's folder, Python would import the sources, which lack the core.
    return json.loads(subprocess.check_output(running, text=True, cwd="/"))


def measure_peak(name: str, length: int, threads: int) -> int | None:
    """Call `measure_call` in a new process; None if a score matrix of more than 2 GiB would be needed."""
    if name != "selfattn" and length * length * 4 > MAX_SCORES_BYTES:
        return None
    return int(_in_new_process(name, length, threads))


def measure_gradients(length: int, threads: int) -> tuple[int, int]:
    """Call `measure_passes` in a new process."""
    forward, backward = _in_new_process("gradients", length, threads)
    return forward, backward


def growth(lengths: list[int], added: list[int]) -> float:
    """Return the exponent x of the best fit added ~ S^x over the upper half of the lengths."""
    half = len(lengths) // 2
    logs = np.log(np.maximum(added[half:], 1)), np.log(lengths[half:])
    return float(np.polyfit(logs[1], logs[0], 1)[0])


def wide_workloads() -> Iterator[Workload]:
    """Yield cases with wider heads than any real model has."""
    for dtype in DTYPES:
        for dim in WIDE_DIMS:
            yield attention_workload(f"{dtype}-d{dim}", "wide heads", 2, 1024, dim, causal=True, dtype=dtype)


def scratch(workloads: Iterable[Workload], threads: int) -> dict[str, tuple[int, int]]:
    """Return bytes of scratch per thread and bytes shared by all threads, by workload, for plain attention."""
    found = {}
    for workload in workloads:
        if workload.kind == "attention" and not why_no_numbers(workload.dtype):
            for layout, step in (("", 1), (", strided", 2)):  # blocks of every second element must be copied
                q, k, v = _operands(workload, step)
                told = selfattn.explain(q, k, v, causal=workload.options.causal, num_threads=threads)
                found[workload.name + layout] = (told["scratch_bytes_per_thread"], told["shared_bytes"])
    return found


def _operands(workload: Workload, step: int) -> Iterator[Array]:
    """Return q, k and v with a stride of `step` elements. Zeros that are never read take no memory."""
    w = workload
    for heads, length, dim in (
        (w.num_heads, w.q_len, w.head_dim),
        (w.num_kv_heads, w.kv_len, w.head_dim),
        (w.num_kv_heads, w.kv_len, w.value_dim),
    ):
        yield np.zeros((w.batch, heads, length, step * dim), numpy_dtype(w.dtype))[..., ::step]


if __name__ == "__main__":
    what, *numbers = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    print(json.dumps(measure_passes(*numbers) if what == "gradients" else measure_call(what, *numbers)))
