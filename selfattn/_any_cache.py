"""The parts that both caches share: memory, a lock, and the steps of a call that uses the cache."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np

from . import _core
from ._copying import Copyable
from ._errors import refusal


class AnyCache(Copyable):
    """Base class of both caches: memory, a lock, and the steps of a call that uses the cache."""

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

    def _run(self, function: str, sequences: Any, tokens: int, call: Callable[[_core.Step], Any]) -> Any:
        """Run `call`, which appends `tokens` tokens to each sequence and may read the cache.

        The core undoes a call that fails. Here, what it has committed is undone if an interrupt comes later.
        """
        with self._lock.writing if tokens else self._lock.reading:
            step = self._step(function, sequences)
            try:
                return call(step)
            except BaseException:
                _core.undo(step)
                raise

    @abstractmethod
    def _step(self, function: str, sequences: Any) -> _core.Step:
        """Describe one call on these sequences to the core."""


def no_cache(function: str, given: Any) -> TypeError:
    """Return the error for an argument `cache` that is not a cache."""
    text = f" is a {type(given).__name__}, but a KVCache or PagedKVCache is needed"
    return refusal(TypeError, function, "cache", text)
