"""Attention over caches that are spread over ranks: keys stay where they are, and results are merged in rank order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _core
from .._any_cache import no_cache
from .._apply_rope import apply_rope
from .._arguments import core_options, floats, thread_count, window_sides
from .._cache import KVCache
from .._cached import attention_with_kvcache
from .._errors import refusal, renamed
from .._keywords import refuse_unknown
from .._paged import PagedKVCache
from .._rope import places_for, rope_or_none
from .._states import merge_states
from ._agree import Fact, failure, raise_failures
from ._link import Link
from ._options import checksum, value_text
from ._rows import Owners, runs_of
from ._spread import BY_DISTANCE, SpreadCache, terms

_MAY_DIFFER = ("sequences", "layout", "return_lse", "num_threads")  # between ranks


class Held:
    """The lengths of a cache's sequences before a call, to undo it."""

    def __init__(self, function: str, cache: Any, sequences: Any) -> None:
        if not isinstance(cache, (KVCache, PagedKVCache)):
            raise no_cache(function, cache)
        if isinstance(cache, PagedKVCache) and sequences is None:
            raise refusal(ValueError, function, "sequences", " is needed with a PagedKVCache")
        self._cache, self._sequences = cache, sequences
        if isinstance(cache, KVCache):
            self.lengths = [int(n) for n in cache.lengths]
        else:
            self.lengths = [cache.length(sequence) for sequence in sequences]

    def restore(self) -> None:
        """Forget the tokens that have been appended since."""
        if isinstance(self._cache, KVCache):
            self._cache.truncate(np.array(self.lengths, np.int64))
        else:
            for sequence, length in zip(self._sequences, self.lengths, strict=True):
                self._cache.truncate(sequence, length)


class CacheCall:
    """The arguments of `Group.attention_with_kvcache` on one rank; arrays have their heads before their tokens."""

    turn: int  # the rank that appends the new tokens
    totals: NDArray[np.int64]

    def __init__(
        self, function: str, like: Callable[..., Any], arrays: Sequence[Any], options: Mapping[str, Any]
    ) -> None:
        """Check what one rank can check."""
        self.function = function
        self.given = {name: x for name, x in options.items() if x is not None}
        refuse_unknown(like, options)
        self._compared = [x.name for x in signature(like).parameters.values() if x.kind is x.KEYWORD_ONLY]
        self._compared = [name for name in self._compared if name not in _MAY_DIFFER]
        self.layout = self.given.pop("layout", "bhsd")
        self.return_lse = self.given.pop("return_lse", False)
        self.num_threads = thread_count(function, self.given.pop("num_threads", None))
        q, cache, k, v = arrays
        self.q = self._array("q", q)
        self.k, self.v = (None if x is None else self._array(name, x) for name, x in (("k", k), ("v", v)))
        if (k is None) != (v is None):
            raise refusal(ValueError, function, "k" if k is None else "v", " is missing")
        if k is None and self.q.shape[2] > 1 and self.given.get("causal", True):
            text = " is missing, but with several causal queries the newest tokens must be those of this call"
            raise refusal(ValueError, function, "k", text)
        if k is None and "mask" in self.given:
            text = " is given without k, but it covers the newest tokens, which must be those of this call"
            raise refusal(ValueError, function, "mask", text)
        self.cache = cache.cache if isinstance(cache, SpreadCache) else cache
        self.spread = cache if isinstance(cache, SpreadCache) else None
        self.held = Held(function, self.cache, self.given.get("sequences"))
        if len(self.held.lengths) != self.q.shape[0]:
            text = f" has a batch of {self.q.shape[0]}, but there are {len(self.held.lengths)} sequences in "
            raise refusal(ValueError, function, "q", text, "cache", "")
        self._check_positions()

    def _check_positions(self) -> None:
        """Raise if positions of the cache's tokens are needed, but not known."""
        self.sequences = self.given.get("sequences", range(len(self.held.lengths)))
        if self.spread is not None:
            self.spread.check(self.function, self.sequences, self.held.lengths)
            self._check_window()
            return
        for name in BY_DISTANCE:
            if name in self.given:
                text = " needs the positions of the tokens in the cache: pass a SpreadCache"
                raise refusal(ValueError, self.function, name, text)
        if self.cache.window is not None:
            text = " has a window, which needs the positions of its tokens: pass a SpreadCache"
            raise refusal(ValueError, self.function, "cache", text)

    def _check_window(self) -> None:
        """Raise, as one process does, if queries may see tokens that a cache with a window has lost."""
        kept = self.cache.window
        if kept is None:
            return
        left = window_sides(self.function, self.given["window"])[0] if "window" in self.given else -1
        if left < 0 or left > kept:
            text = f" is {'none' if left < 0 else f'{left} to the left'}, but the cache keeps only the tokens that a "
            raise refusal(ValueError, self.function, "window", f"{text}window of {kept} sees")

    def _array(self, name: str, value: Any) -> NDArray[Any]:
        array = floats(self.function, name, value)
        if array.ndim != 4:
            raise refusal(ValueError, self.function, name, f" has shape {array.shape}, but 4 axes are needed")
        return array.swapaxes(1, 2) if self.layout == "bshd" else array

    def facts(self) -> list[Fact]:
        """Return what must be equal on all ranks."""
        found = []
        for name, array in (("q", self.q), ("k", self.k), ("v", self.v)):
            found.append(Fact(name, " has dtype ", "none" if array is None else array.dtype.name))
            found.append(Fact(name, " has shape ", "none" if array is None else str(array.shape)))
            found.append(Fact(name, " has checksum ", "none" if array is None else checksum(array)))
        found += [Fact(name, " is ", value_text(self.given.get(name))) for name in self._compared]
        kinds = "a SpreadCache" if self.spread is not None else "no SpreadCache"
        found.append(Fact("cache", " is ", kinds))
        for name in ("num_kv_heads", "head_dim", "value_dim", "window"):
            found.append(Fact("cache", f" has {name} ", str(getattr(self.cache, name))))
        return found

    def own(self) -> tuple[list[int], bool]:
        """Return what all ranks must know of this one."""
        return self.held.lengths, self.spread is not None and self.spread.is_new(self.sequences)

    def settle(self, link: Link, owns: Sequence[tuple[Sequence[int], bool]]) -> None:
        """Check what depends on all ranks: options by distance, and positions told since the last call."""
        lengths = [own for own, _ in owns]
        tokens = [sum(own) for own in lengths]
        self.turn = tokens.index(min(tokens))
        self.totals = np.array(lengths, np.int64).sum(axis=0)
        if self.spread is None:
            return
        self._check_terms()
        if not any(is_new for _, is_new in owns):
            return
        with link.flight(self.function):
            runs = [runs_of(self.function, self.spread.rows(sequence)) for sequence in self.sequences]
            of_ranks = link.exchange(self.function, runs)
        for of_sequence in zip(*of_ranks, strict=True):
            Owners(self.function, of_sequence)
        self.spread.forget_new(self.sequences)

    def _check_terms(self) -> None:
        """Check the shapes of options by distance as one process does, which has all keys; equal on all ranks."""
        given = {name: self.given[name] for name in BY_DISTANCE if name in self.given}
        if not given:
            return
        tokens = int(self.totals.max(initial=0)) + (0 if self.k is None else self.q.shape[2])
        shape = (len(self.q), self.cache.num_kv_heads, tokens)
        k, v = (
            np.broadcast_to(np.zeros((), self.q.dtype), (*shape, width))
            for width in (self.cache.head_dim, self.cache.value_dim)
        )
        try:
            _core.explain(self.q, k, v, core_options(self.function, **given))
        except (TypeError, ValueError) as error:
            raise renamed(error, self.function, {"k": "cache", "v": "cache"}) from None

    def attend(self, rank: int, num_threads: int) -> Any:
        """Append, if it is this rank's turn, and attend to this rank's cache."""
        options = {**self.given, "num_threads": num_threads, "return_lse": True}
        count = self.q.shape[2]
        places = (self.totals - (count if self.k is None else 0))[:, None] + np.arange(count)
        rope = rope_or_none(self.function, options.get("rope"))
        if rope is not None and "positions" not in options:
            options["positions"] = places_for(rope, places)
        if self.spread is not None:
            options = {name: x for name, x in options.items() if name not in BY_DISTANCE}
            options |= self._terms(places, rank == self.turn and self.k is not None)
        # Results stay in the type of computation until they are merged.
        q = self.q if self.q.dtype == np.float64 else self.q.astype(np.float32, copy=False)
        if rank == self.turn and self.k is not None:
            return attention_with_kvcache(q, self.cache, self.k, self.v, **options)
        # All queries see all tokens of this cache that options by distance do not hide. One rank counts the sinks.
        absent = ("mask",) if rank == self.turn else ("mask", "sinks")
        plain = {name: x for name, x in options.items() if name not in absent} | {"causal": False}
        if count == 1 or self.k is None or self.cache.window is None:
            return attention_with_kvcache(q, self.cache, **plain)
        return self._attend_to_ring(q, plain)

    def _attend_to_ring(self, q: NDArray[Any], options: dict[str, Any]) -> Any:
        """Attend with several queries to a cache that may have lost what its newest tokens, as queries, would see.

        The queries are later tokens than those of the cache. As heads of one query, they see no more than it keeps.
        """
        rope = rope_or_none(self.function, options.pop("rope", None))
        if rope is not None:
            q = apply_rope(q, options.pop("positions"), rope)
        batch, heads, count, width = q.shape
        if "bias" in options:
            bias = options["bias"]
            bias = np.broadcast_to(bias, (batch, heads, count, bias.shape[-1]))
            options["bias"] = bias.reshape(batch, heads * count, 1, -1)
        out, lse = attention_with_kvcache(q.reshape(batch, heads * count, 1, width), self.cache, **options)
        return out.reshape(batch, heads, count, -1), lse.reshape(batch, heads, count)

    def _terms(self, queries: NDArray[np.int64], appends: bool) -> dict[str, Any]:
        assert self.spread is not None
        keys = [self.spread.rows(sequence) for sequence in self.sequences]
        if appends:
            keys = [np.append(*both) for both in zip(keys, queries, strict=True)]
        found = terms(self.function, self.given, keys, queries, self.q.shape[1])
        if "bias" in found:
            found["bias"] = found["bias"].astype(np.float64 if self.q.dtype == np.float64 else np.float32)
        return found if self.cache.window is None else {"window": (self.cache.window, None), **found}

    def commit(self, rank: int) -> None:
        """Note that no rank has failed."""
        if self.spread is not None and self.k is not None and rank == self.turn:
            self.spread.add(self.sequences, self.totals, self.q.shape[2])

    def results(self, out: NDArray[Any], lse: NDArray[Any]) -> Any:
        """Return the results in the form that the caller asked for."""
        out = out.astype(self.q.dtype, copy=False)
        out = out.swapaxes(1, 2) if self.layout == "bshd" else out
        return (out, lse) if self.return_lse else out


def attend_cache(link: Link, call: CacheCall, num_threads: int) -> Any:
    """Return the results, or raise the error of any rank on all of them; then no cache has changed."""
    try:
        with link.flight(call.function):
            error, states = None, None
            try:
                states = call.attend(link.rank, num_threads)
            except Exception as raised:
                error = raised
            found = _gather(link, call, states)
            failures = link.exchange(call.function, error and failure(error, call.function)) if found is None else []
        raise_failures(failures, error)
        assert found is not None
        results = call.results(*merge_states(*found))
        call.commit(link.rank)
        return results
    except BaseException:
        call.held.restore()
        raise


def _gather(link: Link, call: CacheCall, states: Any) -> tuple[list[NDArray[Any]], list[NDArray[Any]]] | None:
    """Return out and lse of all ranks, or None if a rank has none."""
    batch, heads, count, _ = call.q.shape
    kind = np.dtype(np.float64 if call.q.dtype == np.float64 else np.float32)
    shape = (batch, heads, count, call.cache.value_dim)
    numbers = np.empty(1 + int(np.prod(shape)) + int(np.prod(shape[:3])), kind)
    split = 1 + int(np.prod(shape))
    numbers[0] = states is not None
    if states is not None:
        numbers[1:split], numbers[split:] = states[0].ravel(), states[1].ravel()
    rows = link.gather(call.function, numbers.view(np.uint8)).view(kind)
    if not rows[:, 0].all():
        return None
    return [row[1:split].reshape(shape) for row in rows], [row[split:].reshape(shape[:3]) for row in rows]
