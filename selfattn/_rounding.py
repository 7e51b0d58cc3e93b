"""Bounds of the error that products on a matrix unit add to a call."""

from __future__ import annotations

from typing import Any

from ._explain import explain
from ._typing import Precision

# The error that products on a matrix unit add, relative to the sum of p|v|: (from rounding weights and values, per unit
# of sigma from rounding queries and keys). The table in docs/numerics.md explains them.
MATRIX_ROUNDINGS = {
    ("bfloat16", "highest"): (2.0**-8, 0.0),
    ("float16", "highest"): (2.0**-16, 2.0**-16),
    ("float32", "high"): (2.0**-15, 2.0**-15),
    ("float32", "medium"): (2.0**-7, 2.0**-7),
}


# Units that multiply operands without rounding them, or to float32's 24 bits (int8 dots); sums are float32 or exact.
EXACT_UNITS = ("fma", "bfloat16 dots", "int8 dots")


def rounding(q: Any, k: Any, v: Any, precision: Precision = "highest", **options: Any) -> tuple[float, float]:
    """Return the entry for the unit that a call runs on; zeros if its products are exact."""
    unit = explain(q, k, v, precision=precision, **options)["unit"]
    return (
        (0.0, 0.0)
        if unit in EXACT_UNITS
        else MATRIX_ROUNDINGS[q.dtype.name, "highest" if q.dtype.itemsize == 2 else precision]
    )
