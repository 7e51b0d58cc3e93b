"""Attention over a paged cache in two parts: the pages that all sequences share, and the rest of each sequence."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import _core
from ._apply_rope import apply_rope
from ._paged import PagedKVCache
from ._rope import places_for
from ._typing import Layout

_NAME = "attention_with_kvcache"

_WITH_CASCADE = {
    "mask", "causal", "scale", "softcap", "sinks", "layout", "precision", "seed", "return_lse", "num_threads",
}  # fmt: skip


def suits_cascade(options: _core.Options) -> bool:
    """Whether only options are set that a cascade supports."""
    default = _core.Options()
    others = [name for name in _core.OPTIONS if name not in _WITH_CASCADE]
    arrays = [name for name in others if name in _core.ARRAY_OPTIONS]
    numbers = [name for name in others if name not in _core.ARRAY_OPTIONS]
    return all(getattr(options, name) is None for name in arrays) and all(
        getattr(options, name) == getattr(default, name) for name in numbers
    )


class Cascade(NamedTuple):
    """One call in two parts: the pages that all sequences share, and the remaining pages of each sequence."""

    q: Any
    k: Any
    v: Any
    rope: Any
    positions: Any
    layout: Layout
    options: _core.Options

    def run(self, cache: PagedKVCache, sequences: Any, tokens: int, out: Any) -> Any:
        appended = 0 if self.k is None else tokens
        return cache._run(_NAME, sequences, appended, lambda step: self._attend(cache, step, appended, out))

    def _attend(self, cache: PagedKVCache, step: _core.Step, appended: int, out: Any) -> Any:
        rotation = None if self.rope is None else self.rope.for_core(_NAME, cache.head_dim)
        inputs = _core.CacheInputs(q=self.q, k=self.k, v=self.v, rope=rotation, positions=self.positions)
        token_axis = 1 if self.layout == "bshd" else 2
        tokens = self.q.shape[token_axis] if self.q.ndim == 4 else 0
        pages, lengths = _core.common_pages(_NAME, step)
        first = lengths + appended - tokens
        # Share only whole pages that every query sees completely and that were filled before this call.
        seen = int(first.min(initial=0 if len(lengths) < 2 else 1 << 60)) // cache.page_size
        pages = pages[: max(seen, 0)]
        if not len(pages):
            return _core.attend_cache(_NAME, step, inputs, out, self.options)
        if out is not None:
            shape = (*self.q.shape[:3], cache.value_dim)
            _core.check_out(_NAME, out, np.broadcast_to(np.empty((), self.q.dtype), shape), "q")
        options = self.options.copy()
        options.return_lse = True
        # Attend to the unshared part first, because that call checks all arguments. Both parts keep the computation
        # type, so that the result is rounded only once.
        inputs.skipped, inputs.unrounded = len(pages) * cache.page_size, True
        own, own_lse = _core.attend_cache(_NAME, step, inputs, None, options)
        prefix, prefix_lse = self._attend_prefix(cache, pages, first, tokens, options)
        if out is None:
            out = own if own.dtype == self.q.dtype else np.empty(own.shape, self.q.dtype)
        own, merged = (x.swapaxes(1, 2) if self.layout == "bshd" else x for x in (own, out))
        _core.merge_states([prefix, own], [prefix_lse, own_lse], merged, own_lse, options.num_threads)
        return (out, own_lse) if self.options.return_lse else out

    def _attend_prefix(
        self,
        cache: PagedKVCache,
        pages: NDArray[np.int32],
        first: NDArray[np.int64],
        tokens: int,
        options: _core.Options,
    ) -> tuple[Any, Any]:
        """Attend to the shared pages with the rows of all sequences as if they were one sequence; head axis first."""
        q = self.q
        if self.rope is not None:
            places = self.positions
            if places is None:
                places = places_for(self.rope, first[:, None] + np.arange(tokens))
            q = apply_rope(q, places, self.rope, layout=self.layout)
        heads_first = q.swapaxes(1, 2) if self.layout == "bshd" else q
        batch, heads, _, width = heads_first.shape
        rows = np.ascontiguousarray(heads_first.swapaxes(0, 1)).reshape(1, heads, batch * tokens, width)
        # No causal limit, mask or sinks here: the whole prefix is visible, and only one part may count the sinks.
        plain = options.copy()
        plain.mask, plain.causal, plain.sinks, plain.layout = None, False, None, _core.LAYOUTS["bhsd"]
        inputs = _core.CacheInputs(q=rows, unrounded=True)
        lengths = np.array([len(pages) * cache.page_size])
        table = _core.make_page_table(pages=pages[None], lengths=lengths, starts=None)
        step = _core.Step(store=cache._store.core, sequences=table)
        out, lse = _core.attend_cache(_NAME, step, inputs, None, plain)
        out = out.reshape(heads, batch, tokens, cache.value_dim)
        return out.swapaxes(0, 1), lse.reshape(heads, batch, tokens).swapaxes(0, 1)
