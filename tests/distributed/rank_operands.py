"""Operands of checks: every rank makes the whole arrays, and takes its own rows."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np

import selfattn as sa
from selfattn.distributed import Group


def operands(length: int, *, seed: int = 1, heads: int = 4, kv_heads: int = 2, dtype: Any = np.float32) -> Any:
    """Return q, k, v of a batch of two."""
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((2, heads, length, 16)).astype(dtype)
    k, v = rng.standard_normal((2, 2, kv_heads, length, 16)).astype(dtype)
    return q, k, v


def own(group: Group, rows: Any, *arrays: Any) -> list[Any]:
    """Return this rank's rows."""
    return [x[..., rows, :] for x in arrays]


def rows_of_options(options: dict[str, Any], rows: Any) -> dict[str, Any]:
    """Return the options of one rank: its rows of mask and bias."""
    found = dict(options)
    for name in ("mask", "bias"):
        if name in found and found[name].ndim > 1 and found[name].shape[-2] > 1:
            found[name] = found[name][..., rows, :]
    return found


def whole(group: Group, rows: Any, array: Any, axis: int = -2) -> Any:
    """Return the rows of all ranks in the order of their positions."""
    found = group._link.exchange("test", (rows, np.moveaxis(array, axis, 0)))
    positions = np.concatenate([r for r, _ in found])
    return np.moveaxis(np.concatenate([x for _, x in found])[np.argsort(positions)], 0, axis)


def sha(*arrays: Any) -> str:
    """Return a hash of the arrays' bytes."""
    return hashlib.sha256(b"".join(np.ascontiguousarray(x).tobytes() for x in arrays)).hexdigest()[:16]


def one_process(q: Any, k: Any, v: Any, **options: Any) -> Any:
    """Return out and lse of `attention`, aligned as in a Group: queries and keys are the same tokens."""
    if "kv_lens" in options:
        options.setdefault("q_lens", options["kv_lens"])
    return sa.attention(q, k, v, q_offset=0, return_lse=True, **options)


def state(q: Any, k: Any, v: Any, **options: Any) -> Any:
    """Return out and lse of an AttentionState."""
    if "kv_lens" in options:
        options.setdefault("q_lens", options["kv_lens"])
    found = sa.AttentionState(q, kv_len=k.shape[-2], q_offset=0, **options)
    found.absorb(k, v)
    return found.result()


def raised(call: Callable[[], Any]) -> str:
    """Return the type and the message of the error that a call raises."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def error_of_all(group: Group, call: Callable[[], Any]) -> str:
    """Return the error of a call, which must be the same on all ranks and leave the group usable."""
    found = set(group._link.exchange("test", raised(call)))
    assert len(found) == 1, found
    q, k, v = operands(group.size)
    rows = group.rows(group.size)
    group.attention(*own(group, rows, q, k, v), rows=rows)
    return found.pop()
