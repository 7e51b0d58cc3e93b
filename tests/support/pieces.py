"""Attention in pieces: cuts of the keys, and an AttentionState that absorbs the pieces between them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import selfattn as sa


def absorb_all(
    q: Any, k: Any, v: Any, cuts: Iterable[int] = (), *, whole_terms: bool = False, **options: Any
) -> sa.AttentionState:
    """Absorb the pieces between the cuts, in a state for all keys.

    Each piece gets its part of mask and bias, or with `whole_terms` the state gets them for all keys.
    """
    axis = -3 if options.get("layout") == "bshd" and k.ndim > 2 else -2
    terms = {} if whole_terms else {name: options.pop(name) for name in ("mask", "bias") if name in options}
    state = sa.AttentionState(q, kv_len=k.shape[axis], **options)
    for first, end in itertools.pairwise([0, *sorted(cuts), k.shape[axis]]):
        keys = (..., slice(first, end), *[slice(None)] * (-1 - axis))
        parts = {name: x[..., first:end] if x.ndim and x.shape[-1] != 1 else x for name, x in terms.items()}
        state.absorb(k[keys], v[keys], first=first, **parts)
    return state


def stream(*arguments: Any, **options: Any) -> tuple[Any, Any]:
    """Return the result of `absorb_all`."""
    return absorb_all(*arguments, **options).result()
