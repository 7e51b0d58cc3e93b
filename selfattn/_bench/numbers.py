"""The dtypes of workloads, and the error that is allowed for each."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import numpy as np
from numpy.typing import NDArray

DTYPES = ("float32", "float64", "bfloat16", "float16")
PRECISIONS = ("highest", "high", "medium")

# Suffixes of workload names, so that results of several dtypes can be shown together.
SUFFIXES = {
    "float32": "f32",
    "float64": "f64",
    "bfloat16": "bf16",
    "float16": "f16",
    "highest": "highest",
    "high": "high",
    "medium": "medium",
}

UNIT_ROUNDOFF = {"float32": 2.0**-24, "float64": 2.0**-53}
NARROW_ROUNDOFF = {"bfloat16": 2.0**-8, "float16": 2.0**-11}  # half an ulp; in 16 bits, only results are rounded
_SMALLEST = {"bfloat16": 2.0**-133, "float16": 2.0**-24}  # smallest subnormal numbers


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Find a NumPy dtype by name; bfloat16 comes from `ml_dtypes`."""
    if name == "bfloat16":
        bfloat16: np.dtype[Any] = np.dtype(importlib.import_module("ml_dtypes").bfloat16)
        return bfloat16
    return np.dtype(name)


def why_no_numbers(dtype: str) -> str:
    """Why arrays of this dtype cannot be created here; empty if they can."""
    if dtype == "bfloat16" and importlib.util.find_spec("ml_dtypes") is None:
        return "bfloat16 needs the package ml_dtypes"
    return ""


def computed_in(dtype: str) -> str:
    """Return the type that selfattn accumulates in: float64 for float64, otherwise float32."""
    return "float64" if dtype == "float64" else "float32"


def normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, deviation: float) -> NDArray[Any]:
    """Draw normal numbers. Apart from rounding, every dtype except float64 gets the same numbers."""
    drawn = rng.standard_normal(shape, dtype=np.float64 if dtype == "float64" else np.float32)
    drawn *= deviation
    return drawn.astype(numpy_dtype(dtype), copy=False)


def bound_of(units: NDArray[np.float64], dtype: str) -> NDArray[np.float64]:
    """Convert units of the unit roundoff to a bound, which includes the reference's own rounding."""
    dtype = computed_in(dtype)
    return units * (UNIT_ROUNDOFF[dtype] + UNIT_ROUNDOFF["float64"]) + float(np.finfo(dtype).tiny)


def rounded_bound(value: NDArray[Any], bound: NDArray[np.float64], dtype: str) -> NDArray[np.float64]:
    """Add the error of rounding a result to a 16-bit dtype, half an ulp; adds nothing for other dtypes."""
    if dtype not in NARROW_ROUNDOFF:
        return bound
    # The computation's error can change the result's size, and with it the ulp.
    rounded: NDArray[np.float64] = bound + (np.abs(value) + bound) * NARROW_ROUNDOFF[dtype] + _SMALLEST[dtype]
    return rounded
