"""Packed sequences: the operands of `attention_varlen` and of its gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import _core
from ._arguments import as_array, integers, reals
from ._errors import refusal

# Options that differ from sequence to sequence.
OWN = ("mask", "bias", "q_offset", "alibi_slopes", "kv_starts", "prefix_lens")


class Packed(NamedTuple):
    """Sequences in arrays (total, heads, size), and the first row of each sequence, followed by the total."""

    q: NDArray[Any]
    k: NDArray[Any]
    v: NDArray[Any]
    queries: NDArray[np.int64]
    keys: NDArray[np.int64]
    lists: bool  # the caller passed lists of arrays, and gets such lists

    @classmethod
    def check(cls, function: str, operands: tuple[Any, Any, Any], cu_seqlens_q: Any, cu_seqlens_k: Any) -> Packed:
        """Convert q, k and v: three packed arrays, or three lists of arrays without cu_seqlens."""
        q, k, v = operands
        lists = [isinstance(x, (list, tuple)) for x in operands]
        if any(lists):
            if not all(lists):
                raise refusal(
                    TypeError,
                    function,
                    "q, k and v",
                    " are of different kinds, but must be three arrays or three lists",
                )
            if cu_seqlens_q is not None or cu_seqlens_k is not None:
                raise refusal(ValueError, function, "cu_seqlens", " is given, but lists of arrays have their lengths")
            q, cu_seqlens_q = joined(function, "q", q)
            k, cu_seqlens_k = joined(function, "k", k)
            v, cu_v = joined(function, "v", v)
            if not np.array_equal(cu_v, cu_seqlens_k):
                raise refusal(
                    ValueError,
                    function,
                    "v",
                    f" has lengths {np.diff(cu_v)} but ",
                    "k",
                    f" has {np.diff(cu_seqlens_k)}",
                )
        else:
            q, k, v = as_array(function, "q", q), as_array(function, "k", k), as_array(function, "v", v)
        if cu_seqlens_q is None:
            raise refusal(TypeError, function, "cu_seqlens_q", " is missing")
        queries = _starts(function, "cu_seqlens_q", cu_seqlens_q, "q", q)
        keys = _starts(function, "cu_seqlens_k", queries if cu_seqlens_k is None else cu_seqlens_k, "k", k)
        if len(keys) != len(queries):
            text = f" has {len(keys)} entries but "
            raise refusal(ValueError, function, "cu_seqlens_k", text, "cu_seqlens_q", f" has {len(queries)}")
        if v.ndim and k.ndim and len(v) != len(k):
            raise refusal(ValueError, function, "v", f" has {len(v)} rows but ", "k", f" has {len(k)}")
        return cls(q, k, v, queries, keys, all(lists))

    @property
    def number(self) -> int:
        """The number of sequences."""
        return len(self.queries) - 1

    def split(self, array: NDArray[Any], starts: NDArray[np.int64], axis: int = 0) -> Any:
        """Return a packed array in the form in which the caller passed the operands: packed, or as a list of arrays."""
        return np.split(array, starts[1:-1], axis) if self.lists else array

    def inputs(self, function: str, **own: Any) -> _core.VarlenInputs:
        """Return what the core takes: the operands, and the options that differ from sequence to sequence (`OWN`)."""
        inputs = _core.VarlenInputs(q=self.q, k=self.k, v=self.v, cu_seqlens_q=self.queries, cu_seqlens_k=self.keys)
        for name in ("mask", "bias"):
            setattr(inputs, name, _each(function, name, own.get(name), self.number))
        for name in ("q_offset", "kv_starts", "prefix_lens"):
            if own.get(name) is not None:
                numbers = integers(function, name, own[name])
                setattr(inputs, name, _per_sequence(function, name, numbers, (self.number,)))
        if own.get("alibi_slopes") is not None:
            heads = self.q.shape[1] if self.q.ndim > 1 else 1
            slopes = reals(function, "alibi_slopes", own["alibi_slopes"])
            inputs.alibi_slopes = _per_sequence(function, "alibi_slopes", slopes, (self.number, heads))
        return inputs


def joined(function: str, name: str, arrays: Any) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Pack a list of arrays (tokens, heads, size), and return the first row of each, followed by the total."""
    # Copies the inputs once, which is cheap compared with attention itself.
    parts = [as_array(function, f"{name}[{i}]", x) for i, x in enumerate(arrays)]
    if not parts:
        raise refusal(ValueError, function, name, " is an empty list, but at least one sequence is needed")
    for i, part in enumerate(parts):
        if part.ndim != 3 or part.shape[1:] != parts[0].shape[1:]:
            text = f"[{i}] has shape {part.shape}, but (tokens, heads, size) is needed, the last two as in "
            raise refusal(ValueError, function, name, text, name, f"[0]: {parts[0].shape}")
        if part.dtype != parts[0].dtype:
            text = f"[{i}] has dtype {part.dtype} but "
            raise refusal(TypeError, function, name, text, name, f"[0] has {parts[0].dtype}")
    lengths = [len(part) for part in parts]
    return np.concatenate(parts), np.cumsum([0, *lengths], dtype=np.int64)


def _starts(function: str, name: str, value: Any, of: str, packed: NDArray[Any]) -> NDArray[np.int64]:
    starts = np.array(integers(function, name, value), order="C")  # a copy, so that it cannot change after the checks
    if starts.ndim != 1 or len(starts) == 0:
        raise refusal(ValueError, function, name, f" has shape {starts.shape}, but (N + 1,) is needed")
    total = len(packed) if packed.ndim else 0
    if starts[0] != 0 or starts[-1] != total:
        text = f" goes from {starts[0]} to {starts[-1]}, but "
        raise refusal(ValueError, function, name, text, of, f" has the rows 0 to {total}")
    for i in np.flatnonzero(starts[1:] < starts[:-1])[:1]:
        raise refusal(ValueError, function, name, f" falls from {starts[i]} to {starts[i + 1]} (sequence {i})")
    return starts


def _each(function: str, name: str, value: Any, count: int) -> list[NDArray[Any] | None] | None:
    if value is None:
        return None
    if not isinstance(value, (list, tuple)):
        text = f" is a {type(value).__name__}, but a list of one array or None per sequence is needed"
        raise refusal(TypeError, function, name, text)
    if len(value) != count:
        raise refusal(ValueError, function, name, f" has {len(value)} entries, but there are {count} sequences")
    return [None if x is None else as_array(function, f"{name}[{i}]", x) for i, x in enumerate(value)]


def _per_sequence(function: str, name: str, array: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    try:
        return np.broadcast_to(array, shape)
    except ValueError:
        text = f" has shape {array.shape}, which does not broadcast to {shape}"
        raise refusal(ValueError, function, name, text) from None
