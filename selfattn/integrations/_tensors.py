"""Views of tensors as arrays, and of arrays as tensors."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from .._foreign import BITS, type_name

ACCEPTED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_PLAIN_DISPATCH = torch.Tensor.__torch_dispatch__  # subclasses that override it may have no memory

_Function = TypeVar("_Function", bound=Callable[..., Any])


def opaque(function: _Function) -> _Function:
    """Make `torch.compile` call a function as it is; elsewhere, this is cheaper than PyTorch's decorator."""
    uncompiled: Any = torch.compiler.disable(function)

    @wraps(function)
    def call(*arguments: Any, **keywords: Any) -> Any:
        if torch.compiler.is_compiling():
            return uncompiled(*arguments, **keywords)
        return function(*arguments, **keywords)

    return call  # type: ignore[return-value]


def to_array(tensor: Any) -> NDArray[Any]:
    """Return a view of a CPU tensor; NumPy has no bfloat16, see `bfloat16`."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.is_neg():  # a pending negation, as in the imaginary part of a conjugate
        tensor = tensor.resolve_neg()
    if tensor.dtype is torch.bfloat16:
        view: NDArray[Any] = tensor.view(torch.uint16).numpy().view(bfloat16())
        return view
    array: NDArray[Any] = tensor.numpy()
    return array


def to_tensor(array: NDArray[Any]) -> Any:
    """Return a contiguous tensor, over the array's memory if that is contiguous."""
    array = np.ascontiguousarray(array).reshape(array.shape)  # ascontiguousarray makes 0-d arrays 1-d
    if type_name(array.dtype) == "bfloat16":
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def name_of(dtype: torch.dtype) -> str:
    """Return the name of a dtype in NumPy and `KVCache`."""
    return str(dtype).removeprefix("torch.")


def empty_pair(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, NDArray[Any]]:
    """Return an uninitialized tensor, and an array over its memory."""
    if dtype is torch.bfloat16:
        bits = np.empty(shape, np.uint16)
        return torch.from_numpy(bits).view(dtype), bits.view(bfloat16())
    array = np.empty(shape, _array_dtype(dtype))
    return torch.from_numpy(array), array


@cache
def _array_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    """Return NumPy's dtype; PyTorch raises a TypeError if there is none."""
    kind: np.dtype[Any] = torch.empty(0, dtype=dtype).numpy().dtype
    return kind


@cache
def bfloat16() -> Any:
    """Return the dtype of arrays over tensors of bfloat16: that of ml_dtypes, or one that only holds the bits."""
    try:
        from ml_dtypes import bfloat16
    except ImportError:
        return BITS
    return np.dtype(bfloat16)


def check_memory(function: str, name: str, tensor: Any) -> None:
    """Raise unless this is a dense tensor in CPU memory."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{function}: {name} is a {type(tensor).__name__}, but a tensor is needed")
    if not (tensor.is_cpu or tensor.is_meta):
        raise TypeError(f"{function}: {name} is on device {tensor.device}, but only CPU memory is accepted")
    if tensor.layout is not torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else tensor.layout
        raise TypeError(f"{function}: {name} is a tensor of layout {kind}, but a dense one is needed")


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which the core computes for operands of this dtype."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def is_plain(*tensors: Any) -> bool:
    """Whether nothing traces, transforms or intercepts operations on these tensors: their memory can be read now."""
    return not (
        torch.compiler.is_compiling()
        or torch.overrides.has_torch_function(tensors)
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.maybe_current_level() is not None
        or torch._C._get_tracing_state() is not None
        or any(x is not None and (x.is_meta or _is_disguised(x)) for x in tensors)
    )


def _is_disguised(tensor: Any) -> bool:
    """Whether a tensor has no memory of its own: some subclasses, and batches of upstream gradients (legacy vmap)."""
    return type(tensor).__torch_dispatch__ is not _PLAIN_DISPATCH or torch._C._functorch.is_legacy_batchedtensor(tensor)


def is_transformed() -> bool:
    """Whether `torch.func.grad`, `vmap` or the like is active. Operators have no gradients under these functions."""
    top = None if torch.compiler.is_compiling() else torch._C._functorch.peek_interpreter_stack()
    return top is not None and top.key() != torch._C._functorch.TransformType.Functionalize


def wants_gradient(*tensors: Any) -> bool:
    """Whether gradients are recorded for any of the tensors."""
    return torch.is_grad_enabled() and any(x is not None and (x.requires_grad or _is_traced(x)) for x in tensors)


def _is_traced(tensor: Any) -> bool:
    """Whether the tensor inside a `torch.func` wrapper, or inside several nested wrappers, requires grad."""
    if torch.compiler.is_compiling() or not torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return False
    inner = torch._C._functorch.get_unwrapped(tensor)
    return inner.requires_grad or _is_traced(inner)
