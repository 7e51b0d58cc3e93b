"""Warnings about arguments that will be removed (docs/project/versions.md)."""

from __future__ import annotations

import sys
import warnings

_warned: set[tuple[str, str]] = set()


def deprecated_argument(function: str, name: str, instead: str, removal: str) -> None:
    """Warn that an argument will be removed: once per process, with the line of the caller outside of this package.

    `instead` says what to do, and `removal` is the version without the argument. Where warnings are errors, every call
    raises.
    """
    if (function, name) in _warned:
        return
    text = f"{function}: {name} is deprecated and will be removed in version {removal}: {instead}"
    warnings.warn(text, DeprecationWarning, stacklevel=_levels_to_caller())
    _warned.add((function, name))


def _levels_to_caller() -> int:
    """Return the `stacklevel`, counted from the function that calls this one, of the first frame of other code."""
    level, frame = 1, sys._getframe(1)
    package = __name__.partition(".")[0]
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] == package:
        level, frame = level + 1, frame.f_back
    return level
