"""What every integration asks of the library that it is for: a version that works, and one OpenMP runtime for both."""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path
from types import ModuleType

import torch

from .. import _core

# The lower bounds of pyproject.toml.
_LOWEST = {"torch": (2, 5), "transformers": (5, 15)}


def check_version(library: ModuleType) -> None:
    """Raise an ImportError that names the version needed if a library is older."""
    lowest = _LOWEST[library.__name__]
    if tuple(map(int, re.findall(r"\d+", library.__version__)[:2])) < lowest:
        needed = ".".join(map(str, lowest))
        raise ImportError(
            f"selfattn: {library.__name__} is {library.__version__}, but {needed} or newer is needed: "
            f'pip install "{library.__name__}>={needed}"'
        )


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


check_version(torch)
