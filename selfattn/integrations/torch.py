"""Attention of CPU tensors, with gradients: PyTorch's function, selfattn's own with all options, and flash-attn's."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .._arguments import flag, real
from .._attention import _DEFAULTS, ONLY_HERE
from .._attention import attention as _core_attention
from .._keywords import clean_signature, refuse_unknown
from ..compat._checks import own_names
from ..compat._pytorch import attend, check_mask, check_mask_type, result_shape
from . import _torch_autograd
from ._dropout import dropout_options
from ._runtime import share_runtime
from ._tensors import ACCEPTED, as_operand, check_memory, computed_in, is_plain, to_array, wants_gradient
from ._torch_call import TENSORS, make_call
from ._torch_flash import flash_attn_func, flash_attn_varlen_func
from ._torch_flash_kvcache import flash_attn_with_kvcache
from ._torch_flash_packed import (
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from ._torch_padding import pad_input, unpad_input
from ._torch_rotary import apply_rotary_emb

__all__ = [
    "T5Bias",
    "apply_rotary_emb",
    "attention",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "pad_input",
    "scaled_dot_product_attention",
    "unpad_input",
]

_NAME = "scaled_dot_product_attention"
_OPTIONS = _DEFAULTS.keys()


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Compute ``torch.nn.functional.scaled_dot_product_attention`` of CPU tensors, without copying them.

    Differentiable, also twice. Works under `torch.compile` (also ``fullgraph=True``), `torch.export` and `torch.func`,
    as the operator ``selfattn::sdpa``. ``torch.func.grad`` inside a compiled function is not supported.

    Parameters
    ----------
    query : Tensor, shape (..., H, L, E)
    key : Tensor, shape (..., H, S, E)
    value : Tensor, shape (..., H, S, Ev)
        All in one dtype: float32, bfloat16, float16 or float64; any strides. All dimensions before the last two
        broadcast.
    attn_mask : Tensor, broadcasting to (..., H, L, S), optional
        bool (True = attend), or float32 or query's dtype (added to the scores).
    dropout_p : float, default 0.0
        The rate at which weights are dropped, below 1. The seed comes from PyTorch's generator. Which weights are
        dropped differs from the original.
    is_causal : bool, default False
        Query i sees the keys up to i (top-left alignment); not together with `attn_mask`.
    scale : float, optional
        Default ``1 / sqrt(E)``.
    enable_gqa : bool, default False
        Allow fewer heads in key and value than in query; the number of query heads must be a multiple of their number.

    Returns
    -------
    Tensor, shape (..., H, L, Ev)
        In query's dtype; with query's memory format if the shapes are equal.

    Raises
    ------
    TypeError, ValueError
        Tensors on other devices; sparse, nested or quantised tensors; other dtypes; shapes that do not fit together.
    NotImplementedError
        Tensors with tangents, as in `torch.func.jvp`.

    Notes
    -----
    A row without a visible key gives 0; PyTorch gives NaN or 0, depending on the version. The other differences are
    listed in `selfattn.compat.scaled_dot_product_attention`. `selfattn.set_num_threads` limits the threads of a call;
    they belong to PyTorch's runtime if both libraries use OpenMP. Autocast applies as it does to the original. Eager
    calls with plain tensors bypass PyTorch's dispatcher, because its Python overhead would exceed the time of a small
    attention call; profilers see such calls only as Python functions.

    For gradients, out (in float32 for 16-bit operands) and one float64 per query and head are kept; scores are computed
    again. Only second derivatives store all scores. Second derivatives are not defined for hidden keys that are not
    finite. There is no forward-mode differentiation: tensors with tangents are refused.

    Examples
    --------
    >>> import torch
    >>> from selfattn.integrations.torch import scaled_dot_product_attention
    >>> q, k, v = torch.randn(3, 2, 4, 10, 8)
    >>> scaled_dot_product_attention(q, k, v, is_causal=True).shape
    torch.Size([2, 4, 10, 8])
    """
    dropout = dropout_options(_NAME, "dropout_p", dropout_p)
    _check_tensors(query, key, value, attn_mask)
    if torch.is_autocast_enabled("cpu"):
        query, key, value, attn_mask = _autocast(query, key, value, attn_mask)
    if not query.dtype is key.dtype is value.dtype:
        raise TypeError(
            f"{_NAME}: query, key and value must have one dtype, but have {query.dtype}, {key.dtype}, {value.dtype}"
        )
    check_mask_type(None if attn_mask is None else attn_mask.dtype, query.dtype, torch.bool, torch.float32)
    is_causal, enable_gqa = flag(_NAME, "is_causal", is_causal), flag(_NAME, "enable_gqa", enable_gqa)
    check_mask(None if attn_mask is None else attn_mask.shape, is_causal)
    shape = result_shape(query.shape, key.shape, value.shape, enable_gqa, torch.broadcast_shapes)
    tensors = (query, key, value, attn_mask)
    if not dropout and is_plain(*tensors) and not wants_gradient(*tensors):
        out = torch.empty_like(query) if shape == tuple(query.shape) else query.new_empty(shape)
        mask = None if attn_mask is None else to_array(attn_mask)
        operands = to_array(query), to_array(key), to_array(value)
        attend(operands, mask, is_causal, scale, enable_gqa, to_array(out))
        return out
    if not enable_gqa:
        query, key, value = _broadcast(query, key, value)
    options = {"bias" if attn_mask is None or attn_mask.is_floating_point() else "mask": attn_mask, **dropout}
    if is_causal:
        options["causal"], options["q_offset"] = True, 0
    if scale is not None and not torch.compiler.is_compiling():
        scale = real(_NAME, "scale", scale)
    return _attend(query, key, value, scale=scale, **options)


@own_names(_NAME, q="query", k="key", v="value", mask="attn_mask", bias="attn_mask")
def _attend(query: Any, key: Any, value: Any, **options: Any) -> Any:
    out, _, _ = _torch_autograd.attend(make_call(query, key, value, **options))
    return out


def _broadcast(query: Any, key: Any, value: Any) -> tuple[Any, ...]:
    """Return views with matching numbers of heads; if key and value have one head, it is kept for all query heads."""
    fronts = query.shape[:-2], key.shape[:-2], value.shape[:-2]
    if fronts[0] == fronts[1] == fronts[2]:
        return query, key, value
    front = torch.broadcast_shapes(*fronts)
    one = all(x.ndim == 2 or x.shape[-3] == 1 for x in (key, value))
    shared = (*front[:-1], 1) if one else front
    return tuple(x.expand(*lead, *x.shape[-2:]) for x, lead in ((query, front), (key, shared), (value, shared)))


class T5Bias(NamedTuple):
    """T5's bias by distance, like `selfattn.T5Bias`, with a table that may require grad.

    Examples
    --------
    >>> import torch
    >>> from selfattn.integrations.torch import T5Bias, attention
    >>> q, k, v = torch.randn(3, 2, 4, 10, 8)
    >>> table = torch.zeros(32, 4, requires_grad=True)
    >>> attention(q, k, v, t5=T5Bias(table), scale=1.0).sum().backward()
    >>> table.grad.shape
    torch.Size([32, 4])
    """

    table: torch.Tensor
    bidirectional: bool = True
    max_distance: int = 128


@clean_signature(_core_attention, without=("out", *ONLY_HERE))
def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Any:
    """Compute `selfattn.attention` of CPU tensors, differentiably.

    Parameters
    ----------
    q, k, v : Tensor
        As for `selfattn.attention`.
    **options
        The options of `selfattn.attention`, except ``out``, ``return_key_mass``, ``key_indices``, ``block_indices``,
        ``block_size``, ``rope``, ``positions`` and the masks of ``selfattn.masks``. ``mask``, ``bias``, ``q_offset``,
        ``q_lens``, ``kv_lens``, ``kv_starts``, ``prefix_lens``, ``scale``, ``alibi_slopes`` and ``sinks`` may be
        tensors, arrays or numbers; ``t5`` is a `T5Bias` of this module or of selfattn. If they require grad, ``bias``,
        ``scale`` (a tensor with one element), ``alibi_slopes``, ``sinks`` and the table of ``t5`` get gradients as q, k
        and v do.

    Returns
    -------
    out : Tensor
        With `return_lse` and `return_weights` a tuple, as from `selfattn.attention`; lse and weights are
        differentiable.

    Raises
    ------
    TypeError, ValueError
        As `selfattn.attention`, and for tensors without CPU memory.
    NotImplementedError
        Tensors with tangents, as in `torch.func.jvp`.

    Notes
    -----
    As for `scaled_dot_product_attention`. Autocast applies to q, k, v and ``bias``, and not to the other options. With
    16-bit operands on units that multiply bfloat16, the result of a call that records gradients may differ by rounding
    from the result without them.

    Examples
    --------
    >>> import torch
    >>> from selfattn.integrations.torch import attention
    >>> q, k, v = torch.randn(3, 2, 4, 10, 8)
    >>> sinks = torch.zeros(4, requires_grad=True)
    >>> attention(q, k, v, causal=True, window=(3, 0), sinks=sinks).sum().backward()
    >>> sinks.grad.shape
    torch.Size([4])
    """
    function = "attention"
    if not options.keys() <= _OPTIONS:  # compilers cannot trace what follows
        refuse_unknown(attention, options)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_memory(function, name, tensor)
    if torch.is_autocast_enabled("cpu"):
        bias = options.get("bias")
        bias = None if bias is None else as_operand(function, "bias", bias)
        q, k, v, options["bias"] = _autocast(q, k, v, bias)
    options.update(dropout_options(function, "dropout", options.pop("dropout", 0.0), options.pop("seed", None)))
    call = make_call(q, k, v, **options)
    for name, tensor in zip(TENSORS, call.tensors(), strict=True):
        if tensor is not None:
            check_memory(function, name, tensor)
    out, lse, weights = _torch_autograd.attend(call)
    results = [out]
    if call.residuals:
        results.append(lse.to(computed_in(q.dtype)))
    if call.weights:
        results.append(weights)
    return out if len(results) == 1 else tuple(results)


def _check_tensors(query: Any, key: Any, value: Any, attn_mask: Any) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_memory(_NAME, name, tensor)
        if tensor.dtype not in ACCEPTED:
            raise TypeError(f"{_NAME}: {name} has dtype {tensor.dtype}, but one of {ACCEPTED} is needed")
    if attn_mask is not None:
        if type(attn_mask).__name__ == "CausalBias":  # it has no elements, and in PyTorch 2.5 no properties
            raise TypeError(f"{_NAME}: attn_mask is a CausalBias: pass is_causal=True, or a tensor of bool")
        check_memory(_NAME, "attn_mask", attn_mask)


def _autocast(query: Any, key: Any, value: Any, attn_mask: Any) -> tuple[Any, ...]:
    dtype = torch.get_autocast_dtype("cpu")
    return tuple(
        x if x is None or x.dtype is torch.float64 or not x.is_floating_point() else x.to(dtype)
        for x in (query, key, value, attn_mask)
    )


share_runtime()
