"""Bad weights and bad calls of Linear and FeedForward."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import selfattn as sa

pytestmark = pytest.mark.one_isa

W = np.zeros((4, 6), np.float32)


@pytest.mark.parametrize(
    ("call", "exception", "message"),
    [
        (lambda: sa.Linear(W[0]), ValueError, r"Linear: w has shape \(6,\), but a matrix is needed"),
        (lambda: sa.Linear(W[:0]), ValueError, r"Linear: w has shape \(0, 6\), but a matrix is needed"),
        (lambda: sa.Linear(W.astype(int)), TypeError, "Linear: w has dtype int64, but float16, bfloat16"),
        (lambda: sa.Linear(W, np.zeros(6)), TypeError, "Linear: b has dtype float64 but w has float32"),
        (lambda: sa.Linear(W, W[0, :5]), ValueError, r"Linear: b has shape \(5,\) but w has 6 columns"),
        (lambda: sa.Linear(W, activation="tanh"), ValueError, "Linear: activation is 'tanh', but it must be one of"),
        (lambda: sa.Linear(W, w_gate=W.astype(float)), TypeError, "Linear: w_gate has dtype float64 but w has"),
        (lambda: sa.Linear(W, w_gate=W[:, 1:]), ValueError, r"Linear: w_gate has shape \(4, 5\) but w has \(4, 6\)"),
        (lambda: sa.Linear(W, b_gate=W[0]), ValueError, "Linear: b_gate is given without w_gate"),
        (lambda: sa.FeedForward(W, W), ValueError, "FeedForward: w_2 has 4 rows but w_1 has 6 columns"),
        (lambda: sa.FeedForward(W, W.T.astype(float)), TypeError, "FeedForward: w_2 has dtype float64 but w_1 has"),
        (lambda: sa.FeedForward(W, W.T, b_2=W[0]), ValueError, r"FeedForward: b_2 has shape \(6,\) but w_2 has 4"),
        (lambda: sa.FeedForward(W, W.T, b_gate=W[0]), ValueError, "FeedForward: b_gate is given without w_gate"),
        (lambda: sa.FeedForward(W, W.T, norm=1), TypeError, "FeedForward: norm is a int, but a LayerNorm or an RMS"),
        (lambda: sa.FeedForward(W, W.T, post_norm=sa.RMSNorm(W[0])), ValueError, "post_norm is of 6 numbers, but"),
        (lambda: sa.FeedForward(W, W.T, act="relu"), TypeError, "FeedForward: unexpected keyword argument 'act'"),
    ],
)
def test_bad_weights(call: Any, exception: Any, message: str) -> None:
    with pytest.raises(exception, match=message):
        call()


@pytest.mark.parametrize("layer", [sa.Linear(W), sa.FeedForward(W, W.T)], ids=["Linear", "FeedForward"])
def test_bad_calls(layer: Any) -> None:
    name, d_out = type(layer).__name__, layer.d_out
    x = np.zeros((3, 4), np.float32)

    def refuses(exception: Any, message: str, *args: Any, **options: Any) -> None:
        with pytest.raises(exception, match=f"{name}: {message}"):
            layer(*args, **options)

    refuses(ValueError, "x has 3 columns, but 4 are needed", x[:, :3])
    refuses(ValueError, r"x has shape \(\), but", np.float32(1))
    refuses(TypeError, "x has dtype float64 but the weights have float32", x.astype(float))
    refuses(TypeError, "x has dtype float16 but the weights have float32", x.astype(np.float16))
    refuses(ValueError, "residual has shape", x, residual=x[:1])
    refuses(TypeError, "residual has dtype float64", x, residual=np.zeros((3, d_out)))
    refuses(ValueError, "out has shape", x, out=x[:1])
    refuses(TypeError, "out has dtype float64", x, out=np.zeros((3, d_out)))
    refuses(TypeError, "out is a list", x, out=[0])
    frozen = np.zeros((3, d_out), np.float32)
    frozen.flags.writeable = False
    refuses(ValueError, "out is read-only", x, out=frozen)
    refuses(ValueError, "num_threads is 0", x, num_threads=0)
    with pytest.raises(AttributeError, match=f"{name} is immutable"):
        layer.d_in = 3


def test_weights_of_one_narrow_type_refuse_the_other() -> None:
    layer = sa.Linear(W.astype(ml_dtypes.bfloat16))
    with pytest.raises(
        TypeError, match="x has dtype float16 but the weights have bfloat16: x must have their dtype or"
    ):
        layer(np.zeros((2, 4), np.float16))
