"""Relative attention and T5's bias as PyTorch programs compute them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F


def _shifted(x: Any) -> Any:
    """Shift each row of products with encodings, ordered from the largest distance, to align distances with keys."""
    *batch, rows, columns = x.shape
    padded = torch.cat([x.new_zeros((*batch, rows, 1)), x], dim=-1)
    return padded.view(*batch, columns + 1, rows)[..., 1:, :].view(*batch, rows, columns)


def heads_first(operands: Sequence[Any], hidden: Any, scale: float) -> Any:
    """Two einsums, the shift, softmax and a product, in the layout that is fastest for matrix products."""
    q, k, v, r, u, w = operands
    content = torch.einsum("bhid,bhjd->bhij", q + u[:, None], k)
    position = torch.einsum("bhid,hjd->bhij", q + w[:, None], r)
    scores = ((content + _shifted(position)) * scale).masked_fill(hidden, -math.inf)
    return torch.matmul(torch.softmax(scores, dim=-1), v)


def tokens_first(operands: Sequence[Any], hidden: Any, scale: float) -> Any:
    """The same in the layout of the paper's code: tokens, batch, heads, dim."""
    q, k, v, r, u, w = operands
    content = torch.einsum("ibnd,jbnd->ijbn", q + u, k)
    position = torch.einsum("ibnd,jnd->ijbn", q + w, r)
    padded = torch.cat([position.new_zeros((len(q), 1, *position.shape[2:])), position], dim=1)
    moved = padded.view(len(k) + 1, len(q), *position.shape[2:])[1:].view_as(position)
    scores = ((content + moved) * scale).masked_fill(hidden[:, :, None, None], -math.inf)
    return torch.einsum("ijbn,jbnd->ibnd", torch.softmax(scores, dim=1), v)


def materialised(table: Any, length: int) -> Any:
    """T5's bias of an encoder for every pair, (1, H, length, length): 32 buckets, 128 tokens."""
    ahead = torch.arange(length)[None] - torch.arange(length)[:, None]
    far = 8 + (torch.log(ahead.abs().clamp(min=8) / 8) / math.log(16) * 8).long()
    bucket = torch.where(ahead.abs() < 8, ahead.abs(), far.clamp(max=15)) + (ahead > 0).long() * 16
    return table[bucket].permute(2, 0, 1)[None]


def biased(qkv: Sequence[Any], bias: Any) -> Any:
    """PyTorch's fused attention with a bias for every pair, unscaled as in T5."""
    return F.scaled_dot_product_attention(*qkv, attn_mask=bias, scale=1.0)
