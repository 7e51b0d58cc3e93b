"""Tensors that are described, and whose numbers are computed only when an operation needs them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from numpy.typing import NDArray
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map

_Self = TypeVar("_Self", bound="Deferred")


class Deferred(torch.Tensor):  # type: ignore[misc, unused-ignore]
    """A tensor that has a shape but no memory.

    Every PyTorch operation, also in compiled and transformed code, gets an ordinary tensor. The first operation creates
    it, and it is kept so that in-place changes take effect.
    """

    make: Callable[[], Any]
    made: torch.Tensor | None

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def without_memory(cls: type[_Self], shape: Any, dtype: torch.dtype, strides: Any = None) -> _Self:
        """Return a tensor of this class; the caller must set `make` or `made`."""
        tensor: _Self = torch.Tensor._make_wrapper_subclass(cls, shape, strides=strides, dtype=dtype, device="cpu")
        torch._C._set_throw_on_mutable_data_ptr(tensor)  # else DLPack's C functions would read a null pointer
        return tensor

    def dense(self) -> torch.Tensor:
        """Return the numbers as an ordinary tensor; every call returns the same tensor."""
        if self.made is None:
            with _disable_current_modes():  # while code is compiled, tensors may have no values
                self.made = self.make()
        return self.made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(lambda x: x.dense() if isinstance(x, Deferred) else x, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        """Make torch.compile use the ordinary tensor instead."""
        self.dense()
        return ["made"], None

    @classmethod
    def __tensor_unflatten__(
        cls: type[_Self], parts: dict[str, torch.Tensor], context: None, size: Any, stride: Any
    ) -> _Self:
        tensor = cls.without_memory(size, parts["made"].dtype, stride)
        tensor.made = parts["made"]
        return tensor

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return repr(self.dense())

    # Tensor methods that read memory without dispatching an operation.

    def numpy(self, **options: Any) -> NDArray[Any]:
        array: NDArray[Any] = self.dense().numpy(**options)
        return array

    def tolist(self) -> Any:
        return self.dense().tolist()

    def data_ptr(self) -> int:
        return int(self.dense().data_ptr())

    def share_memory_(self: _Self) -> _Self:
        self.dense().share_memory_()
        return self

    def __dlpack__(self, **options: Any) -> Any:
        return self.dense().__dlpack__(**options)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return copy.deepcopy(self.dense(), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.dense().__reduce_ex__(protocol)
