"""Copies of arrays with layouts that are hard to read."""

from __future__ import annotations

from typing import Any

import numpy as np


def misaligned(x: Any) -> Any:
    """Return a copy of `x` that starts one byte after an aligned address."""
    view = np.zeros(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
    view[...] = x
    assert x.itemsize == 1 or not view.flags.aligned
    return view
