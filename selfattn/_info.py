"""How the package was built, and what it detects on this machine."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import version
from typing import Any, Literal, overload

import numpy as np

from . import _core

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
        disabled them in this thread), python, numpy, blas (NumPy's, with its threads if threadpoolctl is installed),
        machine, openmp_runtimes (if threadpoolctl is installed).
    """
    threads, source = _core.default_threads()
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
        "blas": _pools("blas") or _blas_of_build(),
        "machine": f"{platform.system()} {platform.machine()}",
    }
    runtimes = _pools("openmp")
    if runtimes is not None:
        facts["openmp_runtimes"] = runtimes
    return _show(facts, mode)


def _pools(kind: str) -> list[str] | None:
    """Return the loaded libraries that have thread pools of this kind; None if threadpoolctl is not installed."""
    try:
        from threadpoolctl import threadpool_info
    except ImportError:
        return None
    return [
        f"{pool['prefix']} ({pool['num_threads']} threads)" for pool in threadpool_info() if pool["user_api"] == kind
    ]


def _blas_of_build() -> list[str]:
    config: Any = np.show_config("dicts")
    blas = config.get("Build Dependencies", {}).get("blas", {})
    return [f"{blas.get('name', 'unknown')} {blas.get('version', '')}".rstrip() + " (threads: needs threadpoolctl)"]


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
