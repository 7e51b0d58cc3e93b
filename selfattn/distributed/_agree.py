"""Errors that all ranks raise: they compare what they were given before they compute."""

from __future__ import annotations

import builtins
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from .._errors import refusal, renamed
from ._link import Link


class Fact(NamedTuple):
    """What all ranks must agree on, for example ("k", " has dtype ", "float32")."""

    argument: str
    verb: str
    value: str


class _Described(Protocol):
    def facts(self) -> Sequence[Fact]:
        """Return what must be equal on all ranks."""

    def own(self) -> Any:
        """Return what all ranks must know of this one."""


_D = TypeVar("_D", bound=_Described)
_T = TypeVar("_T")


class _Failure(NamedTuple):
    kind: str
    text: str


def agree(link: Link, function: str, prepare: Callable[[], _D]) -> tuple[_D, list[Any]]:
    """Return what `prepare` checked and converted on this rank, and what the others say of theirs.

    If `prepare` raises on any rank, or ranks were called with different arguments, all of them raise the same error.
    """
    with link.flight(function):
        cause: Exception | None = None
        mine: _D | None = None
        facts: list[Fact] = []
        message: Any
        try:
            mine = prepare()
            facts = [Fact("", "", function), *mine.facts()]
            message = (hashlib.sha256(repr(facts).encode()).digest(), mine.own())
        except Exception as error:
            cause = renamed(error, function, {})
            message = _Failure(type(cause).__name__, str(cause))
        found = link.exchange(function, message)
        raised = any(isinstance(x, _Failure) for x in found)
        # Usually all facts are equal: their hashes make one short message.
        differ = not raised and any(x[0] != found[0][0] for x in found)
        described = link.exchange(function, facts) if differ else []
    raise_failures(found, cause)
    if described:
        _compare(described)
    assert mine is not None
    return mine, [own for _, own in found]


def together(link: Link, function: str, compute: Callable[[], _T]) -> _T:
    """Return what `compute` returns on this rank, or raise the error of any rank on all of them."""
    error: Exception | None = None
    result: _T | None = None
    with link.flight(function):
        try:
            result = compute()
        except Exception as raised:
            error = raised
        found = link.exchange(function, error and failure(error, function))
    raise_failures(found, error)
    return result  # type: ignore[return-value]


def raise_failures(found: Sequence[Any], cause: Exception | None) -> None:
    """Raise the error of the first rank that failed, on every rank, with the ranks that raised it."""
    failures = [(rank, x) for rank, x in enumerate(found) if isinstance(x, _Failure)]
    if not failures:
        return
    first = failures[0][1]
    ranks = [rank for rank, failure in failures if failure == first]
    named = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
    kind = getattr(builtins, first.kind, RuntimeError)
    text = first.text if len(ranks) == len(found) else f"{first.text} (on {named})"
    raise (kind if issubclass(kind, Exception) else RuntimeError)(text) from cause


def failure(error: Exception, function: str) -> Any:
    """Return an error as an object for `raise_failures`."""
    error = renamed(error, function, {})
    return _Failure(type(error).__name__, str(error))


def _compare(described: Sequence[Sequence[Fact]]) -> None:
    names = [facts[0].value for facts in described]
    _compare_one(
        names, lambda usual, differs, i, j: ValueError(f"{usual}: rank {i} has called {differs}, but rank {j} has not")
    )
    for column in zip(*described, strict=False):
        argument, verb, _ = column[0]
        compare(names[0], argument, verb, [fact.value for fact in column])


def compare(function: str, argument: str, verb: str, values: Sequence[str]) -> None:
    """Raise, equally on all ranks, if what they say of an argument differs."""

    def error(usual: str, differs: str, i: int, j: int) -> Exception:
        kind = TypeError if "dtype" in verb else ValueError
        return refusal(kind, function, argument, f"{verb}{differs} on rank {i} but {usual} on rank {j}")

    _compare_one(values, error)


def _compare_one(values: Sequence[str], error: Callable[[str, str, int, int], Exception]) -> None:
    """Raise the error of the first rank whose value is not the most frequent one."""
    counts = Counter(values)
    if len(counts) == 1:
        return
    usual = max(counts, key=lambda value: (counts[value], -values.index(value)))
    rank = next(i for i, value in enumerate(values) if value != usual)
    raise error(usual, values[rank], rank, values.index(usual))
