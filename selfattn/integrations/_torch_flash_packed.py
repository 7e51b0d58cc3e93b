"""flash-attn 2's functions for CPU tensors whose queries, keys and values, or keys and values, are one tensor."""

from __future__ import annotations

from typing import Any

import torch

from ..compat._checks import own_names
from ._tensors import check_memory
from ._torch_flash import Window, flash_attn_func, flash_attn_varlen_func


@own_names("flash_attn_qkvpacked_func", q="qkv", k="qkv", v="qkv")
def flash_attn_qkvpacked_func(
    qkv: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Compute ``flash_attn.flash_attn_qkvpacked_func`` of a CPU tensor, without copies; differentiable.

    Parameters
    ----------
    qkv : Tensor, shape (B, S, 3, H, D)
        Queries, keys and values, in this order.
    dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
        As in `flash_attn_func`.

    Returns
    -------
    out : Tensor, shape (B, S, H, D)
        With `return_attn_probs` a tuple, as from `flash_attn_func`.

    Raises
    ------
    TypeError, ValueError
        As from `flash_attn_func`, with this function's names of the arguments.

    Examples
    --------
    >>> import torch
    >>> from selfattn.integrations.torch import flash_attn_qkvpacked_func
    >>> qkv = torch.randn(2, 10, 3, 4, 8)
    >>> flash_attn_qkvpacked_func(qkv, causal=True).shape
    torch.Size([2, 10, 4, 8])
    """
    q, k, v = _parts("flash_attn_qkvpacked_func", "qkv", qkv, 5, 3)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


@own_names("flash_attn_kvpacked_func", k="kv", v="kv")
def flash_attn_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Compute ``flash_attn.flash_attn_kvpacked_func`` of CPU tensors, without copies; differentiable.

    Parameters
    ----------
    q : Tensor, shape (B, Sq, H, D)
    kv : Tensor, shape (B, Sk, 2, Hkv, D)
        Keys and values, in this order.
    dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
        As in `flash_attn_func`.

    Returns
    -------
    out : Tensor, shape (B, Sq, H, D)
        With `return_attn_probs` a tuple, as from `flash_attn_func`.

    Raises
    ------
    TypeError, ValueError
        As from `flash_attn_func`, with this function's names of the arguments.

    Examples
    --------
    >>> import torch
    >>> from selfattn.integrations.torch import flash_attn_kvpacked_func
    >>> q, kv = torch.randn(2, 10, 4, 8), torch.randn(2, 12, 2, 1, 8)
    >>> flash_attn_kvpacked_func(q, kv, causal=True).shape
    torch.Size([2, 10, 4, 8])
    """
    k, v = _parts("flash_attn_kvpacked_func", "kv", kv, 5, 2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


@own_names(
    "flash_attn_varlen_qkvpacked_func", q="qkv", k="qkv", v="qkv", cu_seqlens_q="cu_seqlens", cu_seqlens_k="cu_seqlens",
    max_seqlen_q="max_seqlen", max_seqlen_k="max_seqlen",
)  # fmt: skip
def flash_attn_varlen_qkvpacked_func(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Compute ``flash_attn.flash_attn_varlen_qkvpacked_func`` of a CPU tensor, without copies; differentiable.

    Parameters
    ----------
    qkv : Tensor, shape (total, 3, H, D)
        Queries, keys and values of N sequences, one after another.
    cu_seqlens : Tensor of integers, shape (N + 1,)
        Start of each sequence, followed by the total.
    max_seqlen : int
        Maximum length; no sequence may be longer.
    dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
        As in `flash_attn_varlen_func`.

    Returns
    -------
    out : Tensor, shape (total, H, D)
        With `return_attn_probs` a tuple, as from `flash_attn_varlen_func`.

    Raises
    ------
    TypeError, ValueError
        As from `flash_attn_varlen_func`, with this function's names of the arguments.

    Examples
    --------
    >>> import torch
    >>> from selfattn.integrations.torch import flash_attn_varlen_qkvpacked_func
    >>> qkv, bounds = torch.randn(10, 3, 4, 8), torch.tensor([0, 3, 10])
    >>> flash_attn_varlen_qkvpacked_func(qkv, bounds, 7, causal=True).shape
    torch.Size([10, 4, 8])
    """
    q, k, v = _parts("flash_attn_varlen_qkvpacked_func", "qkv", qkv, 4, 3)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


@own_names("flash_attn_varlen_kvpacked_func", k="kv", v="kv")
def flash_attn_varlen_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Compute ``flash_attn.flash_attn_varlen_kvpacked_func`` of CPU tensors, without copies; differentiable.

    Parameters
    ----------
    q : Tensor, shape (total_q, H, D)
    kv : Tensor, shape (total_k, 2, Hkv, D)
        Keys and values of N sequences, one after another.
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        As in `flash_attn_varlen_func`.
    dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
        As in `flash_attn_varlen_func`.

    Returns
    -------
    out : Tensor, shape (total_q, H, D)
        With `return_attn_probs` a tuple, as from `flash_attn_varlen_func`.

    Raises
    ------
    TypeError, ValueError
        As from `flash_attn_varlen_func`, with this function's names of the arguments.

    Examples
    --------
    >>> import torch
    >>> from selfattn.integrations.torch import flash_attn_varlen_kvpacked_func
    >>> q, kv = torch.randn(5, 4, 8), torch.randn(10, 2, 1, 8)
    >>> bounds = torch.tensor([0, 2, 5]), torch.tensor([0, 3, 10])
    >>> flash_attn_varlen_kvpacked_func(q, kv, *bounds, 3, 7, causal=True).shape
    torch.Size([5, 4, 8])
    """
    k, v = _parts("flash_attn_varlen_kvpacked_func", "kv", kv, 4, 2)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def _parts(function: str, name: str, packed: Any, ndim: int, count: int) -> Any:
    """Return views of the parts of a packed tensor, which follow one another along the third axis from the end."""
    check_memory(function, name, packed)
    if packed.ndim != ndim or packed.shape[-3] != count:
        needed = "(B, S, " if ndim == 5 else "(total, "
        raise ValueError(
            f"{function}: {name} has shape {tuple(packed.shape)}, but {needed}{count}, heads, head_dim) is needed"
        )
    return packed.unbind(-3)
