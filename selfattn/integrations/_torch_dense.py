"""Attention in operators of PyTorch, which stores all scores: for second derivatives only."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from .. import attention
from .._bias import _Buckets
from ._tensors import computed_in
from ._torch_call import Call


def dense_attention(call: Call) -> tuple[Any, Any, Any]:
    """Return out, log-sum-exp and weights, all in the type of computation."""
    dtype = computed_in(call.q.dtype)
    q, k, v = (_heads_first(call, x.to(dtype)) for x in call[:3])
    k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) if x.shape[-3] != q.shape[-3] else x for x in (k, v))
    scale = 1 / math.sqrt(q.shape[-1]) if call.scale is None else call.scale.to(dtype).reshape(())
    scores = q @ k.mT * scale
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    distance = _distance(call, *scores.shape[-2:])
    visible = _visible(call, distance)
    if call.bias is not None:
        bias = call.bias.to(dtype)
        visible = visible & (bias != -math.inf)
        scores = scores + bias.masked_fill(bias == -math.inf, 0)
    if call.alibi_slopes is not None:
        scores = scores - _slopes(call, dtype) * distance.abs()
    if call.t5 is not None:
        scores = scores + _by_distance(call, distance).to(dtype)
    scores = scores.masked_fill(~visible, -math.inf)
    weights, lse = _softmax(call, scores)
    if call.dropout:
        weights = weights * _factors(call, scores.shape).to(dtype)
    out = weights @ v
    if max(x.ndim for x in call[:3]) == 2:
        return out[0], lse[0], weights[0]
    return (out.transpose(-3, -2) if call.layout == "bshd" else out), lse, weights


def _heads_first(call: Call, x: Any) -> Any:
    if x.ndim == 2:
        return x[None]
    return x.transpose(-3, -2) if call.layout == "bshd" else x


def _per_head(numbers: Any, dtype: torch.dtype) -> Any:
    return numbers.to(dtype)[..., None, None]


def _slopes(call: Call, dtype: torch.dtype) -> Any:
    if not call.packed or call.alibi_slopes.ndim == 1:
        return _per_head(call.alibi_slopes, dtype)
    sequence, _ = _places(call.cu_seqlens_q, call.q)
    return call.alibi_slopes.to(dtype)[sequence].T[..., None]


def _places(bounds: Any, packed: Any) -> tuple[Any, Any]:
    """Return the sequence of each token, and its place in that sequence."""
    tokens = torch.arange(packed.shape[0])
    bounds = bounds.long()
    sequence = torch.bucketize(tokens, bounds[1:], right=True)
    return sequence, tokens - bounds[sequence]


def _factors(call: Call, shape: Any) -> Any:
    """Return the factors of dropout for each score."""
    if not call.packed:
        return _dropout_factors(shape, call.seed, call.dropout)
    (sequence, query), (_, key) = _places(call.cu_seqlens_q, call.q), _places(call.cu_seqlens_k, call.k)
    each = _dropout_factors((call.cu_seqlens_q.shape[0] - 1, *shape), call.seed, call.dropout)
    return each[sequence[:, None], :, query[:, None], key].movedim(-1, 0)


def _per_batch(numbers: Any) -> Any:
    """Return integers with axes for heads, queries and keys."""
    return numbers[..., None, None, None]


def _distance(call: Call, q_len: int, kv_len: int) -> Any:
    """Return each query's position minus each key's."""
    if call.packed:
        (sequence, query), (_, key) = _places(call.cu_seqlens_q, call.q), _places(call.cu_seqlens_k, call.k)
        last = (call.cu_seqlens_k.diff() - call.cu_seqlens_q.diff()).long()
        return (query + last[sequence])[:, None] - key
    offset = call.q_offset
    if offset is None:
        offset = torch.as_tensor(kv_len if call.kv_lens is None else call.kv_lens)
        offset = offset - (q_len if call.q_lens is None else call.q_lens)
    return torch.arange(q_len)[:, None] - torch.arange(kv_len) + _per_batch(offset)


def _visible(call: Call, distance: Any) -> Any:
    """Return which keys the queries see. Keys that a bias hides count as visible."""
    queries, keys = (torch.arange(n) for n in distance.shape[-2:])
    visible = torch.ones_like(distance, dtype=torch.bool)
    if call.packed:
        sequence, keys = _places(call.cu_seqlens_k, call.k)
        visible = _places(call.cu_seqlens_q, call.q)[0][:, None] == sequence
    if call.causal:
        visible = visible & (distance >= 0)
    if call.left >= 0:
        visible = visible & (distance <= call.left)
    if call.right >= 0:
        visible = visible & (-distance <= call.right)
    if call.prefix_lens is not None:
        visible = visible | (keys < _per_batch(call.prefix_lens))
    if call.chunk is not None:
        visible = visible & (keys // call.chunk == torch.div(keys + distance, call.chunk, rounding_mode="floor"))
    if call.kv_lens is not None:
        visible = visible & (keys < _per_batch(call.kv_lens))
    if call.kv_starts is not None:
        visible = visible & (keys >= _per_batch(call.kv_starts))
    if call.mask is not None:
        visible = visible & call.mask
    return visible & _valid(call, queries)[..., None]


def _valid(call: Call, queries: Any) -> Any:
    """Return which rows belong to queries, for each batch entry and head."""
    if call.q_lens is None:
        return torch.ones_like(queries, dtype=torch.bool)
    return queries < call.q_lens[..., None, None]


def _by_distance(call: Call, distance: Any) -> Any:
    """Return the bias of T5 for each head."""
    buckets = _Buckets.check("attention", np.empty(call.t5.shape), call.bidirectional, call.max_distance)
    row = (distance + buckets.origin).clamp(0, len(buckets.bucket) - 1)
    bucket = torch.from_numpy(buckets.bucket)[row]  # (..., 1, Sq, Sk)
    return call.t5[bucket.squeeze(-3)].movedim(-1, -3)


def _softmax(call: Call, scores: Any) -> tuple[Any, Any]:
    top = scores.amax(-1, keepdim=True) if scores.shape[-1] else scores.new_full((*scores.shape[:-1], 1), -math.inf)
    sinks = None
    if call.sinks is not None:
        valid = _valid(call, torch.arange(scores.shape[-2]))[..., None]
        sinks = _per_head(call.sinks, scores.dtype).expand_as(top).masked_fill(~valid, -math.inf)
        top = torch.maximum(top, sinks)
    top = top.detach().masked_fill(top == -math.inf, 0)
    numerators = (scores - top).exp()
    total = numerators.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + (sinks - top).exp()
    empty = total == 0
    total = total.masked_fill(empty, 1)
    lse = (total.log() + top).masked_fill(empty, -math.inf)
    return numerators / total, lse[..., 0]


def _compute_dropout_factors(shape: Any, seed: Any, rate: float) -> Any:
    """Return the factors of dropout in float64: 0 or 1 / (1 − rate). With q = k = 0, a weight is 0 only if dropped."""
    zeros = np.zeros((*shape[:-1], 1), dtype=np.float32), np.zeros((*shape[:-2], shape[-1], 1), dtype=np.float32)
    options: Any = {"dropout": rate, "seed": int(seed) % (1 << 64), "return_weights": True}
    _, weights = attention(zeros[0], zeros[1], zeros[1], **options)
    return torch.from_numpy(weights > 0).double() / (1 - rate)


# An operator of its own, since compilers cannot look at the value of the seed.
_dropout_factors = torch.library.custom_op(
    "selfattn::dropout_factors",
    _compute_dropout_factors,
    mutates_args=(),
    device_types="cpu",
    schema="(SymInt[] shape, Tensor seed, float rate) -> Tensor",
)
_dropout_factors.register_fake(lambda shape, seed, rate: torch.empty(tuple(shape), dtype=torch.float64))
