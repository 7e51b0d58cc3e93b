"""selfattn's own call on another cache or with other queries, to measure the cost of pages, heads and steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from selfattn import _core
from selfattn._arguments import core_options
from selfattn._bench.options import Cache
from selfattn._bench.peer import Run
from selfattn._bench.workload import Arrays, Workload

from .cached import STEPS, Filled, OwnOnCaches, contiguous, last_token

CONTIGUOUS, ONE_QUERY, TWICE = "contiguous", "one-query", "twice-the-keys"


class OnCache(OwnOnCaches):
    """The same call on the same cache; subclasses change it."""

    by_default = False

    def why_not(self, workload: Workload) -> str:
        """See `Peer.why_not`."""
        if workload.cache is None:
            return "it has no cache"
        return self.why_not_on(workload, workload.cache)

    def why_not_on(self, workload: Workload, cache: Cache) -> str:
        """Why this variant cannot run a workload with this cache; empty if it can."""
        return ""

    def prepare(self, workload: Workload, arrays: Arrays, threads: int) -> Run:
        """See `Peer.prepare`."""
        return super().prepare(self.answered(workload), self.operands(workload, arrays), threads)


class Contiguous(OnCache):
    """A KVCache instead of pages."""

    name, label = CONTIGUOUS, "selfattn on a contiguous cache"

    def why_not_on(self, workload: Workload, cache: Cache) -> str:
        """See `OnCache.why_not_on`."""
        return "" if cache.page_size and not cache.step else "its cache is contiguous, or steps"

    def answered(self, workload: Workload) -> Workload:
        """See `Peer.answered`."""
        return contiguous(workload)


class BFloat16Cache(OnCache):
    """A bfloat16 cache instead of int8."""

    name, label = "bf16-cache", "selfattn on a cache of bfloat16"

    def why_not_on(self, workload: Workload, cache: Cache) -> str:
        """See `OnCache.why_not_on`."""
        if workload.dtype == "float16":
            return "queries of float16 cannot have a cache of bfloat16"
        return "" if cache.dtype == "int8" else "its cache is not of int8"

    def answered(self, workload: Workload) -> Workload:
        """See `Peer.answered`."""
        return replace(workload, cache=_changed(workload, dtype="bfloat16"))


class WithoutCascade(OnCache):
    """Without cascade: every sequence reads the shared tokens itself."""

    name, label = "no-cascade", "selfattn without cascade"

    def why_not_on(self, workload: Workload, cache: Cache) -> str:
        """See `OnCache.why_not_on`."""
        return "" if cache.cascade else "it is one without"

    def answered(self, workload: Workload) -> Workload:
        """See `Peer.answered`."""
        return replace(workload, cache=_changed(workload, cascade=False))


class OneHeadPerGroup(OnCache):
    """One query head for each KV head."""

    name, label = "group-1", "selfattn with groups of one"

    def why_not_on(self, workload: Workload, cache: Cache) -> str:
        """See `OnCache.why_not_on`."""
        return "" if workload.group_size > 1 else "its groups are of one"

    def answered(self, workload: Workload) -> Workload:
        """See `Peer.answered`."""
        return replace(workload, num_heads=workload.num_kv_heads)

    def operands(self, workload: Workload, arrays: Arrays) -> Arrays:
        """See `Peer.operands`."""
        return {**arrays, "q": np.ascontiguousarray(arrays["q"][:, :: workload.group_size])}


class OneQuery(OnCache):
    """Only the last query."""

    name, label = ONE_QUERY, "selfattn with one query"

    def why_not_on(self, workload: Workload, cache: Cache) -> str:
        """See `OnCache.why_not_on`."""
        return "" if workload.q_len > 1 else "it has one query"

    def answered(self, workload: Workload) -> Workload:
        """See `Peer.answered`."""
        return replace(workload, q_len=1)

    def operands(self, workload: Workload, arrays: Arrays) -> Arrays:
        """See `Peer.operands`."""
        return {**arrays, "q": np.ascontiguousarray(arrays["q"][:, :, -1:])}


class TwiceTheKeys(OnCache):
    """A step on twice as many keys on average, to extrapolate the time of a step without keys."""

    name, label = TWICE, "selfattn on twice the keys"
    in_tables = False

    def why_not_on(self, workload: Workload, cache: Cache) -> str:
        """See `OnCache.why_not_on`."""
        return "" if cache.step else "it is no step"

    def answered(self, workload: Workload) -> Workload:
        """See `Peer.answered`."""
        return replace(workload, kv_len=2 * workload.kv_len + (STEPS - 1) // 2)

    def operands(self, workload: Workload, arrays: Arrays) -> Arrays:
        """See `Peer.operands`."""
        index = np.arange(self.answered(workload).kv_len) % workload.kv_len
        return {**arrays, "k": arrays["k"][:, :, index], "v": arrays["v"][:, :, index]}


class BareCore(OnCache):
    """A direct call of the core with the arguments of a step, without the Python layer."""

    name, label = "core", "the core's part of it"

    def why_not_on(self, workload: Workload, cache: Cache) -> str:
        """See `OnCache.why_not_on`."""
        return "" if cache.step and not cache.page_size else "it is no step on a KVCache"

    def prepare(self, workload: Workload, arrays: Arrays, threads: int) -> Run:
        """See `Peer.prepare`."""
        filled, name = Filled(workload, arrays), "step"
        k, v = last_token(arrays)
        inputs = _core.CacheInputs(q=arrays["q"], k=k, v=v)
        options = core_options(name, causal=True, num_threads=threads)
        out = np.empty((*arrays["q"].shape[:-1], workload.value_dim), arrays["q"].dtype)
        made, left = filled.cache._step(name, None), STEPS

        def step() -> Any:
            nonlocal left
            if not left:
                filled.rewind()
                left = STEPS
            left -= 1
            return _core.attend_cache(name, made, inputs, out, options)

        return step


def _changed(workload: Workload, **changes: Any) -> Cache:
    assert workload.cache is not None
    return replace(workload.cache, **changes)


CACHE_VARIANTS = (
    Contiguous(),
    BFloat16Cache(),
    WithoutCascade(),
    OneHeadPerGroup(),
    OneQuery(),
    TwiceTheKeys(),
    BareCore(),
)
