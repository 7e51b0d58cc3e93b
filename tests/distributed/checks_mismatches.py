"""Each argument in turn: the last rank passes something else, and all ranks must raise the same error.

See rank_checks.py. The results are the errors by argument.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import numpy as np
from rank_operands import error_of_all, operands, own

import selfattn as sa
from selfattn.distributed import Group, SplitSelfAttention, SpreadCache

LENGTH = 60
ALLOWED = {"self", "rows", "num_threads", "out", "sequences", "cache", "layout"}  # have tests of their own
# What most ranks pass, and what the last one does.
OPTIONS: dict[str, tuple[Any, Any]] = {
    "alibi_slopes": (np.ones(4), np.zeros(4)),
    "bias": (np.zeros(LENGTH), np.ones(LENGTH)),
    "causal": (True, False),
    "chunk": (100, 50),
    "dropout": (0.1, 0.2),
    "kv_lens": ([60, 50], [60, 51]),
    "kv_starts": ([0, 5], [0, 6]),
    "mask": (np.ones(LENGTH, bool), np.arange(LENGTH) > 0),
    "precision": ("highest", "high"),
    "prefix_lens": ([3, 60], [3, 59]),
    "q_lens": ([60, 50], None),
    "return_lse": (True, False),
    "scale": (None, 0.5),
    "seed": (1, 2),
    "sinks": (np.ones(4), None),
    "softcap": (None, 2.0),
    "t5": (sa.T5Bias(np.full((32, 4), 1.0)), sa.T5Bias(np.full((32, 4), 2.0))),
    "window": ((3, 0), (4, 0)),
}
WITH = {"seed": {"dropout": 0.1}, "dropout": {"seed": 1}, "positions": {"rope": True}}


def sweep(
    group: Group,
    method: Callable[..., Any],
    arrays: dict[str, Any],
    fixed: dict[str, Any],
    pairs: dict[str, tuple[Any, Any]],
) -> dict[str, str]:
    """Return the error of each argument of a method; all of them are in `arrays`, `pairs`, `fixed` or ALLOWED."""
    known = signature(method).parameters.keys()
    names = known - (ALLOWED - arrays.keys()) - fixed.keys()
    assert names <= arrays.keys() | pairs.keys()
    odd = group.rank == group.size - 1
    found = {}
    for name in sorted(names):
        given = {**arrays, **fixed, **{other: x for other, x in WITH.get(name, {}).items() if other in known}}
        given[name] = arrays[name].astype(np.float64 if odd else np.float32) if name in arrays else pairs[name][odd]
        found[name] = error_of_all(group, lambda given=given: method(**given))  # type: ignore[misc]
    return found


def check_attention(group: Group) -> dict[str, str]:
    rows = group.rows(LENGTH)
    q, k, v = own(group, rows, *operands(LENGTH))
    pairs = {**OPTIONS, "by": ("keys", "heads")}
    found = sweep(group, group.attention, {"q": q, "k": k, "v": v}, {"rows": rows}, pairs)
    odd = group.rank == group.size - 1
    given = [x.swapaxes(1, 2) if odd else x for x in (q, k, v)]
    layout = "bshd" if odd else "bhsd"
    return {**found, "layout": error_of_all(group, lambda: group.attention(*given, rows=rows, layout=layout))}


def check_backward(group: Group) -> dict[str, str]:
    rows = group.rows(LENGTH)
    q, k, v = own(group, rows, *operands(LENGTH))
    arrays = {"q": q, "k": k, "v": v, "grad_out": q, "out": q, "lse": q[..., 0]}
    pairs = {**OPTIONS, "wrt": (("q",), ("k",)), "grad_lse": (q[..., 0], None)}
    return sweep(group, group.attention_backward, arrays, {"rows": rows}, pairs)


def check_caches(group: Group) -> dict[str, str]:
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 2, 4, 1, 16), dtype=np.float32)
    arrays = {"q": q, "k": k[:, :2], "v": v[:, :2]}
    fixed = {"cache": SpreadCache(sa.KVCache(2, 2, 16, 20)), "return_lse": True}
    pairs = {
        **OPTIONS,
        "bias": (np.zeros(1), np.ones(1)),
        "mask": ([[True]], [[False]]),
        "positions": ([3], [4]),
        "rope": (True, sa.RoPE(base=500.0)),
    }
    found = sweep(group, group.attention_with_kvcache, arrays, fixed, pairs)
    odd = group.rank == group.size - 1
    for name, array in arrays.items():
        given = {**arrays, **fixed, name: array + odd}
        found[f"values of {name}"] = error_of_all(group, lambda given=given: group.attention_with_kvcache(**given))
    return found


def layer_of(group: Group, **settings: Any) -> SplitSelfAttention:
    return SplitSelfAttention(group, *np.ones((4, 16, 16), np.float32), num_heads=4, **settings)


# What most ranks pass to a layer, and what the last one does.
OF_LAYER: dict[str, tuple[Any, Any]] = {
    **OPTIONS,
    "context": (np.zeros((2, LENGTH, 16)), np.ones((2, LENGTH, 16))),
    "positions": (np.arange(LENGTH), np.arange(LENGTH) + 1),
    "q_offset": (0, 1),
    "residual": (np.zeros((2, LENGTH, 16)), np.ones((2, LENGTH, 16))),
    "wrt": (("x",), ("w_q",)),
}
X = np.ones((2, LENGTH, 16), np.float32)


def check_layer(group: Group) -> dict[str, str]:
    layer, odd = layer_of(group), group.rank == group.size - 1
    found = sweep(group, layer.__call__, {"x": X}, {}, OF_LAYER)
    count = layer.kv_heads.stop - layer.kv_heads.start
    caches = [sa.KVCache(2, count, 4, 99), sa.KVCache(2, count, 4, 99), sa.KVCache(2, count, 4, 99, window=5)]
    caches[1].append(*np.ones((2, 2, count, 1, 4), np.float32))
    for i, other in enumerate((None, *caches[1:])):
        cache = other if odd else caches[0]
        found[f"values of cache {i}"] = error_of_all(group, lambda cache=cache: layer(X, cache=cache))
    for i, rope in enumerate((True, sa.RoPE(base=500.0))):
        settings = {"rope": rope if odd else sa.RoPE()}
        found[f"values of rope {i}"] = error_of_all(group, lambda settings=settings: layer_of(group, **settings))
    for name in ("b_q", "b_k", "b_v", "b_o"):
        settings = {name: np.full(16, 1.0 + odd, np.float32)}
        found[f"values of {name}"] = error_of_all(group, lambda settings=settings: layer_of(group, **settings))
    for name, count in (("norm", 16), ("post_norm", 16), ("q_norm", 4), ("k_norm", 4)):
        settings = {name: sa.RMSNorm(np.full(count, 1.0 + odd))}
        found[f"values of {name}"] = error_of_all(group, lambda settings=settings: layer_of(group, **settings))
    return {**found, "values of x": error_of_all(group, lambda: layer(X + odd))}


def check_layer_gradients(group: Group) -> dict[str, str]:
    layer, odd = layer_of(group), group.rank == group.size - 1
    found = sweep(group, layer.vjp, {"x": X}, {}, OF_LAYER)
    return {**found, "values of grad_y": error_of_all(group, lambda: layer.vjp(X)[1](X + odd))}
