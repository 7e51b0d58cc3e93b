"""Views of tensors as arrays, and of arrays as tensors."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.autograd import forward_ad

from .._arguments import as_array
from .._errors import refusal
from .._foreign import BITS, type_name

ACCEPTED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_PLAIN_DISPATCH = torch.Tensor.__torch_dispatch__  # subclasses that override it may have no memory

# PyTorch has no public names for these. Where one is missing, the answer is the one that costs only time: memory is not
# read directly, so that PyTorch itself does what it can with the operator.
_functorch = getattr(torch._C, "_functorch", None)
_level = getattr(_functorch, "maybe_current_level", lambda: 0)
_interpreter = getattr(_functorch, "peek_interpreter_stack", lambda: None)
_functionalize = getattr(getattr(_functorch, "TransformType", None), "Functionalize", None)
_is_batch = getattr(_functorch, "is_batchedtensor", lambda tensor: False)
_is_legacy_batch = getattr(_functorch, "is_legacy_batchedtensor", lambda tensor: True)
_is_wrapper = getattr(_functorch, "is_functorch_wrapped_tensor", lambda tensor: False)
_inside = getattr(_functorch, "get_unwrapped", lambda tensor: None)
_count_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
_tracing_state = getattr(torch._C, "_get_tracing_state", lambda: True)
_keeps_tangents = getattr(torch._C, "_is_fwd_grad_enabled", lambda: True)

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


def check_integers(function: str, name: str, tensor: Any) -> None:
    """Raise unless this is a dense tensor of integers in CPU memory."""
    check_memory(function, name, tensor)
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype is torch.bool:
        raise TypeError(f"{function}: {name} has dtype {tensor.dtype}, but integers are needed")


def as_operand(function: str, name: str, value: Any) -> Any:
    """Return a tensor of the value, which may also be an array or numbers, in CPU memory."""
    if not isinstance(value, torch.Tensor):
        value = _converted(function, name, value)
    check_memory(function, name, value)
    return value


def _converted(function: str, name: str, value: Any) -> Any:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        array = as_array(function, name, value)  # names the argument if this is no array either
        text = f" has dtype {array.dtype}, but a tensor, an array or numbers are needed, of a type that PyTorch has"
        raise refusal(TypeError, function, name, text) from error


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which the core computes for operands of this dtype."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def is_plain(*tensors: Any) -> bool:
    """Whether nothing traces, transforms or intercepts operations on these tensors: their memory can be read now."""
    return not (
        torch.compiler.is_compiling()
        or torch.overrides.has_torch_function(tensors)
        or _count_modes()
        or _level() is not None
        or _tracing_state() is not None
        or any(x is not None and (x.is_meta or _is_disguised(x)) for x in tensors)
    )


def _is_disguised(tensor: Any) -> bool:
    """Whether a tensor has no memory of its own: some subclasses, and batches of upstream gradients (legacy vmap)."""
    return type(tensor).__torch_dispatch__ is not _PLAIN_DISPATCH or _is_legacy_batch(tensor)


def is_transformed() -> bool:
    """Whether `torch.func.grad`, `vmap` or the like is active. Operators have no gradients under these functions."""
    top = None if torch.compiler.is_compiling() else _interpreter()
    return top is not None and top.key() != _functionalize


def wants_gradient(*tensors: Any) -> bool:
    """Whether gradients are recorded for any of the tensors, in either mode of differentiation."""
    if torch.is_grad_enabled() and any(x is not None and (x.requires_grad or _is_traced(x)) for x in tensors):
        return True
    return _may_have_tangents() and any(has_tangent(x) for x in tensors)


def _may_have_tangents() -> bool:
    """Whether forward-mode differentiation is active."""
    return getattr(forward_ad, "_current_level", 0) >= 0


def has_tangent(tensor: Any) -> bool:
    """Whether this is a dual tensor of forward-mode differentiation, at the current level of `torch.func`."""
    if tensor is None or not _may_have_tangents() or not _keeps_tangents():
        return False
    if torch.compiler.is_compiling() or _is_batch(tensor):
        return False  # a batch's tangents are found when its level is left
    return forward_ad.unpack_dual(tensor).tangent is not None


def no_tangents(function: str, **tensors: Any) -> None:
    """Raise if one of the tensors is a dual tensor, whose tangent would be lost."""
    if not _may_have_tangents():
        return
    for name, tensor in tensors.items():
        if isinstance(tensor, torch.Tensor) and has_tangent(tensor):
            raise forward_mode_refusal(function, name)


def forward_mode_refusal(function: str, name: str) -> NotImplementedError:
    """Return the error for a tangent."""
    text = " has a tangent, but there is no forward-mode differentiation: use reverse mode, such as torch.func.vjp"
    return refusal(NotImplementedError, function, name, text)


def _is_traced(tensor: Any) -> bool:
    """Whether the tensor inside a `torch.func` wrapper, or inside several nested wrappers, requires grad."""
    if torch.compiler.is_compiling() or not _is_wrapper(tensor):
        return False
    inner = _inside(tensor)
    return inner is None or inner.requires_grad or _is_traced(inner)
