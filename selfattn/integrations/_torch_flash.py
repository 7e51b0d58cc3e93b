"""flash-attn 2's attention functions for CPU tensors, with gradients."""

from __future__ import annotations

from typing import Any

import torch

from .. import compat
from .._arguments import flag
from ..compat._checks import equal_dtypes, own_names
from ..compat._flash_attn import flash_options
from ..compat._flash_varlen import starts
from . import _torch_autograd
from ._dropout import dropout_options
from ._tensors import (
    ACCEPTED,
    as_operand,
    check_memory,
    computed_in,
    is_plain,
    no_tangents,
    opaque,
    to_array,
    to_tensor,
    wants_gradient,
)
from ._torch_call import Call, forward, make_call, run

Window = tuple[int, int]


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Compute ``flash_attn.flash_attn_func`` of CPU tensors, without copying them. Differentiable, also twice.

    Parameters
    ----------
    q : Tensor, shape (B, Sq, H, D)
    k : Tensor, shape (B, Sk, Hkv, D)
    v : Tensor, shape (B, Sk, Hkv, Dv)
        All in one dtype: float32, bfloat16, float16 or float64; any strides. Hkv divides H.
    dropout_p : float, default 0.0
        The rate at which weights are dropped, below 1. The seed comes from PyTorch's generator.
    softmax_scale : float, optional
        Default ``1 / sqrt(D)``.
    causal : bool, default False
        The last query is aligned with the last key. A query that sees no key gives 0.
    window_size : (left, right)
        Number of keys that a query sees on each side of its own position; negative = unbounded.
    softcap : float
        0 = none.
    alibi_slopes : Tensor, shape (H,) or (B, H), optional
        Gets a gradient if it requires one.
    deterministic : bool
        Gradients are bit-identical in every run, with True and with False.
    return_attn_probs : bool
        Also return the log-sum-exps and the weights.

    Returns
    -------
    out : Tensor, shape (B, Sq, H, Dv)
    softmax_lse : Tensor, shape (B, H, Sq)
        Only with `return_attn_probs`; differentiable.
    S_dmask : Tensor, shape (B, H, Sq, Sk), or None
        Only with `return_attn_probs`. None without dropout; otherwise the weights before dropout, negative where a
        weight was dropped. It has no gradient.

    Raises
    ------
    TypeError, ValueError
        Tensors without CPU memory, other dtypes, shapes that do not fit together.
    NotImplementedError
        Tensors with tangents: there is no forward-mode differentiation.

    Notes
    -----
    The differences from the original that do not concern dropout or tensors are listed in
    `selfattn.compat.flash_attn_func`. Which weights are dropped differs from the original. As for
    `scaled_dot_product_attention`, calls work under `torch.compile` and `torch.func`; autocast does not apply.

    Examples
    --------
    >>> import torch
    >>> from selfattn.integrations.torch import flash_attn_func
    >>> q, k, v = torch.randn(3, 2, 10, 4, 8).bfloat16().requires_grad_()
    >>> flash_attn_func(q, k, v, causal=True, window_size=(4, 0)).sum().backward()
    """
    name = "flash_attn_func"
    options = _options(name, (q, k, v), 4, dropout_p, deterministic)
    options |= flash_options(name, softmax_scale, causal, window_size, softcap)
    extras = flag(name, "return_attn_probs", return_attn_probs)
    slopes = None if alibi_slopes is None else as_operand(name, "alibi_slopes", alibi_slopes)
    return _dense(make_call(q, k, v, **options, alibi_slopes=slopes, return_lse=extras), extras)


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
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
    block_table: torch.Tensor | None = None,
) -> Any:
    """Compute ``flash_attn.flash_attn_varlen_func`` of CPU tensors, without padding or copies; differentiable.

    Parameters
    ----------
    q : Tensor, shape (total_q, H, D)
    k : Tensor, shape (total_k, Hkv, D)
    v : Tensor, shape (total_k, Hkv, Dv)
        N sequences, one after another. With `block_table`, k and v are pages: (num_blocks, page_size, Hkv, ·).
    cu_seqlens_q, cu_seqlens_k : Tensor of integers, shape (N + 1,)
        Start of each sequence, followed by the total.
    max_seqlen_q, max_seqlen_k : int
        Maximum length; no sequence may be longer.
    dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
        As in `flash_attn_func`; ``alibi_slopes`` (H,) or (N, H).
    block_table : Tensor of integers, shape (N, pages), optional
        The pages of each sequence, in order. Pages have no gradients, dropout or `return_attn_probs`.

    Returns
    -------
    out : Tensor, shape (total_q, H, Dv)
        With `return_attn_probs` a tuple, as from `flash_attn_func`: softmax_lse is (H, total_q), and S_dmask
        (N, H, max_seqlen_q, max_seqlen_k).

    Raises
    ------
    TypeError, ValueError
        As from `flash_attn_func`. Also if the bounds do not ascend from 0 to the total, a sequence is longer than the
        maximum, or pages are given where gradients are wanted.

    Examples
    --------
    >>> import torch
    >>> from selfattn.integrations.torch import flash_attn_varlen_func
    >>> q, k, v = torch.randn(3, 10, 4, 8)
    >>> bounds = torch.tensor([0, 3, 10])
    >>> flash_attn_varlen_func(q, k, v, bounds, bounds, 7, 7, causal=True).shape
    torch.Size([10, 4, 8])
    """
    name = "flash_attn_varlen_func"
    options = _options(name, (q, k, v), 3 if block_table is None else None, dropout_p, deterministic)
    if block_table is not None:
        if wants_gradient(q, k, v):
            raise ValueError(f"{name}: block_table is given, but pages have no gradients: call it under torch.no_grad")
        no_tangents(name, alibi_slopes=alibi_slopes)
        values = to_array(q), to_array(k), to_array(v), cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        paged = compat.flash_attn_varlen_func(
            *values, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
            return_attn_probs, block_table,
        )  # fmt: skip
        return to_tensor(paged)
    options |= flash_options(name, softmax_scale, causal, window_size, softcap)
    bounds = as_operand(name, "cu_seqlens_q", cu_seqlens_q), as_operand(name, "cu_seqlens_k", cu_seqlens_k)
    if is_plain(*bounds):  # compilers cannot look at the bounds
        starts(name, "cu_seqlens_q", bounds[0], max_seqlen_q, "max_seqlen_q")
        starts(name, "cu_seqlens_k", bounds[1], max_seqlen_k, "max_seqlen_k")
    options["cu_seqlens_q"], options["cu_seqlens_k"] = bounds
    extras = flag(name, "return_attn_probs", return_attn_probs)
    slopes = None if alibi_slopes is None else as_operand(name, "alibi_slopes", alibi_slopes)
    call = make_call(q, k, v, **options, alibi_slopes=slopes, return_lse=extras)
    return _packed(call, extras, (max_seqlen_q, max_seqlen_k))


def check_operands(function: str, ndim: int | None, **tensors: Any) -> None:
    """Raise unless these are tensors in CPU memory, in one accepted dtype, with `ndim` dimensions."""
    for name, tensor in tensors.items():
        check_memory(function, name, tensor)
        if tensor.dtype not in ACCEPTED:
            raise TypeError(f"{function}: {name} has dtype {tensor.dtype}, but one of {ACCEPTED} is needed")
        if ndim is not None and tensor.ndim != ndim:
            raise ValueError(f"{function}: {name} has shape {tuple(tensor.shape)}, but {ndim} dimensions are needed")
    equal_dtypes(function, **tensors)
    no_tangents(function, **tensors)


def _options(
    function: str, operands: tuple[Any, Any, Any], ndim: int | None, rate: float, deterministic: bool
) -> dict[str, Any]:
    """Check the operands, and return the options for layout and dropout."""
    check_operands(function, ndim, q=operands[0], k=operands[1], v=operands[2])
    flag(function, "deterministic", deterministic)
    return {"layout": "bshd", **dropout_options(function, "dropout_p", rate)}


def _results(call: Call, extras: bool, longest: tuple[int, int] | None = None) -> Any:
    out, lse, _ = _torch_autograd.attend(call)
    if not extras:
        return out
    return out, lse.to(computed_in(call.q.dtype)), _signed_weights(call, longest) if call.dropout else None


_dense = own_names("flash_attn_func", window="window_size", scale="softmax_scale")(_results)
_packed = own_names("flash_attn_varlen_func", window="window_size", scale="softmax_scale")(_results)


@opaque
def _signed_weights(call: Call, longest: tuple[int, int] | None) -> torch.Tensor:
    """Return the weights before dropout, negative where dropped; packed sequences are padded to the longest."""
    with torch.no_grad():
        kept, whole = (_weights(c, longest) for c in (call, call._replace(dropout=0.0, seed=None)))
        return torch.where(kept == 0, -whole, whole)


def _weights(call: Call, longest: tuple[int, int] | None) -> torch.Tensor:
    call = call._replace(residuals=False, weights=True)
    if longest is None:
        weights: torch.Tensor = forward(*call)[3]
        return weights
    _, parts = run(call)
    padded = torch.zeros((len(parts), call.q.shape[1], *longest), dtype=computed_in(call.q.dtype))
    for own, part in zip(padded, parts, strict=True):
        own[:, : part.shape[1], : part.shape[2]] = to_tensor(part)
    return padded
