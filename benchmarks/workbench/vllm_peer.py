"""vLLM's attention operator for CPUs, loaded from the shared library in its wheel."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

from selfattn._bench.peer import CannotRun, Peer, Run
from selfattn._bench.torch_peer import readable, tensor
from selfattn._bench.workload import Arrays, Workload

LIBRARY_VARIABLE = "SELFATTN_BENCH_VLLM"  # the path of vllm/_C.abi3.so

HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)
PAGE = 128  # keys per page of its cache


class Vllm(Peer):
    """The operator on a paged cache whose pages are in random order, as in a server.

    Its kernels read K and V in the cache's format. If all keys are new (prefill), storing them is part of the timed
    call. Whatever a server computes once for all layers is not timed.
    """

    name, label, module = "vllm", "vLLM", "torch"

    def available(self) -> bool:
        """Whether the library is named and exists, and PyTorch, which loads it, is installed."""
        path = os.environ.get(LIBRARY_VARIABLE)
        return bool(path) and Path(str(path)).is_file() and super().available()

    def version(self) -> str:
        """Return the library's file name, since it does not report its version."""
        return Path(os.environ[LIBRARY_VARIABLE]).name

    def why_not(self, workload: Workload) -> str:
        """See `Peer.why_not`."""
        options = workload.options
        if workload.kind == "layer":
            return "it has no projections"
        if workload.dtype == "float64" or workload.head_dim != workload.value_dim:
            return "it needs equal head_dim and value_dim, and not float64"
        if workload.head_dim not in HEAD_DIMS:
            return f"its kernels know head_dim {', '.join(map(str, HEAD_DIMS))} only"
        if options.mask != "none" or options.bias or options.alibi or options.kv_lens or options.window:
            return "it is called without masks, biases and windows"
        return ""

    def prepare(self, workload: Workload, arrays: Arrays, threads: int) -> Run:
        """See `Peer.prepare`."""
        torch = importlib.import_module("torch")
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(workload.precision)
        try:
            torch.ops.load_library(os.environ[LIBRARY_VARIABLE])
            call = _Call(torch, workload, arrays)
            call.store()
            call.attend()
        except (RuntimeError, OSError, AttributeError) as error:
            raise CannotRun(" ".join(str(error).split())[:160]) from error
        prefill = workload.q_len == workload.kv_len

        def run() -> Any:
            if prefill:
                call.store()
            call.attend()
            return call.result

        return readable(torch, workload, run)


def _isa(torch: Any, workload: Workload) -> str:
    """Choose kernels as vLLM does; AMX only if the system permits this process to use them."""
    if workload.head_dim % 32:
        return "vec16"
    held_back = "ATEN_CPU_CAPABILITY" in os.environ  # vLLM itself does not check this
    if workload.dtype == "bfloat16" and not held_back and torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx():
        return "amx"
    return "vec"


class _Call:
    """Operands in vLLM's layouts: token axis before head axis, K and V in pages."""

    def __init__(self, torch: Any, workload: Workload, arrays: Arrays) -> None:
        self.ops = torch.ops._C
        self.workload = workload
        self.isa = _isa(torch, workload)
        self.q, self.k, self.v = (
            tensor(torch, arrays[name]).transpose(1, 2).flatten(0, 1).contiguous() for name in "qkv"
        )
        self.out = torch.empty_like(self.q)
        self.result = self.out.unflatten(0, (workload.batch, workload.q_len)).transpose(1, 2)
        self._make_cache(torch)
        self._make_schedule(torch)

    def _make_cache(self, torch: Any) -> None:
        batch, heads, length = self.workload.batch, self.workload.num_kv_heads, self.workload.kv_len
        pages = -(-length // PAGE)
        order = torch.randperm(batch * pages, generator=torch.Generator().manual_seed(1))
        self.table = order.to(torch.int32).view(batch, pages)
        cache = torch.zeros(batch * pages, heads, 2 * PAGE, self.workload.head_dim, dtype=self.q.dtype)
        self.key_cache, self.value_cache = cache.chunk(2, dim=2)
        position = torch.arange(length)
        pages_of = self.table[:, position // PAGE].long()
        self.slots = (pages_of * PAGE + position % PAGE).flatten().contiguous()

    def _make_schedule(self, torch: Any) -> None:
        workload = self.workload
        self.starts = (torch.arange(workload.batch + 1) * workload.q_len).to(torch.int32)
        self.lens = torch.full((workload.batch,), workload.kv_len, dtype=torch.int32)
        heads = (workload.num_heads, workload.num_kv_heads, workload.head_dim)
        self.schedule = self.ops.get_scheduler_metadata(
            workload.batch, *heads, self.lens, self.q.dtype, self.starts, workload.options.causal, -1,
            self.isa, True, None, "auto",
        )  # fmt: skip

    def store(self) -> None:
        self.ops.cpu_attn_reshape_and_cache(
            self.k, self.v, self.key_cache, self.value_cache, self.slots, self.isa, 1.0, 1.0, "auto"
        )

    def attend(self) -> None:
        workload = self.workload
        softcap = workload.options.softcap or 0.0
        self.ops.cpu_attention_with_kv_cache(
            self.q, self.key_cache, self.value_cache, self.out, self.starts, self.lens, workload.scale,
            workload.options.causal, None, -1, self.table, softcap, self.schedule, None, None, 1.0, 1.0, "auto",
        )  # fmt: skip
