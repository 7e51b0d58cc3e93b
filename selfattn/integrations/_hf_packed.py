"""Sequences that transformers packs into one batch entry, without padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import selfattn

from ._dropout import dropout_options
from ._hf_mask import VisibleKeys
from ._hf_sparse import as_array
from ._tensors import empty_pair, to_array, wants_gradient

Bounds = tuple[NDArray[np.int64], NDArray[np.int64]]
_PADDING = ("kv_starts", "kv_lens", "mask")


def packed_bounds(
    cu_q: torch.Tensor | None,
    cu_k: torch.Tensor | None,
    operands: tuple[torch.Tensor, torch.Tensor],
    mask: torch.Tensor | None,
    options: dict[str, Any],
) -> Bounds | None:
    """Return where sequences start and end among queries and keys, or None if there is only one.

    A dense mask is applied as well: it may separate the sequences, or hide nothing. A described mask must hide nothing.
    """
    dense = mask is not None and not (type(mask) is VisibleKeys and mask.made is None)
    cu_q, cu_k = (cu_k if cu_q is None else cu_q), (cu_q if cu_k is None else cu_k)
    bounds = _checked("cu_seq_lens_q", cu_q, operands[0].shape), _checked("cu_seq_lens_k", cu_k, operands[1].shape)
    if len(bounds[0]) != len(bounds[1]):
        raise ValueError(
            f"selfattn: cu_seq_lens_q packs {len(bounds[0]) - 1} sequences, but cu_seq_lens_k {len(bounds[1]) - 1}"
        )
    if len(bounds[0]) == 2:
        return None
    for name in _PADDING:
        if name in options and not (dense and name == "mask"):
            raise ValueError("selfattn: cu_seq_lens_q packs sequences, but attention_mask or indices hide some keys")
    return bounds


def _checked(name: str, bounds: torch.Tensor, shape: torch.Size) -> NDArray[np.int64]:
    array = as_array(name, bounds)
    if array.dtype.kind != "i" or array.ndim != 1:
        raise TypeError(f"selfattn: {name} has shape {array.shape} and dtype {bounds.dtype}, but integers are needed")
    if shape[0] != 1:
        raise ValueError(f"selfattn: {name} is given for {shape[0]} batch entries, but packed sequences are in one")
    if len(array) < 2 or array[0] != 0 or array[-1] != shape[2] or (np.diff(array) < 0).any():
        raise ValueError(f"selfattn: {name} is {array.tolist()}, but it must ascend from 0 to {shape[2]}")
    return array.astype(np.int64, copy=False)


def attend_packed(
    attend: Callable[..., tuple[torch.Tensor, Any]],
    operands: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    options: dict[str, Any],
    extras: tuple[torch.Tensor | None, float],
    bounds: Bounds,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return what `attend` returns for one batch entry; extras: sinks per query, and the rate of dropout."""
    sinks, dropout = extras
    together = {"causal", "window", "chunk", "scale", "softcap", "num_threads", "sinks"}
    if options.keys() <= together and not dropout and not wants_gradient(*operands, options.get("sinks")):
        return _attend_together(operands, options, bounds), None
    # One call per sequence, so that its gradients and its dropout are computed as for the sequence alone.
    q, k, v = operands
    parts = []
    places = [list(zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)) for cu in bounds]
    for (first, last), (start, end) in zip(*places, strict=True):
        of_part = options | dropout_options("selfattn", "dropout", dropout)
        for name in ("bias", "mask"):
            if name in options:
                of_part[name] = _part(_part(options[name], -2, first, last), -1, start, end)
        own_sinks = None if sinks is None else sinks[:, :, first:last]
        sequence = q[:, :, first:last], k[:, :, start:end], v[:, :, start:end]
        parts.append(attend(sequence, of_part, own_sinks, end - start))
    result = torch.cat([part for part, _ in parts], dim=1)
    if "return_weights" not in options:
        return result, None
    weights = result.new_zeros((1, q.shape[1], q.shape[2], k.shape[2]))
    for (first, last), (start, end), (_, of_part) in zip(*places, parts, strict=True):
        weights[:, :, first:last, start:end] = of_part
    return result, weights


def _attend_together(
    operands: tuple[torch.Tensor, torch.Tensor, torch.Tensor], options: dict[str, Any], bounds: Bounds
) -> torch.Tensor:
    q, k, v = (to_array(x)[0].swapaxes(0, 1) for x in operands)
    if "sinks" in options:
        options["sinks"] = to_array(options["sinks"])
    result, out = empty_pair((1, *q.shape[:2], v.shape[2]), operands[0].dtype)
    selfattn.attention_varlen(q, k, v, *bounds, out=out[0], **options)
    return result


def _part(terms: Any, axis: int, first: int, last: int) -> Any:
    """Return a slice of a tensor or an array, unless the axis is one that broadcasts."""
    if terms.ndim < -axis or terms.shape[axis] == 1:
        return terms
    return terms[..., first:last, :] if axis == -2 else terms[..., first:last]
