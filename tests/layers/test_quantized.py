"""Layers whose weights are 8-bit codes."""

from __future__ import annotations

import pickle
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import selfattn as sa

pytestmark = pytest.mark.matrix


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


# Instruction sets whose unit multiplies bytes; the others compute as with "highest".
MULTIPLIES_BYTES = ("avx512_bf16", "amx", "amx_emulated")
LARGEST = {"high": 127 * 256 + 127, "medium": 127}


@pytest.mark.parametrize("precision", ["high", "medium"])
@pytest.mark.parametrize("groups", [1, 3])
def test_rows_as_integers(isa: str, rng: Any, precision: Any, groups: int) -> None:
    """Integers that reach the largest one are taken as they are, so that results are exact."""
    for depth, columns in ((12, 1), (36, 49), (60, 250), (6156, 200)):
        codes = rng.integers(-127, 128, (depth, columns), np.int8)
        weights = sa.QuantizedWeights(codes, np.exp2(rng.integers(-3, 4, (groups, columns)), dtype="f4"))
        b = np.float32(rng.integers(-50, 50, columns))
        linear = sa.Linear(weights, b, precision=precision)
        x = rng.integers(-LARGEST[precision], LARGEST[precision] + 1, (193, depth)).astype(np.float32)
        x[:, rng.integers(depth)] = LARGEST[precision]
        for rows in (1, 2, 5, 9, 100, 193):
            exact = x[:rows].astype(np.float64) @ widened(weights) + b
            units = 3 * groups + 3 * depth // 2048 + 3 if isa in MULTIPLIES_BYTES else 4 * np.sqrt(depth)
            assert np.all(abs(linear(x[:rows]) - exact) <= 2.0**-24 * units * (abs(x[:rows]) @ abs(widened(weights))))
        x = rng.standard_normal((9, depth)).astype(np.float32)
        rounds = not np.array_equal(linear(x), sa.Linear(weights, b)(x))
        assert rounds == (isa in MULTIPLIES_BYTES and depth // groups % 4 == 0)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_error_of_rows_as_integers(isa: str, normal: Any, precision: Any) -> None:
    for depth, columns, groups in ((8, 3, 2), (60, 49, 3), (1028, 130, 1)):
        w, b = normal(depth, columns), normal(columns)
        weights, gate = sa.quantize(w, groups=groups), sa.quantize(normal(depth, columns))
        linear = sa.Linear(weights, b, precision=precision)
        x = normal(40, depth) * np.float32(10.0) ** np.linspace(-41, 34, 40, dtype=np.float32)[:, None]
        for scale in (1e-36, 1e-4, 1.0, 1e33):
            scaled = sa.QuantizedWeights(weights.codes, weights.scales * np.float32(scale))
            exact, sizes = x.astype(np.float64) @ widened(scaled), abs(widened(scaled))
            largest = abs(x).max(axis=1, keepdims=True).astype(np.float64)
            bound = largest / (2 * LARGEST[precision]) * sizes.sum(axis=0) + 1e-6 * (abs(x) @ sizes) + depth * 2.0**-149
            inside = abs(x) @ sizes < 1e38
            with np.errstate(over="ignore"):
                found = sa.Linear(scaled, precision=precision)(x)
            assert np.all((abs(found - exact) <= bound)[inside])
        y = linear(x)
        assert np.array_equal(linear(np.asfortranarray(x)), y)
        for rows, threads in ((1, 1), (3, 2), (17, 3)):
            assert np.array_equal(linear(x[-rows:], num_threads=threads), y[-rows:])
        again = pickle.loads(pickle.dumps(linear))
        assert repr(again) == repr(linear)
        assert f"precision={precision!r}" in repr(again)
        x = normal(5, depth)
        for dtype in (np.float16, ml_dtypes.bfloat16):
            narrow = x.astype(dtype)
            assert np.array_equal(linear(narrow), linear(narrow.astype(np.float32)).astype(dtype))
        gated = sa.Linear(weights, b, w_gate=gate, precision=precision, activation="relu")
        value, factor = sa.Linear(gate, precision=precision)(x), linear(x)
        assert np.array_equal(gated(x), np.maximum(value, 0) * factor)
        options = {"norm": sa.RMSNorm(), "precision": precision, "activation": "relu"}
        ff = sa.FeedForward(weights, sa.quantize(w.T, groups=1), b, **options)
        x = normal(130, depth)
        hidden = np.maximum(linear(sa.rms_norm(x)), 0)
        second = sa.Linear(sa.quantize(w.T), precision=precision if columns % 4 == 0 else "highest")
        for rows in (1, 130):
            assert np.allclose(ff(x[:rows], residual=x[:rows]), second(hidden)[:rows] + x[:rows], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_rows_that_are_zero_or_not_finite(isa: str, normal: Any, precision: Any) -> None:
    linear = sa.Linear(sa.quantize(normal(20, 30)), precision=precision)
    x = normal(5, 20)
    x[1], x[2, 3], x[3, 19] = 0, np.nan, -np.inf
    y = linear(x)
    assert np.array_equal(y[[0, 4]], linear(x[[0, 4]]))
    assert np.isfinite(y[[0, 4]]).all()
    assert not y[1].any()
    assert np.isnan(y[2]).all()
    assert not np.isfinite(y[3]).any()


def test_groups_that_are_not_whole_cells(isa: str, normal: Any) -> None:
    """Such codes, and a gate with such codes, are multiplied as floats."""
    odd, even = sa.quantize(normal(12, 9), groups=2), sa.quantize(normal(12, 9), groups=3)
    x = normal(7, 12)
    for w, gate in ((odd, None), (odd, even), (even, odd)):
        best = sa.Linear(w, w_gate=gate)(x)
        assert np.array_equal(sa.Linear(w, w_gate=gate, precision="medium")(x), best)


@pytest.mark.one_isa
def test_pickles_of_the_first_version(normal: Any) -> None:
    linear = sa.Linear(normal(4, 3), normal(3))
    load, (_, *parts) = linear.__reduce__()
    assert np.array_equal(load(1, *parts[:-1])(np.ones(4, np.float32)), linear(np.ones(4, np.float32)))
    with pytest.raises(ValueError, match="version 3, but 1 and 2 are known"):
        load(3, *parts)


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
        (
            lambda w: sa.Linear(w, precision="high"),
            ValueError,
            "Linear: precision is 'high', but w does not hold codes",
        ),
        (lambda w: sa.Linear(sa.quantize(w), precision="low"), ValueError, "Linear: precision is 'low'"),
        (
            lambda w: sa.FeedForward(w, w.T, precision="medium"),
            ValueError,
            "FeedForward: precision is 'medium', but w_1",
        ),
        (lambda w: sa.Linear(sa.quantize(w))(w[:, :4]), TypeError, "weights have int8: x must be float32, float16 or"),
    ],
)
def test_refusals(call: Any, exception: Any, message: str) -> None:
    with np.errstate(all="ignore"), pytest.raises(exception, match=message):
        call(np.ones((4, 5)))
