"""The errors of activation functions, as docs/numerics.md states them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import selfattn as sa

erfc = np.vectorize(math.erfc, otypes=[float])


def exact(activation: str, x: Any) -> Any:
    if activation == "relu":
        return np.maximum(x, 0)
    if activation == "gelu":
        return 0.5 * x * erfc(-x / math.sqrt(2))
    z = x if activation == "silu" else math.sqrt(8 / math.pi) * (x + 0.044715 * x**3)
    e = np.exp(-abs(z))
    return x * np.where(z < 0, e, 1) / (1 + e)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("activation", "units"), [("relu", 0), ("gelu", 6), ("silu", 4), ("gelu_tanh", 8)])
def test_errors(isa: str, rng: Any, dtype: Any, activation: str, units: float) -> None:
    if (isa, dtype) == ("avx512_bf16", np.float64):
        pytest.skip("repeats avx512")
    x = np.concatenate([np.linspace(-14, 14, 3001), rng.standard_normal(3000), 10.0 ** rng.uniform(-20, 1, 500)])
    x = x.astype(dtype)
    one = np.ones((1, 1), dtype)
    found = sa.Linear(one, activation=activation)(x[:, None])[:, 0].astype(np.float64)
    wanted = exact(activation, x.astype(np.float64))
    u = 2.0**-53 if dtype == np.float64 else 2.0**-24
    # The expected values have an error too, from rounding their exponents.
    own = 4 * 2.0**-53 * (1 + x.astype(np.float64) ** 2)
    error = abs(found - wanted)
    if activation == "gelu_tanh":
        assert np.all(error <= (2 * u + own) * abs(x) + np.finfo(dtype).tiny)
        error, wanted, own = error[x > -1], wanted[x > -1], own[x > -1]
    assert np.all(error <= (units * u + own) * abs(wanted) + np.finfo(dtype).tiny)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "gelu_tanh"])
def test_limits(isa: str, dtype: Any, activation: str) -> None:
    linear = sa.Linear(np.ones((1, 1), dtype), activation=activation)
    most = np.finfo(dtype).max
    x = np.array([[np.inf], [-np.inf], [most], [-most], [1e15], [-1e15], [-110], [-800], [0], [np.nan]], dtype)
    wanted = [np.inf, 0, most, 0, x[4, 0], 0, 0, 0, 0, np.nan]
    assert np.allclose(linear(x)[:, 0], wanted, rtol=0, atol=1e-40, equal_nan=True)
