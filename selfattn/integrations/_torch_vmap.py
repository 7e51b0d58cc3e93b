"""Attention under torch.vmap: one call with a further batch dimension if possible, otherwise one call per entry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ._torch_call import DIFFERENTIABLE, Call, backward_shapes, forward_shapes

_BEFORE_CALL = 6  # number of the backward operator's arguments before the call's
_SHAPED = {"q", "k", "v", "bias", "mask"}  # the fields with the axes of scores or operands
_Results = tuple[Any, Any]  # results of a rule: tensors, and their dimensions


def map_forward(operator: Callable[..., Any], info: Any, dims: Sequence[Any], *arguments: Any) -> _Results:
    """Return the results of the forward operator and where their new dimension is."""
    call, where = Call(*arguments), Call(*dims)
    if not _can_fold(call, where):
        compute = operator if info.batch_size else forward_shapes
        return _one_by_one(compute, info.batch_size, dims, arguments)
    results = operator(*_fold(call, where, info.batch_size))
    return results, tuple(0 if x.ndim > 1 else None for x in results)


def map_backward(operator: Callable[..., Any], info: Any, dims: Sequence[Any], *arguments: Any) -> _Results:
    """Return the results of the backward operator and where their new dimension is."""
    call, where = Call(*arguments[_BEFORE_CALL:]), Call(*dims[_BEFORE_CALL:])
    *upstream, wanted = arguments[:_BEFORE_CALL]
    per_call = any(want and name not in _SHAPED for want, name in zip(wanted, DIFFERENTIABLE, strict=True))
    if per_call or not _can_fold(call, where):
        compute = operator if info.batch_size else backward_shapes
        return _one_by_one(compute, info.batch_size, dims, arguments)
    moved = [None if x is None else _first(x, dim, info.batch_size) for x, dim in zip(upstream, dims, strict=False)]
    results = operator(*moved, wanted, *_fold(call, where, info.batch_size))
    shaped = (
        x.reshape(info.batch_size, *_first(like, dim, info.batch_size).shape[1:]) if want else x
        for x, want, like, dim in zip(results, wanted, call, where, strict=False)
    )
    return tuple(shaped), tuple(0 if want else None for want in wanted)


def _can_fold(call: Call, dims: Call) -> bool:
    ranks = {_rank(x, dim) for x, dim in zip(call[:3], dims, strict=False)}
    others = [(x, dim) for name, x, dim in zip(Call._fields, call.tensors(), dims, strict=False) if name not in _SHAPED]
    if call.packed or call.dropout or any(dim is not None for _, dim in others):
        return False
    if ranks == {2}:  # the new dimension becomes the head axis: options with numbers per head would not fit
        return call.sinks is None and call.alibi_slopes is None and call.t5 is None
    return len(ranks) == 1 or call.layout == "bhsd"


def _fold(call: Call, dims: Call, size: int) -> Call:
    """Return the call for all entries at once."""
    rank = max(_rank(x, dim) for x, dim in zip(call[:3], dims, strict=False))
    fields = {}
    for name, x, dim in zip(Call._fields, call.tensors(), dims, strict=False):
        if x is not None and name in _SHAPED:
            missing = (None,) * (rank - _rank(x, dim))
            place: tuple[Any, ...] = (slice(None), *missing)
            fields[name] = _first(x, dim, size)[place]
    return call._replace(**fields, layout="bhsd" if rank == 2 else call.layout)


def _rank(x: Any, dim: int | None) -> int:
    rank: int = x.ndim
    return rank if dim is None else rank - 1


def _first(x: Any, dim: int | None, size: int) -> Any:
    """Return the tensor with the new dimension first."""
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def _one_by_one(operator: Callable[..., Any], size: int, dims: Sequence[Any], arguments: Sequence[Any]) -> _Results:
    def entry(x: Any, dim: Any, i: int) -> Any:
        if not isinstance(dim, int):
            return x
        return x.select(dim, i) if size else x.new_empty(x.movedim(dim, 0).shape[1:])

    entries = [
        operator(*(entry(x, dim, i) for x, dim in zip(arguments, dims, strict=True)))
        for i in range(size or 1)  # without entries, one that has their shape
    ]
    results = tuple(torch.stack(parts)[:size] for parts in zip(*entries, strict=True))
    return results, (0,) * len(results)
