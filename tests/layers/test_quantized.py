"""Layers whose weights are 8-bit codes."""

from __future__ import annotations

import pickle
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import selfattn as sa


def widened(weights: sa.QuantizedWeights) -> Any:
    codes = weights.codes.astype(np.float64).reshape(len(weights.scales), -1, weights.codes.shape[1])
    return (codes * weights.scales[:, None]).reshape(weights.codes.shape)


@pytest.mark.parametrize("groups", [1, 3, 12])
def test_against_the_numbers_that_codes_represent(isa: str, normal: Any, groups: int) -> None:
    for depth, columns in ((12, 1), (36, 49), (60, 250)):
        w, b = normal(depth, columns), normal(columns)
        weights, gate = sa.quantize(w, groups=groups), sa.quantize(normal(depth, columns), groups=groups)
        exact = widened(weights)
        bound = np.repeat(weights.scales, depth // groups, axis=0) * (0.5 + 1e-6)
        assert np.all(abs(exact - w) <= bound)
        linear = sa.Linear(weights, b)
        for rows in (1, 2, 9, 100):
            x = normal(rows, depth)
            y = linear(x)
            wanted = x.astype(np.float64) @ exact + b
            assert np.all(abs(y - wanted) <= 2e-6 * (abs(x) @ abs(exact) + 1))
            assert np.all(abs(y - (x @ w.astype(np.float64) + b)) <= abs(x) @ bound + 1e-4)
            assert np.array_equal(linear(x[-1:]), y[-1:])
            for dtype in (np.float16, ml_dtypes.bfloat16):
                narrow = x.astype(dtype)
                assert np.array_equal(linear(narrow), linear(narrow.astype(np.float32)).astype(dtype))
        gated = sa.Linear(weights, b, w_gate=gate, activation="silu")
        x = normal(5, depth)
        z = x @ widened(gate)
        assert np.allclose(gated(x), z / (1 + np.exp(-z)) * (x @ exact + b), atol=1e-4)
        ff = sa.FeedForward(weights, sa.quantize(w.T), b, norm=sa.RMSNorm())
        for layer in (linear, gated, ff):
            assert np.array_equal(pickle.loads(pickle.dumps(layer))(x), layer(x))


def test_columns_of_zeros() -> None:
    weights = sa.quantize(np.zeros((4, 3)))
    assert not weights.codes.any()
    assert not sa.Linear(weights)(np.ones((2, 4), np.float32)).any()


@pytest.mark.one_isa
@pytest.mark.parametrize(
    ("call", "exception", "message"),
    [
        (
            lambda w: sa.quantize(w, groups=3),
            ValueError,
            "quantize: groups is 3, which does not divide the 4 rows of w",
        ),
        (lambda w: sa.quantize(w[0]), ValueError, "quantize: w has shape"),
        (lambda w: sa.quantize(w.astype(int)), TypeError, "quantize: w has dtype int64"),
        (lambda w: sa.quantize(w / 0), ValueError, "quantize: w holds numbers that are not finite"),
        (lambda w: sa.Linear(w.astype(np.int8)), TypeError, "Linear: w has dtype int8, but .* the result of quantize"),
        (lambda w: sa.Linear(sa.QuantizedWeights(w, w)), TypeError, "Linear: w has codes of float64 and scales of"),
        (
            lambda w: sa.Linear(sa.QuantizedWeights(w.astype(np.int8), w[:3].astype(np.float32))),
            ValueError,
            r"Linear: w has scales of shape \(3, 5\), but \(groups, 5\) are needed, where groups divide 4",
        ),
        (lambda w: sa.Linear(sa.quantize(w), w[0]), TypeError, "Linear: b has dtype float64 but w has int8"),
        (lambda w: sa.Linear(sa.quantize(w))(w[:, :4]), TypeError, "weights have int8: x must be float32, float16 or"),
    ],
)
def test_refusals(call: Any, exception: Any, message: str) -> None:
    with np.errstate(all="ignore"), pytest.raises(exception, match=message):
        call(np.ones((4, 5)))
