"""One OpenMP runtime for PyTorch and selfattn."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch

from .. import _core


def share_runtime() -> None:
    """Let selfattn's calls run in the threads of PyTorch's OpenMP runtime, from now on, in the whole process.

    Wheels bring a runtime each. After every parallel region the threads of a runtime spin for some milliseconds,
    waiting for the next: two teams on the same cores keep each other waiting wherever calls of both libraries take
    turns. Nothing happens where PyTorch's library has no such functions, or selfattn does without OpenMP.
    """
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        loaded = ctypes.CDLL(str(library), mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
        run, threads = (
            ctypes.cast(function, ctypes.c_void_p).value or 0
            for function in (loaded.GOMP_parallel, loaded.omp_get_max_threads)
        )
    except (OSError, AttributeError):
        return
    _core.share_runtime(run, threads)
