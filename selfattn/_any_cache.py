"""The parts that both caches share: memory, a lock, and the steps of a call that uses the cache."""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _core
from ._arguments import as_array
from ._copying import Copyable
from ._errors import refusal
from ._typing import Values


class AnyCache(Copyable):
    """Base class of both caches: memory, a lock, and the steps of a call that uses the cache."""

    window: int | None
    head_dim: int
    value_dim: int
    values: Values
    _idle: deque[_core.Step]  # of calls that have returned; a list would allocate memory for each of them

    @property
    def dtype(self) -> np.dtype[Any]:
        """The storage type."""
        return self._store.dtype

    @property
    def nbytes(self) -> int:
        """Size of the whole cache in bytes."""
        return self._store.memory.nbytes

    def __repr__(self) -> str:
        *sizes, window, values = (f"{name}={getattr(self, name)!r}" for name in self._made_with)
        own = "" if self.values == "own" else f", {values}"
        return f"{type(self).__name__}({', '.join(sizes)}, dtype={self._store.name!r}, {window}{own})"

    def _run(self, function: str, sequences: Any, tokens: int, call: Callable[[_core.Step], Any]) -> Any:
        """Run `call`, which appends `tokens` tokens to each sequence and may read the cache.

        The core undoes a call that fails. Here, what it has committed is undone if an interrupt comes later.
        """
        with self._lock.writing if tokens else self._lock.reading:
            step = self._step(function, sequences)
            try:
                result = call(step)
                self._idle.append(step)
                return result
            except BaseException:
                _core.undo(step)
                raise

    def _values_of(self, function: str, k: NDArray[Any], v: Any) -> NDArray[Any]:
        """Return new values as an array; if they are a prefix of the keys, as a view of these."""
        if self.values == "own":
            return as_array(function, "v", v)
        if v is not None:
            raise refusal(ValueError, function, "v", " is given, but the cache takes it from ", "k", "")
        return k[..., : self.value_dim] if k.ndim else k

    @abstractmethod
    def _step(self, function: str, sequences: Any) -> _core.Step:
        """Describe one call on these sequences to the core."""

    def _step_on(self, sequences: _core.Ledger | _core.PagePool, ids: list[int] | None = None) -> _core.Step:
        """Return a step for the core's description of the sequences: one of an earlier call, for its memory, or new."""
        try:
            step = self._idle.pop()
        except IndexError:
            return _core.Step(store=self._store.core, sequences=sequences, ids=ids)
        _core.renew(step, sequences, ids)
        return step


def no_cache(function: str, given: Any) -> TypeError:
    """Return the error for an argument `cache` that is not a cache."""
    text = f" is a {type(given).__name__}, but a KVCache or PagedKVCache is needed"
    return refusal(TypeError, function, "cache", text)
