"""How the package was built, and what it detects on this machine."""

from __future__ import annotations

import math
import os
import platform
import sys
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np

from . import _blas, _core

_IMPORTED_IN = os.getpid()

Mode = Literal["stdout", "dicts"]


@overload
def show_config(mode: Literal["stdout"] = ...) -> None: ...
@overload
def show_config(mode: Literal["dicts"]) -> dict[str, Any]: ...
def show_config(mode: Mode = "stdout") -> dict[str, Any] | None:
    """Show how this package was built.

    Parameters
    ----------
    mode : {"stdout", "dicts"}
        Print it, or return it as a dict.

    Returns
    -------
    dict or None
        version, compiler, flags, build_type, openmp (the version's date or None), isas (compiled in).

    Raises
    ------
    ValueError
        `mode` is another string.

    Examples
    --------
    >>> import selfattn as sa
    >>> "portable" in sa.show_config(mode="dicts")["isas"]
    True
    """
    return _show({"version": version("selfattn"), **_core.build_config()}, mode)


@overload
def show_runtime(mode: Literal["stdout"] = ...) -> None: ...
@overload
def show_runtime(mode: Literal["dicts"]) -> dict[str, Any]: ...
def show_runtime(mode: Mode = "stdout") -> dict[str, Any] | None:
    """Show what the package uses on this machine, and where the number of threads comes from.

    Parameters
    ----------
    mode : {"stdout", "dicts"}
        Print it, or return it as a dict.

    Returns
    -------
    dict or None
        isa (active), isas (available), isa_source, threads, threads_source, affinity (CPUs), cgroup_quota (CPUs or
        None), parallel (openmp, threads or serial; shared openmp: PyTorch's runtime), subnormals (False: a library has
        disabled them in this thread), python, numpy, blas (NumPy's, with its threads and its core type), machine,
        openmp_runtimes (if threadpoolctl is installed), warnings (settings that make a service slow).

    Raises
    ------
    ValueError
        `mode` is another string.

    Examples
    --------
    >>> import selfattn as sa
    >>> sa.show_runtime(mode="dicts")["threads"] == sa.get_num_threads()
    True
    """
    threads, source = _core.default_threads()
    loaded = _blas.loaded()
    facts: dict[str, Any] = {
        "isa": _core.active_isa(),
        "isas": list(_core.isas()),
        "isa_source": "SELFATTN_ISA" if os.environ.get("SELFATTN_ISA") else "best available",
        "threads": threads,
        "threads_source": source,
        "affinity": _core.affinity_count() or None,
        "cgroup_quota": _core.cgroup_quota("") or None,
        "parallel": _core.parallel_backend(),
        "subnormals": _core.subnormals_survive(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "numpy": np.__version__,
        "blas": [str(blas) for blas in loaded] or _blas_of_build(),
        "machine": f"{platform.system()} {platform.machine()}",
    }
    runtimes = _openmp_runtimes()
    if runtimes is not None:
        facts["openmp_runtimes"] = runtimes
    facts["warnings"] = _warnings(threads, max((blas.threads for blas in loaded), default=1))
    return _show(facts, mode)


def _warnings(threads: int, blas_threads: int) -> list[str]:
    found = []
    cpus = min(filter(None, [_core.affinity_count(), math.ceil(_core.cgroup_quota("")), os.cpu_count() or 1]))
    processes = _processes()
    if processes > 1 and processes * max(threads, blas_threads) > cpus:
        found.append(
            f"{processes} processes x {threads} threads (NumPy's BLAS: {blas_threads}) exceed {cpus} CPUs: "
            "set OPENBLAS_NUM_THREADS and OMP_NUM_THREADS before Python starts (docs/serving.md)"
        )
    if os.getpid() != _IMPORTED_IN and blas_threads > 1:
        found.append(
            f"a BLAS with {blas_threads} threads in a forked process: its threads and those of the other processes "
            "spin while they wait for each other: set OPENBLAS_NUM_THREADS=1 before Python starts (docs/serving.md)"
        )
    return found


def _processes() -> int:
    """Return how many processes have loaded this core, except those that only started this one; 1 if unknown."""
    if not sys.platform.startswith("linux"):
        return 1
    ancestors, pid = set(), os.getppid()
    while pid > 0 and pid not in ancestors:
        ancestors.add(pid)
        pid = _parent(pid)
    core, count = os.path.realpath(str(_core.__file__)), 0
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # the process has ended, or belongs to another user
            count += int(folder.name) not in ancestors and core in (folder / "maps").read_text(errors="replace")
    return max(count, 1)


def _parent(pid: int) -> int:
    try:
        # The name of the program, in parentheses, may contain anything.
        return int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _openmp_runtimes() -> list[str] | None:
    """Return the loaded OpenMP runtimes; None if threadpoolctl is not installed."""
    try:
        from threadpoolctl import threadpool_info
    except ImportError:
        return None
    return [
        f"{pool['prefix']} ({pool['num_threads']} threads)"
        for pool in threadpool_info()
        if pool["user_api"] == "openmp"
    ]


def _blas_of_build() -> list[str]:
    config: Any = np.show_config("dicts")
    blas = config.get("Build Dependencies", {}).get("blas", {})
    return [f"{blas.get('name', 'unknown')} {blas.get('version', '')}".rstrip() + " (threads: unknown)"]


def _show(facts: dict[str, Any], mode: Mode) -> dict[str, Any] | None:
    if mode == "dicts":
        return facts
    if mode != "stdout":
        raise ValueError(f"mode is {mode!r}, but it must be 'stdout' or 'dicts'")
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        sys.stdout.write(f"{name:{width}}  {text}\n")
    return None
