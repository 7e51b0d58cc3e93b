"""The number of threads that a call may use, and the instruction set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from . import _core
from ._arguments import choice, thread_count

# A misspelt SELFATTN_ISA or SELFATTN_PARALLEL raises here, at import, rather than in the first call.
_core.active_isa()
_core.parallel_backend()


def set_num_threads(n: int | None) -> None:
    """Set the maximum number of threads of a call, for the whole process.

    Parameters
    ----------
    n : int or None
        None restores the detected default: the smallest of OpenMP's setting in the calling thread, the number of CPUs
        that the process may run on, and the control group's CPU quota rounded up.

    Raises
    ------
    TypeError, ValueError
        `n` is not an integer above 0.

    Examples
    --------
    >>> import selfattn as sa
    >>> sa.set_num_threads(1)
    >>> sa.get_num_threads()
    1
    >>> sa.set_num_threads(None)
    """
    _core.set_default_threads(thread_count("set_num_threads", n))


def get_num_threads() -> int:
    """Return the number of threads that a call from this thread may use.

    Examples
    --------
    >>> import selfattn as sa
    >>> sa.get_num_threads() >= 1
    True
    """
    return int(_core.default_threads()[0])


def isas() -> list[str]:
    """Return the instruction sets that this machine can run, best first.

    Examples
    --------
    >>> import selfattn as sa
    >>> "portable" in sa.isas()
    True
    """
    return list(_core.isas())


def active_isa() -> str:
    """Return the instruction set in use: the one that ``SELFATTN_ISA`` names, or the best if that is unset or empty.

    Examples
    --------
    >>> import selfattn as sa
    >>> sa.active_isa() in sa.isas()
    True
    """
    return str(_core.active_isa())


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Use another instruction set within a ``with`` block, for tests and comparisons. Affects the whole process.

    Parameters
    ----------
    name : str
        One of `isas`.

    Raises
    ------
    ValueError
        This machine cannot run it, or there is no such instruction set.

    Examples
    --------
    >>> import selfattn as sa
    >>> with sa.use_isa("portable"):
    ...     sa.active_isa()
    'portable'
    """
    choice("use_isa", "name", name, tuple(isas()))
    before = active_isa()
    _core.select_isa(name)
    try:
        yield
    finally:
        _core.select_isa(before)
