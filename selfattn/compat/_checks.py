"""Checks shared by several compat functions."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from .._arguments import as_array, real
from .._errors import refusal, renamed

_P = ParamSpec("_P")
_R = TypeVar("_R")


def own_names(function: str, **arguments: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Make errors of selfattn's functions name this function and its arguments, given as selfattn_name="own name"."""

    def decorate(call: Callable[_P, _R]) -> Callable[_P, _R]:
        @wraps(call)
        def named(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            try:
                return call(*args, **kwargs)
            except Exception as error:
                own = renamed(error, function, arguments)
                if own is error:
                    raise
                raise own from error.__cause__ or error  # packed operands are renamed twice

        return named

    return decorate


def arrays(function: str, **values: Any) -> list[NDArray[Any]]:
    """Return the operands as ndarrays; they must have the same dtype."""
    found = {name: as_array(function, name, value) for name, value in values.items()}
    equal_dtypes(function, **found)
    return list(found.values())


def equal_dtypes(function: str, **arrays: Any) -> None:
    """Raise unless all arrays, of any library, have the same dtype."""
    (first_name, first), *others = arrays.items()
    for name, array in others:
        if array.dtype != first.dtype:
            text = f" has dtype {array.dtype} but "
            raise refusal(TypeError, function, name, text, first_name, f" has {first.dtype}: they must be equal")


def no_dropout(function: str, dropout_p: Any) -> None:
    """Raise if dropout is not 0: it is for training only."""
    if real(function, "dropout_p", dropout_p) != 0:
        text = f" is {dropout_p!r}, but there is no dropout at inference: pass 0.0"
        raise refusal(ValueError, function, "dropout_p", text)


def dimensions(function: str, count: int, **operands: NDArray[Any]) -> None:
    """Raise unless all operands have `count` dimensions."""
    for name, array in operands.items():
        if array.ndim != count:
            text = f" has shape {array.shape}, but {count} dimensions are needed"
            raise refusal(ValueError, function, name, text)


def is_integer(value: Any) -> bool:
    """Whether this is an integer but not a bool."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)
