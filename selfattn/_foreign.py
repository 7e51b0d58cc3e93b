"""Arrays of other libraries as ndarrays, or an error that explains why that is not possible."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._errors import refusal

# Holds tensors of bfloat16 where ml_dtypes is not installed. NumPy cannot compute with it, only the core can.
BITS = np.dtype([("bfloat16", np.uint16)])

ACCEPTED = "float16, bfloat16, float32 and float64 are accepted"


def is_masked(value: Any) -> bool:
    # No import here: a child process forked while the import lock is held would deadlock. A MaskedArray can exist only
    # if numpy.ma has been imported, and NumPy does not import it by itself.
    module = sys.modules.get("numpy.ma")
    return module is not None and isinstance(value, module.MaskedArray)


def from_foreign(function: str, name: str, value: Any) -> NDArray[Any]:
    device = _dlpack_device(value)
    if device is not None:
        if device[0] != 1:  # kDLCPU
            raise refusal(
                TypeError,
                function,
                name,
                f" is on device {device} (DLPack), but only CPU memory is accepted: copy it to the CPU first",
            )
        # A framework's own conversion gives the best reason for refusing, e.g. a tensor that requires grad.
        if not hasattr(value, "__array__"):
            return _from_dlpack(function, name, value)
        if str(getattr(value, "dtype", "")) == "torch.bfloat16" and not value.requires_grad:
            return _from_torch_bfloat16(function, name, value)
    no_array = f" of type {type(value).__name__} is not an array of numbers"
    try:
        array = np.asarray(value)
    except Exception as error:
        kind = next((kind for kind in (ValueError, RuntimeError, MemoryError) if isinstance(error, kind)), TypeError)
        raise refusal(kind, function, name, f"{no_array}: {error}") from error
    if array.dtype == object:
        raise refusal(TypeError, function, name, f"{no_array}: {ACCEPTED}")
    return array


def _dlpack_device(value: Any) -> tuple[int, int] | None:
    """Return the DLPack device of an array; None if it has no single one, e.g. if it is spread over devices."""
    try:
        kind, number = value.__dlpack_device__()
        return int(kind), int(number)
    except Exception:
        return None


def _from_dlpack(function: str, name: str, value: Any) -> NDArray[Any]:
    try:
        return np.from_dlpack(value)
    except Exception as error:  # a type that NumPy lacks, or memory that cannot be shared
        raise refusal(
            TypeError, function, name, f" of type {type(value).__name__} is not for NumPy to read ({error}): {ACCEPTED}"
        ) from error


def _from_torch_bfloat16(function: str, name: str, tensor: Any) -> NDArray[Any]:
    # NumPy has no bfloat16, so PyTorch does not convert it: pass the bits as uint16.
    if "ml_dtypes" not in sys.modules:  # not imported here, see is_masked
        raise refusal(TypeError, function, name, " is a tensor of bfloat16, which NumPy lacks: import ml_dtypes first")
    return np.asarray(tensor.view(sys.modules["torch"].uint16)).view("bfloat16")


def type_name(dtype: np.dtype[Any]) -> str:
    """Return the name of a dtype in the core."""
    return "bfloat16" if dtype == BITS else dtype.name


def converted(array: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return an array in another dtype, rounded to nearest; `BITS` counts as bfloat16."""
    if BITS not in (array.dtype, dtype) or array.dtype == dtype:
        return array.astype(dtype, copy=False)
    if array.dtype == BITS:
        wide = array.view(np.uint16).astype(np.uint32) << 16
        return wide.view(np.float32).astype(dtype, copy=False)
    bits = np.ascontiguousarray(array, np.float32).reshape(array.shape).view(np.uint32)
    nearest = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16
    narrow = np.where(bits << 1 > 0xFF000000, bits >> 16 | 0x40, nearest)  # NaN stays NaN
    return narrow.astype(np.uint16).view(BITS)
