"""Errors that keep the names in their messages as data, so that `compat` can replace them with its own names.

Their attribute ``message_parts`` is the message as a tuple of names and texts in turn, for example
``("attention", ": ", "k", " has head_dim 64 but ", "q", " has 128")``. The first name is the function's, the others are
names of arguments. The core's errors have the same attribute (`csrc/message.h`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

_E = TypeVar("_E", bound=Exception)


def refusal(kind: type[_E], function: str, name: str, text: str, *more: str) -> _E:
    """Return the error "function: name text"; `more` continues it with further names and texts in turn."""
    return _error(kind, (function, ": ", name, text, *more))


def renamed(error: _E, function: str, names: Mapping[str, str]) -> _E:
    """Return the error with this function's name and its names of arguments; `error` itself if no name differs."""
    found: tuple[str, ...] | None = error.__dict__.get("message_parts")
    if found is None:
        return error
    parts = list(found)
    parts[::2] = [function, *(names.get(name, name) for name in found[2::2])]
    return error if found == tuple(parts) else _error(type(error), tuple(parts))


def _error(kind: type[_E], parts: tuple[str, ...]) -> _E:
    error = kind("".join(parts))
    error.__dict__["message_parts"] = parts
    return error
