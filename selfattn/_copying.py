"""Copies and pickles of caches: their contents, in newly allocated memory."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ._lock import SharedLock
from ._store import Store

_VERSION = 1  # version of the pickle format
_Self = TypeVar("_Self", bound="Copyable")


class Copyable(ABC):
    """A cache that supports `copy.copy`, `copy.deepcopy` and `pickle`. Meanwhile, appends by other threads wait."""

    _store: Store
    _lock: SharedLock
    _made_with: tuple[str, ...]  # attributes that are arguments of `_make`
    _made: tuple[str, ...]  # further attributes that `_make` sets

    @abstractmethod
    def _make(self, **arguments: Any) -> None:
        """Initialize as an empty cache."""

    @abstractmethod
    def _contents(self) -> dict[str, Any]:
        """Return the contents: plain objects, and "tokens", whose arrays may be views."""

    @abstractmethod
    def _load(self, contents: dict[str, Any]) -> None:
        """Check what `_contents` returned, which may come from an untrusted pickle, and set it."""

    def __copy__(self: _Self) -> _Self:
        twin = self._twin()
        vars(twin).update(self._foreign())
        return twin

    def __deepcopy__(self: _Self, memo: dict[int, Any]) -> _Self:
        twin = memo[id(self)] = self._twin()
        vars(twin).update(copy.deepcopy(self._foreign(), memo))
        return twin

    def _twin(self: _Self) -> _Self:
        twin = type(self).__new__(type(self))
        twin._make(**self._arguments())
        with self._lock.reading:
            twin._load(self._contents())
        return twin

    def __getstate__(self) -> dict[str, Any]:
        with self._lock.reading:
            contents = self._contents()
            contents["tokens"] = [np.array(tokens) for tokens in contents["tokens"]]
        state = {"version": _VERSION, "arguments": self._arguments(), "contents": contents}
        foreign = self._foreign()
        return {**state, "attributes": foreign} if foreign else state

    def __setstate__(self, state: dict[str, Any]) -> None:
        function = type(self).__name__
        version = state.get("version") if isinstance(state, dict) else None
        if version != _VERSION:
            raise ValueError(f"{function}: the pickle has version {version!r}, but {_VERSION} is known")
        try:
            self._make(**state["arguments"])
            self._load(state["contents"])
        except KeyError as error:
            raise ValueError(f"{function}: the pickle lacks {error}") from None
        foreign = state.get("attributes", {})
        if not isinstance(foreign, dict) or not vars(self).keys().isdisjoint(foreign):
            raise self._damaged("attributes that are not those of a subclass")
        vars(self).update(foreign)

    def _foreign(self) -> dict[str, Any]:
        """Return attributes that were added by a subclass or a user."""
        return {name: value for name, value in vars(self).items() if name not in (*self._made_with, *self._made)}

    def _arguments(self) -> dict[str, Any]:
        return {"dtype": self._store.name, **{name: getattr(self, name) for name in self._made_with}}

    def _damaged(self, what: str) -> ValueError:
        return ValueError(f"{type(self).__name__}: the pickle holds {what}")

    def _fill(self, where: Any, tokens: Any) -> None:
        """Copy arrays of tokens to their places in the store."""
        stores = self._store.arrays()
        if not isinstance(tokens, list) or len(tokens) != len(stores):
            raise self._damaged("tokens of another storage type")
        for store, array in zip(stores, tokens, strict=True):
            shape = store[where].shape
            if not isinstance(array, np.ndarray) or array.dtype != store.dtype or array.shape != shape:
                raise self._damaged(f"tokens that are not {store.dtype} of shape {shape}")
        for store, array in zip(stores, tokens, strict=True):
            store[where] = array

    def _integers(self, name: str, value: Any, count: int) -> NDArray[np.int64]:
        if not isinstance(value, np.ndarray) or value.dtype != np.int64 or value.shape != (count,):
            raise self._damaged(f"{name} that are not {count} 64-bit integers")
        return value
