"""Warnings about deprecated arguments: once, with the line of the caller, however deep in the package it happens."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest

from selfattn import _deprecation

# A function of the package with a deprecated argument, called directly and by way of another function of the package.
SOURCE = """
def attend(x, old=None):
    if old is not None:
        deprecated_argument("attend", "old", "use new", "2.0")
    return x

def layer(x, **options):
    return attend(x, **options)
"""


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[..., int]]:
    monkeypatch.setattr(_deprecation, "_warned", set())
    names = {"__name__": "selfattn._example", "deprecated_argument": _deprecation.deprecated_argument}
    exec(SOURCE, names)
    return names


def line() -> int:
    import sys

    return sys._getframe(1).f_lineno


@pytest.mark.parametrize("name", ["attend", "layer"])
def test_warns_once_with_the_line_of_the_caller(package: dict[str, Callable[..., int]], name: str) -> None:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        expected = line() + 1
        assert package[name](1, old=2) == 1
        assert package[name](1, old=2) == 1
        assert package[name](1) == 1
    (warning,) = found
    assert warning.category is DeprecationWarning
    assert (warning.filename, warning.lineno) == (__file__, expected)
    assert str(warning.message) == "attend: old is deprecated and will be removed in version 2.0: use new"


def test_every_call_raises_where_warnings_are_errors(package: dict[str, Callable[..., int]]) -> None:
    for _ in range(2):
        with pytest.raises(DeprecationWarning, match="old is deprecated"):
            package["layer"](1, old=2)


def test_each_argument_warns(package: dict[str, Callable[..., int]]) -> None:
    with pytest.warns(DeprecationWarning, match="first"):
        _deprecation.deprecated_argument("attend", "first", "use new", "2.0")
    with pytest.warns(DeprecationWarning, match="second"):
        _deprecation.deprecated_argument("attend", "second", "use new", "2.0")
