"""A shared OpenMP runtime for the integrations with PyTorch."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch

from .. import _core
from ._versions import check_version


def share_runtime() -> None:
    """Run selfattn's calls in the threads of PyTorch's OpenMP runtime, from now on, in the whole process.

    Each wheel contains its own OpenMP runtime. After every parallel region, the threads of a runtime spin for some
    milliseconds, waiting for the next region. If calls of both libraries alternate, two teams on the same cores delay
    each other. Does nothing if PyTorch's library lacks the needed functions, or selfattn does not use OpenMP.
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


check_version(torch)
