"""NumPy's BLAS as it is loaded: its threads, and the processor type for which it chose its kernels."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Blas(NamedTuple):
    """A loaded library with matrix products."""

    name: str
    threads: int
    core: str | None  # the processor that its kernels are for

    def __str__(self) -> str:
        count = f"{self.threads} thread{'s' * (self.threads != 1)}"
        return f"{self.name} ({', '.join(filter(None, [count, self.core]))})"


def loaded() -> list[Blas]:
    """Return the BLAS libraries of this process, as threadpoolctl or OpenBLAS itself describe them."""
    try:
        from threadpoolctl import threadpool_info
    except ImportError:
        return [blas for path in _openblas_files() if (blas := _ask(path)) is not None]
    return [
        Blas(pool["internal_api"], pool["num_threads"], pool.get("architecture"))
        for pool in threadpool_info()
        if pool["user_api"] == "blas"
    ]


def _openblas_files() -> Iterator[str]:
    maps = Path("/proc/self/maps")
    if maps.exists():
        lines = maps.read_text(errors="replace").splitlines()
        files = {line.split(maxsplit=5)[5] for line in lines if "openblas" in line.lower()}
    else:  # the libraries in NumPy's wheels
        package = Path(np.__file__).parent
        folders = (package / ".dylibs", package.with_name("numpy.libs"))
        files = {str(file) for folder in folders for file in folder.glob("*openblas*")}
    yield from sorted(files)


def _ask(path: str) -> Blas | None:
    try:
        library = ctypes.CDLL(path, mode=getattr(os, "RTLD_NOLOAD", 0) | getattr(os, "RTLD_LAZY", 0))
    except OSError:  # the file was replaced, or is not loaded after all
        return None
    threads = _function(library, "get_num_threads", ctypes.c_int)
    core = _function(library, "get_corename", ctypes.c_char_p)
    if threads is None:
        return None
    return Blas("openblas", threads(), core().decode() if core is not None else None)


def _function(library: ctypes.CDLL, name: str, result: Any) -> Callable[[], Any] | None:
    # The BLAS in NumPy's wheels has names with a prefix and a suffix.
    for prefix in ("scipy_openblas_", "openblas_"):
        for suffix in ("64_", "_64", ""):
            function = getattr(library, f"{prefix}{name}{suffix}", None)
            if function is not None:
                function.restype = result
                return function  # type: ignore[no-any-return]
    return None
