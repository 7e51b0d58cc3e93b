"""What products on a matrix unit may add to the error of a call."""

from __future__ import annotations

from typing import Any

from ._attention import explain
from ._typing import Precision

# What products on a matrix unit add to the error, relative to the sum of p|v|: by rounding weights and values, and per
# unit of sigma by rounding queries and keys. docs/numerics.md derives them.
MATRIX_ROUNDINGS = {
    ("bfloat16", "highest"): (2.0**-8, 0.0),
    ("float16", "highest"): (2.0**-16, 2.0**-16),
    ("float32", "high"): (2.0**-15, 2.0**-15),
    ("float32", "medium"): (2.0**-7, 2.0**-7),
}


# Units whose products are those of whole numbers, with sums of float32.
EXACT_UNITS = ("fma", "bfloat16 dots")


def rounding(q: Any, k: Any, v: Any, precision: Precision = "highest", **options: Any) -> tuple[float, float]:
    """Return the entry of the unit that a call runs on; 0 where its products are exact."""
    unit = explain(q, k, v, precision=precision, **options)["unit"]
    return (
        (0.0, 0.0)
        if unit in EXACT_UNITS
        else MATRIX_ROUNDINGS[q.dtype.name, "highest" if q.dtype.itemsize == 2 else precision]
    )
