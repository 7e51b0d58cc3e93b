"""Linear and FeedForward against the same steps in float64 NumPy; bits; memory; pickles."""

from __future__ import annotations

import math
import pickle
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import selfattn as sa

BFLOAT = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float16), BFLOAT]
ACTIVATIONS = [None, "relu", "gelu", "gelu_tanh", "silu"]
erfc = np.vectorize(math.erfc, otypes=[float])


def activated(x: Any, activation: str | None) -> Any:
    if activation == "relu":
        return np.maximum(x, 0)
    if activation == "gelu":
        return 0.5 * x * erfc(-x / math.sqrt(2))
    if activation == "gelu_tanh":
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    if activation == "silu":
        return x / (1 + np.exp(-x))
    return x


def wide(*arrays: Any) -> Any:
    return [None if a is None else np.asarray(a).astype(np.float64) for a in arrays]


def expected(x: Any, w: Any, b: Any, activation: Any = None, gate: Any = (None, None), residual: Any = None) -> Any:
    x, w, b, w_gate, b_gate, residual = wide(x, w, b, *gate, residual)
    y = x @ w + (0 if b is None else b)
    if w_gate is None:
        y = activated(y, activation)
    else:
        y = activated(x @ w_gate + (0 if b_gate is None else b_gate), activation) * y
    return y if residual is None else y + residual


def close(y: Any, exact: Any, dtype: Any, depth: int, steps: float = 0.0) -> None:
    """The error of chains of `depth` products of numbers around 1, then half an ulp of the result."""
    assert y.dtype == dtype
    assert y.shape == exact.shape
    unit = 2.0**-53 if dtype == np.float64 else 2.0**-24
    half_ulp = {"float16": 2.0**-11, "bfloat16": 2.0**-8}.get(np.dtype(dtype).name, 0.0)
    scale = max(1.0, float(abs(exact).max(initial=0)))
    bound = (8 * math.sqrt(depth) * unit + steps) * scale
    assert np.all(abs(y.astype(np.float64) - exact) <= bound + half_ulp * (abs(exact) + bound))


@pytest.fixture
def weights(rng: Any) -> Any:
    def make(rows: int, columns: int, dtype: Any) -> tuple[Any, Any]:
        w = rng.standard_normal((rows, columns)) / math.sqrt(rows)
        return w.astype(dtype), rng.standard_normal(columns).astype(dtype)

    return make


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_rows_columns_and_depths_around_block_boundaries(
    isa: str, normal: Any, weights: Any, dtype: Any, activation: Any
) -> None:
    for depth, columns in ((1, 1), (2, 3), (31, 47), (33, 48), (64, 49), (17, 200)):
        w, b = weights(depth, columns, dtype)
        linear = sa.Linear(w, b, activation=activation)
        assert (linear.d_in, linear.d_out, linear.dtype, linear.isa) == (depth, columns, dtype, isa)
        for rows in (1, 2, 7, 9, 31, 33, 97, 193):
            x = normal(rows, depth, dtype=dtype)
            close(linear(x), expected(x, w, b, activation), dtype, depth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gate_and_residual(isa: str, normal: Any, weights: Any, dtype: Any) -> None:
    for activation in (None, "gelu", "silu"):
        for depth, columns in ((5, 3), (64, 150)):
            w, b = weights(depth, columns, dtype)
            gate = weights(depth, columns, dtype)
            linear = sa.Linear(w, b, activation=activation, w_gate=gate[0], b_gate=gate[1])
            bare = sa.Linear(w, activation=activation, w_gate=gate[0])
            for leading in ((), (1,), (40,), (2, 3, 7)):
                x, residual = normal(*leading, depth, dtype=dtype), normal(*leading, columns, dtype=dtype)
                close(linear(x, residual=residual), expected(x, w, b, activation, gate, residual), dtype, depth)
                close(bare(x), expected(x, w, None, activation, (gate[0], None)), dtype, depth)


@pytest.mark.parametrize("narrow", [np.dtype(np.float16), BFLOAT], ids=str)
def test_weights_may_have_16_bits_where_x_has_32(isa: str, normal: Any, weights: Any, narrow: Any) -> None:
    for depth, columns in ((1, 5), (33, 49), (64, 200)):
        w, b = weights(depth, columns, narrow)
        linear = sa.Linear(w, b.astype(np.float32), activation="silu")
        ff = sa.FeedForward(w, w.T, b, norm=sa.LayerNorm(np.ones(depth)))
        for rows in (1, 2, 9, 130):
            x = normal(rows, depth)
            y = linear(x)
            close(y, expected(x, w, b, "silu"), np.float32, depth)
            # The result is bit-identical to that of weights that were widened beforehand.
            wider = sa.Linear(w.astype(np.float32), b.astype(np.float32), activation="silu")
            assert np.array_equal(y, wider(x))
            assert ff(x).dtype == np.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_of_a_row(isa: str, normal: Any, weights: Any, dtype: Any) -> None:
    w, b = weights(65, 150, dtype)
    gate = weights(65, 150, dtype)
    w_2, b_2 = weights(150, 65, dtype)
    norm, post = sa.LayerNorm(b[:65], b[65:130]), sa.RMSNorm(b[:65])
    linear = sa.Linear(w, b, activation="gelu")
    ffs = [
        sa.FeedForward(w, w_2, b, b_2, norm=norm),
        sa.FeedForward(w, w_2, b, b_2, w_gate=gate[0], activation="silu", post_norm=post),
    ]
    x = normal(2, 150, 65, dtype=dtype)
    for layer in (linear, *ffs):
        residual = x if layer.d_out == 65 else None
        y = layer(x, residual=residual)
        for threads in (1, 2, 3):
            assert np.array_equal(layer(x, residual=residual, num_threads=threads), y)
        for rows in (1, 2, 5, 16, 97, 149):
            part = None if residual is None else residual[1, -rows:]
            assert np.array_equal(layer(x[1, -rows:], residual=part), y[1, -rows:])
        for strided in (np.asfortranarray(x), x[:, ::-1].copy()[:, ::-1], np.repeat(x, 2, axis=2)[..., ::2]):
            other = None if residual is None else strided
            assert np.array_equal(layer(strided, residual=other), y)
        with ThreadPoolExecutor(4) as pool:
            assert all(np.array_equal(found, y) for found in pool.map(partial(layer, residual=residual), [x] * 8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_x_may_overlap(isa: str, normal: Any, weights: Any, dtype: Any) -> None:
    """The last block of a batch entry may begin with the row with which a longer block of the next one begins."""
    w, _ = weights(40, 30, dtype)
    tokens = normal(164, 40, dtype=dtype)
    x = np.lib.stride_tricks.sliding_window_view(tokens, 100, axis=0)[::64].swapaxes(1, 2)
    for layer in (sa.Linear(w), sa.FeedForward(w, w.T, norm=sa.RMSNorm(np.ones(40, dtype)))):
        for rows in (x, np.broadcast_to(x[:, :1], x.shape)):
            for threads in (1, 2):
                assert np.array_equal(layer(rows, num_threads=threads), layer(rows.copy(), num_threads=1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deep_weights_are_multiplied_by_parts(isa: str, normal: Any, weights: Any, dtype: Any) -> None:
    """Parts of 512: a task takes several panels then, and more rows of an operand that needs no copy."""
    for depth in (512, 513, 1100):
        w, b = weights(depth, 450, dtype)
        plain, active = sa.Linear(w, b), sa.Linear(w, b, activation="relu")
        x = normal(2, 300, depth, dtype=dtype)
        y = plain(x)
        close(y, expected(x, w, b, None), dtype, depth)
        assert np.array_equal(active(x), np.maximum(y, 0))
        assert np.array_equal(plain(np.asfortranarray(x)), y)
        for rows, threads in ((1, 1), (2, 2), (97, 1), (270, 3)):
            assert np.array_equal(plain(x[0, :rows], num_threads=threads), y[0, :rows])
        if dtype in (np.dtype(np.float16), BFLOAT):
            wide = sa.Linear(w.astype(np.float32), b.astype(np.float32))
            assert np.array_equal(plain(x.astype(np.float32)), wide(x.astype(np.float32)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_feed_forward(isa: str, normal: Any, weights: Any, dtype: Any) -> None:
    steps = 2.0**-6 if dtype == BFLOAT else 2.0**-9 if dtype == np.float16 else 0.0
    for d_in, hidden, d_out in ((4, 3, 4), (33, 65, 33), (96, 200, 96)):
        w_1, b_1 = weights(d_in, hidden, dtype)
        w_2, b_2 = weights(hidden, d_out, dtype)
        gate = weights(d_in, hidden, dtype)
        g, s = normal(d_in, dtype=dtype), normal(d_in, dtype=dtype)
        for norm in (None, sa.LayerNorm(g, s), sa.RMSNorm(g)):
            for activation, gated in (("gelu", False), ("silu", True)):
                w_gate, b_gate = gate if gated else (None, None)
                options = {"activation": activation, "w_gate": w_gate, "b_gate": b_gate}
                pre = sa.FeedForward(w_1, w_2, b_1, b_2, norm=norm, **options)
                post = sa.FeedForward(w_1, w_2, b_1, b_2, post_norm=norm, **options)
                for rows in (1, 9, 100, 250):
                    x = normal(rows, d_in, dtype=dtype)
                    z = normalised(x, norm)
                    h = expected(z, w_1, b_1, activation, (w_gate, b_gate))
                    exact = expected(h, w_2, b_2, residual=x)
                    close(pre(x, residual=x), exact, dtype, hidden, 4 * steps)
                    h = expected(x, w_1, b_1, activation, (w_gate, b_gate))
                    exact = normalised(expected(h, w_2, b_2, residual=x), norm)
                    # A norm of few numbers that nearly agree enlarges errors.
                    if d_in > 4:
                        close(post(x, residual=x), exact, dtype, 16 * hidden, 16 * steps)


def normalised(x: Any, norm: Any) -> Any:
    x = x.astype(np.float64)
    if norm is None:
        return x
    weight, bias = wide(norm.weight, norm.bias)
    centred = x - x.mean(axis=-1, keepdims=True) if isinstance(norm, sa.LayerNorm) else x
    y = centred / np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + norm.eps) * weight
    return y if bias is None else y + bias


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_out(normal: Any, weights: Any, dtype: Any) -> None:
    w, b = weights(20, 20, dtype)
    x, residual = normal(3, 50, 20, dtype=dtype), normal(3, 50, 20, dtype=dtype)
    linear = sa.Linear(w, b, activation="gelu")
    ff = sa.FeedForward(w, w, b, b, post_norm=sa.LayerNorm(b))
    for layer in (linear, ff):
        y = layer(x, residual=residual)
        for out in (np.empty_like(x), np.empty_like(x)[:, ::-1], np.asfortranarray(x), x.copy(), residual.copy()):
            assert layer(x, residual=residual, out=out) is out
            assert np.array_equal(out, y)
        for shared in ("x", "residual", "both", "shifted"):
            a, c = x.copy(), residual.copy()
            if shared == "both":
                c, wanted = a, layer(x, residual=x)
            else:
                wanted = y
            out = {"x": a, "residual": c, "both": a}.get(shared)
            if shared == "shifted":
                memory = np.empty(x.size + 20, dtype)
                a = memory[20:].reshape(x.shape)
                a[...] = x
                out = memory[:-20].reshape(x.shape)
            layer(a, residual=c, out=out)
            assert np.array_equal(out, wanted)


def test_copies_and_pickles(normal: Any, weights: Any) -> None:
    for dtype in DTYPES:
        w, b = weights(9, 60, dtype)
        w_2, b_2 = weights(60, 9, dtype)
        x = normal(5, 9, dtype=dtype)
        norm = sa.LayerNorm(b[:9], b[:9], eps=1e-3)
        layers: list[Any] = [
            sa.Linear(w, b, activation="gelu"),
            sa.Linear(w, w_gate=w, b_gate=b),
            sa.FeedForward(w, w_2, b, b_2, norm=norm, post_norm=sa.RMSNorm(b[:9])),
        ]
        for layer in layers:
            again = pickle.loads(pickle.dumps(layer))
            assert np.array_equal(again(x), layer(x))
            assert repr(again) == repr(layer)
        assert pickle.loads(pickle.dumps(norm)).eps == 1e-3


def test_empty(weights: Any) -> None:
    w, b = weights(4, 6, np.float32)
    for shape in ((0, 4), (3, 0, 4)):
        x = np.zeros(shape, np.float32)
        assert sa.Linear(w, b)(x).shape == (*shape[:-1], 6)
        assert sa.FeedForward(w, w.T, post_norm=sa.LayerNorm())(x).shape == shape
        assert sa.layer_norm(x).shape == shape
    assert sa.layer_norm(np.zeros((3, 0))).shape == (3, 0)
