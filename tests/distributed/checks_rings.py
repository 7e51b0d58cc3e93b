"""Checks of caches with a window that are spread over ranks, see rank_checks.py."""

from __future__ import annotations

from typing import Any

import numpy as np
from checks_caches import lengths, tokens
from rank_operands import error_of_all, raised

import selfattn as sa
from selfattn.distributed import Group, SpreadCache


def check_refused(group: Group) -> dict[str, str]:
    """A cache with a window refuses, at the first call and as in one process, what would need the tokens it loses."""
    found = {}
    pages = sa.PagedKVCache(8, 4, 2, 16, window=4)
    sequences = [pages.allocate(), pages.allocate()]
    ring = sa.KVCache(2, 2, 16, 20, window=4)
    cases: dict[str, dict[str, Any]] = {
        "nothing": {},
        "slopes": {"alibi_slopes": np.ones(4)},
        "right": {"window": (None, 0)},
        "farther": {"window": (5, None)},
        "mixed": {"window": (1000, None), "softcap": 3.0, "sinks": np.ones(4)},
    }

    def error(cache: Any, count: int, options: dict[str, Any], **more: Any) -> str:
        q, k, v = tokens(0, count)
        own, alone = SpreadCache(cache), sa.KVCache(2, 2, 16, 20, window=4)
        text = error_of_all(group, lambda: group.attention_with_kvcache(q, own, k, v, **options, **more))
        expected = raised(lambda: sa.attention_with_kvcache(q, alone, k, v, **options))
        assert text == expected.replace("attention", "Group.attention"), text
        assert lengths(cache, more.get("sequences")) == [0, 0]
        return text

    for name, options in cases.items():
        for count in (1, 2):
            found[name] = error(ring, count, options)
            assert error(pages, count, options, sequences=sequences) == found[name]
    q, k, v = tokens(0, 1)
    group.attention_with_kvcache(q, SpreadCache(ring), k, v, window=(4, None))
    return found


def check_steps(group: Group) -> None:
    """Steps of several tokens: a rank that appends nothing may have lost keys before its newest ones."""
    rng = np.random.default_rng(2)
    t5 = sa.T5Bias(rng.standard_normal((32, 4)).astype(np.float32))
    more: list[dict[str, Any]] = [{}, {"t5": t5, "rope": True}, {"alibi_slopes": np.ones(4), "sinks": np.ones(4)}]
    for case in range(12):
        kept = int(rng.integers(1, 8))
        options = {"window": (int(rng.integers(kept + 1)), None), **more[case % 3]}
        alone = sa.KVCache(2, 2, 16, 100, window=kept)
        pages, ring = sa.PagedKVCache(40, 4, 2, 16, window=kept), sa.KVCache(2, 2, 16, 100, window=kept)
        sequences = {"sequences": [pages.allocate(), pages.allocate()]}
        caches = [(SpreadCache(pages), sequences), (SpreadCache(ring), {})]
        for step in range(12):
            q, k, v = tokens(step, int(rng.integers(1, 5)))
            expected = sa.attention_with_kvcache(q, alone, k, v, **options)
            for cache, ids in caches:
                found = group.attention_with_kvcache(q, cache, k, v, **options, **ids)
                np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5, err_msg=f"{case} {step} {kept}")
