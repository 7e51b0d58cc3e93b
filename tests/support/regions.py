"""A runtime in the place of OpenMP that records how many threads each parallel region asks for."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from selfattn import _core

_Work = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@contextmanager
def recorded_regions() -> Iterator[list[int]]:
    """Run regions on the calling thread alone; yield the list of the numbers of threads that they ask for."""
    asked: list[int] = []

    @ctypes.CFUNCTYPE(None, _Work, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    def run(work: Any, data: int, threads: int, flags: int) -> None:
        asked.append(threads)
        work(data)

    usual = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 1)
    _core.share_runtime(*(ctypes.cast(f, ctypes.c_void_p).value or 0 for f in (run, usual)))
    try:
        yield asked
    finally:
        _core.share_runtime(0, 0)
