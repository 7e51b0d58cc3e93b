"""Padding removed from batches and put back, as in ``flash_attn.bert_padding``; differentiable."""

from __future__ import annotations

import torch

from .._arguments import whole_number
from ._tensors import check_integers, check_memory, is_plain


def unpad_input(
    hidden_states: torch.Tensor, attention_mask: torch.Tensor, unused_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, torch.Tensor]:
    """Pack the real tokens of a padded batch, as ``flash_attn.bert_padding.unpad_input``.

    Parameters
    ----------
    hidden_states : Tensor, shape (B, S, ...)
    attention_mask : Tensor of bool or integers, shape (B, S)
        Not 0 for real tokens, which may be anywhere: padding on the left, on the right, or between them.
    unused_mask : Tensor of bool or integers, shape (B, S), optional
        Not 0 for further tokens that are kept although they are not real.

    Returns
    -------
    hidden_states : Tensor, shape (total, ...)
        The kept tokens.
    indices : Tensor of int64, shape (total,)
        Their places in the flattened (B · S) batch.
    cu_seqlens : Tensor of int32, shape (B + 1,)
        Start of each sequence among the kept tokens, followed by the total.
    max_seqlen_in_batch : int
    seqused : Tensor of int32, shape (B,)
        Number of real tokens of each sequence.

    Raises
    ------
    TypeError, ValueError
        An argument is no CPU tensor, or a mask has another shape than (B, S).

    Examples
    --------
    >>> import torch
    >>> from selfattn.integrations.torch import pad_input, unpad_input
    >>> x, mask = torch.randn(2, 4, 8), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    >>> packed, indices, cu_seqlens, max_seqlen, _ = unpad_input(x, mask)
    >>> packed.shape, cu_seqlens.tolist(), max_seqlen
    (torch.Size([6, 8]), [0, 2, 6], 4)
    >>> torch.equal(pad_input(packed, indices, 2, 4), x * mask[..., None])
    True
    """
    masks = {"attention_mask": attention_mask, **({} if unused_mask is None else {"unused_mask": unused_mask})}
    for name, tensor in {"hidden_states": hidden_states, **masks}.items():
        check_memory("unpad_input", name, tensor)
    for name, mask in masks.items():
        if mask.ndim != 2 or mask.shape != hidden_states.shape[:2]:
            raise ValueError(
                f"unpad_input: {name} has shape {tuple(mask.shape)}, but {tuple(hidden_states.shape[:2])} is needed: "
                "the first two dimensions of hidden_states"
            )
    real = attention_mask != 0
    kept = real if unused_mask is None else real | (unused_mask != 0)
    lengths = kept.sum(-1, dtype=torch.int32)
    indices = kept.flatten().nonzero().flatten()
    bounds = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max()) if lengths.numel() else 0
    packed = hidden_states.flatten(0, 1).index_select(0, indices)
    return packed, indices, bounds, longest, real.sum(-1, dtype=torch.int32)


def pad_input(hidden_states: torch.Tensor, indices: torch.Tensor, batch: int, seqlen: int) -> torch.Tensor:
    """Put packed tokens back to their places in a batch, as ``flash_attn.bert_padding.pad_input``.

    Parameters
    ----------
    hidden_states : Tensor, shape (total, ...)
    indices : Tensor of integers, shape (total,)
        From `unpad_input`.
    batch, seqlen : int
        B and S.

    Returns
    -------
    Tensor, shape (B, S, ...)
        0 in all other places.

    Raises
    ------
    TypeError, ValueError
        An argument is no CPU tensor or no integer, or `indices` has another length than hidden_states or a number
        outside 0..B · S − 1.

    Examples
    --------
    >>> import torch
    >>> from selfattn.integrations.torch import pad_input
    >>> pad_input(torch.ones(3, 1), torch.tensor([0, 1, 3]), 2, 2).flatten().tolist()
    [1.0, 1.0, 0.0, 1.0]
    """
    check_memory("pad_input", "hidden_states", hidden_states)
    check_integers("pad_input", "indices", indices)
    if not torch.compiler.is_compiling():  # a compiler's integers have a type of their own
        batch, seqlen = whole_number("pad_input", "batch", batch, 0), whole_number("pad_input", "seqlen", seqlen, 0)
    if indices.ndim != 1 or hidden_states.shape[:1] != indices.shape:
        raise ValueError(
            f"pad_input: indices has shape {tuple(indices.shape)}, but {tuple(hidden_states.shape[:1])} is needed: the "
            "first dimension of hidden_states"
        )
    if is_plain(indices) and indices.numel():  # compilers cannot look at numbers
        first, last = int(indices.min()), int(indices.max())
        if first < 0 or last >= batch * seqlen:
            wrong = first if first < 0 else last
            raise ValueError(f"pad_input: indices holds {wrong}, which is outside 0..{batch * seqlen - 1}")
    flat = hidden_states.new_zeros((batch * seqlen, *hidden_states.shape[1:]))
    return flat.index_copy(0, indices.long(), hidden_states).unflatten(0, (batch, seqlen))
