"""The parts that both caches share: memory, a lock, and the steps of a call that uses the cache."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import _core
from ._copying import Copyable


class Step(NamedTuple):
    """The core's view of a cache's sequences for one call, and the state that is needed to undo a failed call."""

    sequences: _core.Sequences
    state: Any


class AnyCache(Copyable):
    """Base class of both caches: memory, a lock, and the steps of a call that uses the cache.

    `_begin`, `_claim`, `_commit` and `_roll_back` are called with the lock held.
    """

    window: int | None

    @property
    def dtype(self) -> np.dtype[Any]:
        """The storage type."""
        return self._store.dtype

    @property
    def nbytes(self) -> int:
        """Size of the whole cache in bytes."""
        return self._store.memory.nbytes

    def __repr__(self) -> str:
        *sizes, window = (f"{name}={getattr(self, name)}" for name in self._made_with)
        return f"{type(self).__name__}({', '.join(sizes)}, dtype={self._store.name!r}, {window})"

    def _run(self, function: str, sequences: Any, tokens: int, call: Callable[[Step], Any]) -> Any:
        """Run `call`, which appends `tokens` tokens to each sequence and may read the cache; undo it if it fails."""
        with self._lock.writing if tokens else self._lock.reading:
            step = None
            try:
                step = self._begin(function, sequences, tokens)
                self._claim(step)
                result = call(step)
                self._commit(step)
            except BaseException:
                if step is not None:
                    self._roll_back(step)
                raise
        return result

    def _append(self, step: Step, k: NDArray[Any], v: NDArray[Any]) -> None:
        _core.append("append", self._store.core, step.sequences, k, v)

    @abstractmethod
    def _begin(self, function: str, sequences: Any, tokens: int) -> Step:
        """Find room for `tokens` more tokens in each sequence, and return what the core needs."""

    @abstractmethod
    def _claim(self, step: Step) -> None:
        """Take the room that `_begin` found."""

    @abstractmethod
    def _commit(self, step: Step) -> None:
        """Finish a step that succeeded. The core has committed the lengths."""

    @abstractmethod
    def _roll_back(self, step: Step) -> None:
        """Undo a step that failed."""
