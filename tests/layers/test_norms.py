"""layer_norm and rms_norm against float64, and what they refuse."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import selfattn as sa

DTYPES = [np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
UNIT = {"float32": 2.0**-24, "float64": 2.0**-53, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def exact(x: Any, weight: Any, bias: Any, eps: float, centred: bool) -> Any:
    x = x.astype(np.longdouble)
    if centred:
        x = x - x.mean(axis=-1, keepdims=True)
    y = x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + eps)
    y = y if weight is None else y * weight.astype(np.longdouble)
    return y if bias is None else y + bias.astype(np.longdouble)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_the_definition(isa: str, normal: Any, dtype: Any) -> None:
    for count in (1, 2, 7, 15, 16, 17, 31, 33, 63, 64, 65, 129, 768, 4100):
        weight, bias = normal(2, count, dtype=dtype)
        for offset in (0, 30):  # a mean far from 0 must not cost accuracy
            x = (normal(3, count) + offset).astype(dtype)
            for vectors in ((None, None), (weight, None), (weight, bias)):
                wanted = exact(x, *vectors, 1e-5, True)
                found = sa.layer_norm(x, *vectors)
                limit = UNIT[dtype.name] * (1 + abs(wanted))
                # The error of x - mean is a few units of x, which matters where x varies little.
                spread = np.sqrt(np.var(x.astype(float), axis=-1, keepdims=True) + 1e-5)
                limit = limit + 8 * (2.0**-53 if dtype == np.float64 else 2.0**-24) * (3 + abs(offset)) / spread * 4
                assert found.dtype == dtype
                assert np.all(abs(found.astype(np.longdouble) - wanted) <= 8 * limit)
            wanted = exact(x, weight, None, 1e-6, False)
            found = sa.rms_norm(x, weight)
            # Sums are chains of count / 4 lanes numbers.
            units = 8 + count / 128
            assert np.all(abs(found.astype(np.longdouble) - wanted) <= units * UNIT[dtype.name] * (1e-3 + abs(wanted)))


def test_mean_of_large_numbers(normal: Any) -> None:
    x = (normal(4, 1000, dtype=np.float64) + 1e4).astype(np.float32)
    # Numbers near 1e4 are spaced by 1e-3, but they are exact, and so is their distance from the mean.
    assert np.max(abs(sa.layer_norm(x) - exact(x, None, None, 1e-5, True))) <= 2e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_residual_out_and_threads(isa: str, normal: Any, dtype: Any) -> None:
    x, residual = normal(5, 40, 33, dtype=dtype), normal(5, 40, 33, dtype=dtype)
    weight = normal(33, dtype=dtype)
    for norm in (sa.layer_norm, sa.rms_norm):
        y = norm(x, weight, residual=residual)
        summed = x.astype(np.float64) + residual.astype(np.float64)
        near = norm(summed, weight.astype(np.float64))
        assert np.max(abs(y.astype(np.float64) - near)) <= 8 * UNIT[dtype.name] * (1 + abs(near).max())
        assert np.array_equal(norm(x[3, 7], weight, residual=residual[3, 7]), y[3, 7])
        for a in (np.asfortranarray(x), np.repeat(x, 2, axis=-1)[..., ::2], x[:, ::-1].copy()[:, ::-1]):
            assert np.array_equal(norm(a, weight, residual=residual), y)
            assert np.array_equal(norm(residual, weight, residual=a), y)
        for out in (np.empty_like(x), np.empty_like(x)[::-1], np.asfortranarray(x)):
            assert norm(x, weight, residual=residual, out=out) is out
            assert np.array_equal(out, y)
        for which in (0, 1):
            held = [x.copy(), residual.copy()]
            norm(held[0], weight, residual=held[1], out=held[which])
            assert np.array_equal(held[which], y)
        shifted = np.concatenate([x.ravel(), x.ravel()[:33]])
        norm(shifted[:-33].reshape(x.shape), weight, residual=residual, out=shifted[33:].reshape(x.shape))
        assert np.array_equal(shifted[33:].reshape(x.shape), y)


def test_values_that_are_not_finite(normal: Any) -> None:
    x = normal(3, 20)
    x[1, 4] = np.nan
    y = sa.layer_norm(x)
    assert np.isnan(y[1]).all()
    assert np.array_equal(y[::2], sa.layer_norm(x[::2]))


@pytest.mark.one_isa
@pytest.mark.parametrize(
    ("call", "exception", "message"),
    [
        (lambda x: sa.layer_norm(1.0), ValueError, r"layer_norm: x has shape \(\), but rows are needed"),
        (lambda x: sa.layer_norm(x.astype(int)), TypeError, "layer_norm: x has dtype int64, but float16, bfloat16"),
        (lambda x: sa.layer_norm(x, np.ones(3)), ValueError, r"layer_norm: weight has shape \(3,\), but \(4,\)"),
        (lambda x: sa.rms_norm(x, np.ones(4, int)), TypeError, "rms_norm: weight has dtype int64"),
        (lambda x: sa.layer_norm(x, bias=np.ones((1, 4))), ValueError, r"layer_norm: bias has shape \(1, 4\)"),
        (lambda x: sa.rms_norm(x, eps=-1.0), ValueError, "rms_norm: eps is -1.0, but it must be at least 0"),
        (lambda x: sa.rms_norm(x, eps="1"), TypeError, "rms_norm: eps is '1', but a real number is needed"),
        (lambda x: sa.rms_norm(x, residual=x[:1]), ValueError, r"residual has shape \(1, 4\) but the result has \(2,"),
        (lambda x: sa.rms_norm(x, residual=x.astype(float)), TypeError, "residual has dtype float64, but x has float"),
        (lambda x: sa.rms_norm(x, out=np.empty((2, 4))), TypeError, "rms_norm: out has dtype float64"),
        (lambda x: sa.rms_norm(x, out=x[:1]), ValueError, r"rms_norm: out has shape \(1, 4\)"),
        (lambda x: sa.layer_norm(x, epsilon=1.0), TypeError, "unexpected keyword argument 'epsilon'"),
        (lambda x: sa.LayerNorm(np.ones(4), np.ones(3)), ValueError, r"bias has shape \(3,\) but weight has \(4,\)"),
    ],
)
def test_refusals(call: Any, exception: Any, message: str) -> None:
    with pytest.raises(exception, match=message):
        call(np.ones((2, 4), np.float32))
