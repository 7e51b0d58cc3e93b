"""Common to all integrations: the version check of the other library, and a shared OpenMP runtime."""

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
    """Raise an ImportError that names the needed version if the library is too old."""
    lowest = _LOWEST[library.__name__]
    if tuple(map(int, re.findall(r"\d+", library.__version__)[:2])) < lowest:
        needed = ".".join(map(str, lowest))
        raise ImportError(
            f"selfattn: {library.__name__} is {library.__version__}, but {needed} or newer is needed: "
            f'pip install "{library.__name__}>={needed}"'
        )


def share_runtime() -> None:
    """Run selfattn's calls in the threads of PyTorch's OpenMP runtime, from now on, in the whole process.

    Each wheel contains its own OpenMP runtime. After every parallel region, the threads of a runtime spin for some
    milliseconds, waiting for the next one. If calls of both libraries alternate, two teams on the same cores delay each
    other. Does nothing if PyTorch's library lacks the needed functions, or selfattn does not use OpenMP.
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
