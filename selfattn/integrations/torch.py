"""PyTorch's attention function for CPU tensors, computed by selfattn."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .._arguments import flag
from ..compat._pytorch import attend, check_mask, check_mask_type, result_shape
from ._runtime import share_runtime

__all__ = ["scaled_dot_product_attention"]

_NAME = "scaled_dot_product_attention"
_BFLOAT16: Any = np.dtype(importlib.import_module("ml_dtypes").bfloat16)
_PLAIN_DISPATCH = torch.Tensor.__torch_dispatch__  # subclasses that override it may have no memory
_ACCEPTED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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

    Works under `torch.compile` (also ``fullgraph=True``) and `torch.export`, as the operator ``selfattn::sdpa``.

    Parameters
    ----------
    query : Tensor, shape (..., H, L, E)
    key : Tensor, shape (..., H, S, E)
    value : Tensor, shape (..., H, S, Ev)
        All of the same dtype: float32, bfloat16, float16 or float64; any strides. All dimensions before the last two
        broadcast.
    attn_mask : Tensor, broadcasting to (..., H, L, S), optional
        bool (True = attend), or float32 or query's dtype (added to the scores).
    dropout_p : float
        Must be 0: training is not supported.
    is_causal : bool, default False
        Query i sees the keys up to i (top-left alignment); not together with `attn_mask`.
    scale : float, optional
        Default ``1 / sqrt(E)``.
    enable_gqa : bool, default False
        Allow fewer heads in key and value than in query; the number of query heads must be a multiple of theirs.

    Returns
    -------
    Tensor, shape (..., H, L, Ev)
        In query's dtype; with query's memory format if the shapes are equal.

    Raises
    ------
    RuntimeError
        A tensor requires grad while gradients are recorded: there is no backward pass.
    TypeError, ValueError
        Tensors on other devices; sparse, nested or quantised tensors; other dtypes; shapes that do not fit together.

    Notes
    -----
    A row without a visible key gives 0; PyTorch gives NaN or 0, depending on the version. The other differences are
    listed in `selfattn.compat.scaled_dot_product_attention`. `selfattn.set_num_threads` limits the threads of a call;
    they belong to PyTorch's runtime if both libraries use OpenMP. Autocast applies as to the original. Eager calls with
    plain tensors bypass PyTorch's dispatcher, because its Python overhead would exceed the time of a small attention
    call; profilers see such calls only as Python functions.

    Examples
    --------
    >>> import torch
    >>> from selfattn.integrations.torch import scaled_dot_product_attention
    >>> q, k, v = torch.randn(3, 2, 4, 10, 8)
    >>> scaled_dot_product_attention(q, k, v, is_causal=True).shape
    torch.Size([2, 4, 10, 8])
    """
    if dropout_p != 0.0:
        raise ValueError(f"{_NAME}: dropout_p is {dropout_p!r}, but there is no dropout at inference: pass 0.0")
    _check_tensors(query, key, value, attn_mask)
    if torch.is_autocast_enabled("cpu"):
        query, key, value, attn_mask = _autocast(query, key, value, attn_mask)
    if not query.dtype is key.dtype is value.dtype:
        raise TypeError(
            f"{_NAME}: query, key and value must have one dtype, but have {query.dtype}, {key.dtype}, {value.dtype}"
        )
    if torch.is_grad_enabled() and any(_requires_grad(x) for x in (query, key, value, attn_mask)):
        raise RuntimeError(
            f"{_NAME}: a tensor requires grad, but selfattn computes no gradients: call it under torch.no_grad() or "
            "torch.inference_mode(), or detach the tensors"
        )
    arguments = (
        query,
        key,
        value,
        attn_mask,
        flag(_NAME, "is_causal", is_causal),
        scale,
        flag(_NAME, "enable_gqa", enable_gqa),
    )
    return _compute(*arguments) if _is_plain(query, key, value, attn_mask) else _operator(*arguments)


def _compute(
    query: Any, key: Any, value: Any, attn_mask: Any, is_causal: bool, scale: float | None, enable_gqa: bool
) -> Any:
    out = _result(query, key, value, attn_mask, is_causal, scale, enable_gqa)
    mask = None if attn_mask is None else to_array(attn_mask)
    attend(to_array(query), to_array(key), to_array(value), mask, is_causal, scale, enable_gqa, to_array(out))
    return out


def _result(
    query: Any, key: Any, value: Any, attn_mask: Any, is_causal: bool, scale: float | None, enable_gqa: bool
) -> Any:
    """Return an uninitialized result: compilers trace it to learn its shape, and calls write into it."""
    check_mask_type(None if attn_mask is None else attn_mask.dtype, query.dtype, torch.bool, torch.float32)
    check_mask(None if attn_mask is None else attn_mask.shape, is_causal)
    shape = result_shape(query.shape, key.shape, value.shape, enable_gqa, torch.broadcast_shapes)
    return torch.empty_like(query) if shape == tuple(query.shape) else query.new_empty(shape)


def to_array(tensor: Any) -> NDArray[Any]:
    """Return a view of a CPU tensor; bfloat16 becomes the dtype of ml_dtypes, since NumPy has none."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.is_neg():  # a pending negation, as in the imaginary part of a conjugate
        tensor = tensor.resolve_neg()
    if tensor.dtype is torch.bfloat16:
        view: NDArray[Any] = tensor.view(torch.uint16).numpy().view(_BFLOAT16)
        return view
    array: NDArray[Any] = tensor.numpy()
    return array


def _is_plain(*tensors: Any) -> bool:
    """Whether nothing traces, transforms or intercepts operations on these tensors, so that they can be read now."""
    return not (
        torch.compiler.is_compiling()
        or torch.overrides.has_torch_function(tensors)
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.maybe_current_level() is not None
        or torch._C._get_tracing_state() is not None
        or any(x is not None and (x.is_meta or type(x).__torch_dispatch__ is not _PLAIN_DISPATCH) for x in tensors)
    )


def _requires_grad(tensor: Any) -> bool:
    return tensor is not None and bool(tensor.requires_grad)


def _check_tensors(query: Any, key: Any, value: Any, attn_mask: Any) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        _check_memory(name, tensor)
        if tensor.dtype not in _ACCEPTED:
            raise TypeError(f"{_NAME}: {name} has dtype {tensor.dtype}, but one of {_ACCEPTED} is needed")
    if attn_mask is not None:
        if type(attn_mask).__name__ == "CausalBias":  # has no elements, and in PyTorch 2.5 no properties
            raise TypeError(f"{_NAME}: attn_mask is a CausalBias: pass is_causal=True, or a tensor of bool")
        _check_memory("attn_mask", attn_mask)


def _check_memory(name: str, tensor: Any) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{_NAME}: {name} is a {type(tensor).__name__}, but a tensor is needed")
    if not (tensor.is_cpu or tensor.is_meta):
        raise TypeError(f"{_NAME}: {name} is on device {tensor.device}, but only CPU memory is accepted")
    if tensor.layout is not torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else tensor.layout
        raise TypeError(f"{_NAME}: {name} is a tensor of layout {kind}, but a dense one is needed")


def _autocast(query: Any, key: Any, value: Any, attn_mask: Any) -> tuple[Any, ...]:
    dtype = torch.get_autocast_dtype("cpu")
    return tuple(
        x if x is None or x.dtype is torch.float64 or not x.is_floating_point() else x.to(dtype)
        for x in (query, key, value, attn_mask)
    )


_operator = torch.library.custom_op(
    "selfattn::sdpa",
    _compute,
    mutates_args=(),
    device_types="cpu",
    schema=(
        "(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, bool is_causal, float? scale, bool enable_gqa)"
        " -> Tensor"
    ),
)
_operator.register_fake(_result)

share_runtime()
