"""Attention where the heads travel: each rank gets all rows of some heads (DeepSpeed-Ulysses, Jacobs et al., 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _core
from .._arguments import core_options
from .._errors import refusal
from ._call import Call
from ._link import Link
from ._options import heads_of
from ._travel import bytes_for, views_of


def check_by_heads(call: Call, size: int) -> None:
    """Check what is needed besides; equal on all ranks."""
    heads = call.k.shape[-3] if call.k.ndim > 2 else 1
    if heads < size:
        text = f" is 'heads', which needs a KV head for each of {size} ranks, but there are {heads}: use by='keys'"
        raise refusal(ValueError, call.function, "by", text)


def attend_by_heads(link: Link, call: Call, num_threads: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return out and lse of this rank's rows."""
    q, k, v = (x[None] if x.ndim == 2 else x for x in (call.q, call.k, call.v))
    group = q.shape[-3] // k.shape[-3]
    kv = split(k.shape[-3], link.size)
    heads = [slice(x.start * group, x.stop * group) for x in kv]
    travelling = {name: call.options.given[name] for name in ("mask", "bias") if call.options.has_rows(name)}
    parts = [
        (q[..., h, :, :], k[..., g, :, :], v[..., g, :, :], *(heads_of(name, x, h) for name, x in travelling.items()))
        for h, g in zip(heads, kv, strict=True)
    ]
    whole = _to_heads(link, call, parts)
    given = {**call.options.of_heads(heads[link.rank]), **dict(zip(travelling, whole[3:], strict=True))}
    options = core_options(call.function, q_offset=0, return_lse=True, num_threads=num_threads, **given)
    options.first_head = heads[link.rank].start
    all_q, all_k, all_v = whole[:3]
    results = _core.attention_for(call.function, all_q, all_k, all_v, options)
    shape = (*np.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3]), q.shape[-3], call.rows, v.shape[-1])
    out, lse = np.empty(shape, q.dtype), np.empty((*shape[:-1], 1), results[1].dtype)
    _to_rows(link, call, (results[0], results[1][..., None]), (out, lse), heads)
    return out.reshape(call.out_shape), lse.reshape(call.out_shape[:-1])


def split(count: int, size: int) -> list[slice]:
    """Split a number of things over ranks as evenly as possible."""
    return [slice(rank * count // size, (rank + 1) * count // size) for rank in range(size)]


def _to_heads(link: Link, call: Call, parts: Sequence[Sequence[NDArray[Any]]]) -> list[NDArray[Any]]:
    """Send each rank its heads of this rank's rows; return all rows of this rank's heads."""
    outgoing = [np.zeros(bytes_for(arrays, call.rows), np.uint8) for arrays in parts]
    for buffer, arrays in zip(outgoing, parts, strict=True):
        for view, array in zip(views_of(buffer, arrays, call.rows), arrays, strict=True):
            view[...] = array
    mine, owners = parts[link.rank], call.owners
    incoming = [np.empty(bytes_for(mine, owners.count(rank)), np.uint8) for rank in range(link.size)]
    link.swap(call.function, outgoing, incoming)
    whole = [np.empty((*x.shape[:-2], owners.length, x.shape[-1]), x.dtype) for x in mine]
    for rank, buffer in enumerate(incoming):
        for array, view in zip(whole, views_of(buffer, mine, owners.count(rank)), strict=True):
            for run in owners.runs[rank]:
                array[..., run.start : run.stop, :] = view[..., run.rows, :]
    return whole


def _to_rows(
    link: Link, call: Call, results: Sequence[NDArray[Any]], into: Sequence[NDArray[Any]], heads: Sequence[slice]
) -> None:
    """Send each rank its rows of this rank's heads; fill `into` with all heads of this rank's rows."""
    owners = call.owners
    outgoing = []
    for rank, runs in enumerate(owners.runs):
        buffer = np.zeros(bytes_for(results, owners.count(rank)), np.uint8)
        for view, array in zip(views_of(buffer, results, owners.count(rank)), results, strict=True):
            for run in runs:
                view[..., run.rows, :] = array[..., run.start : run.stop, :]
        outgoing.append(buffer)
    targets = [[array[..., part, :, :] for array in into] for part in heads]
    incoming = [np.empty(bytes_for(arrays, call.rows), np.uint8) for arrays in targets]
    link.swap(call.function, outgoing, incoming)
    for buffer, arrays in zip(incoming, targets, strict=True):
        for array, view in zip(arrays, views_of(buffer, arrays, call.rows), strict=True):
            array[...] = view
