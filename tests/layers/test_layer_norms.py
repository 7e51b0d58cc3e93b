"""Norms and residuals of SelfAttention: two calls make a Transformer layer."""

from __future__ import annotations

import pickle
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import selfattn as sa

TYPES = [np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]


@pytest.fixture
def params(rng: Any) -> Any:
    def make(dtype: Any) -> dict[str, Any]:
        matrices = {f"w_{name}": (rng.standard_normal((24, 24)) / 5).astype(dtype) for name in "qkvo"}
        return matrices | {f"b_{name}": rng.standard_normal(24).astype(dtype) for name in "qkvo"} | {"num_heads": 4}

    return make


def norms(rng: Any, dtype: Any) -> list[Any]:
    weight, bias = rng.standard_normal((2, 24)).astype(dtype)
    return [sa.LayerNorm(weight, bias, eps=1e-3), sa.RMSNorm(weight)]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_layer_is_its_steps(isa: str, rng: Any, params: Any, normal: Any, dtype: Any) -> None:
    options = params(dtype)
    plain = sa.SelfAttention(**options)
    x = normal(2, 37, 24, dtype=dtype)
    context = normal(2, 5, 24, dtype=dtype)
    # Rounding between the steps, which the layer does not.
    steps = {"float16": 2.0**-8, "bfloat16": 2.0**-5}.get(
        dtype.name, 8 * np.finfo(dtype).eps if dtype.itemsize > 2 else 0
    )

    def agree(found: Any, wanted: Any) -> None:
        found, wanted = found.astype(np.float64), wanted.astype(np.float64)
        assert np.all(abs(found - wanted) <= steps * (8 + abs(wanted)))

    for norm in norms(rng, dtype):
        pre = sa.SelfAttention(**options, norm=norm)
        agree(pre(x, residual=x, causal=True), x + plain(norm(x), causal=True))
        agree(pre(x, context=context), plain(norm(x), context=context))
        post = sa.SelfAttention(**options, post_norm=norm)
        agree(post(x, residual=x), norm(plain(x), residual=x))
        agree(post(x), norm(plain(x)))
        both = sa.SelfAttention(**options, norm=norm, post_norm=norm)
        again = pickle.loads(pickle.dumps(both))
        assert np.array_equal(again(x, residual=x), both(x, residual=x))


def test_bits(isa: str, rng: Any, params: Any, normal: Any) -> None:
    for norm in norms(rng, np.float32):
        layer = sa.SelfAttention(**params(np.float32), norm=norm, post_norm=norm)
        x = normal(3, 130, 24)
        y = layer(x, residual=x)
        for threads in (1, 2, 3):
            assert np.array_equal(layer(x, residual=x, num_threads=threads), y)
        assert np.array_equal(layer(x[1:2], residual=x[1:2]), y[1:2])
        assert np.array_equal(layer(np.asfortranarray(x), residual=np.asfortranarray(x)), y)
        held = x.copy()
        assert layer(x, residual=held, out=held) is held
        assert np.array_equal(held, y)
        held = x.copy()
        layer(held, residual=held, out=held)
        assert np.array_equal(held, y)


def test_steps_on_a_cache(params: Any, normal: Any) -> None:
    layer = sa.SelfAttention(**params(np.float32), norm=sa.LayerNorm())
    x = normal(2, 9, 24)
    whole = layer(x, residual=x, causal=True)
    cache = sa.KVCache(2, 4, 6, 16)
    parts = [layer(part, residual=part, cache=cache) for part in (x[:, :4], x[:, 4:5], x[:, 5:])]
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=2e-5)


@pytest.mark.one_isa
@pytest.mark.parametrize(
    ("changed", "exception", "message"),
    [
        ({"norm": "layer"}, TypeError, "norm is a str, but a LayerNorm or an RMSNorm is needed"),
        ({"norm": sa.RMSNorm(np.ones(23))}, ValueError, "norm is of 23 numbers, but rows of 24 are to be normalised"),
        ({"post_norm": sa.LayerNorm(np.ones(2))}, ValueError, "post_norm is of 2 numbers, but rows of 24"),
        ({"w_o": None, "b_o": None, "post_norm": sa.LayerNorm()}, ValueError, "post_norm is given without w_o"),
    ],
)
def test_bad_norms(params: Any, changed: Any, exception: Any, message: str) -> None:
    with pytest.raises(exception, match=f"SelfAttention: {message}"):
        sa.SelfAttention(**{**params(np.float32), **changed})


@pytest.mark.one_isa
def test_bad_residuals(params: Any, normal: Any) -> None:
    options = params(np.float32)
    layer = sa.SelfAttention(**options)
    x = normal(5, 24)
    with pytest.raises(ValueError, match=r"SelfAttention: residual has shape \(4, 24\) but the result has \(5, 24\)"):
        layer(x, residual=x[:4])
    with pytest.raises(TypeError, match="SelfAttention: residual has dtype float64, but x has float32"):
        layer(x, residual=x.astype(float))
    bare = sa.SelfAttention(**{**options, "w_o": None, "b_o": None})
    with pytest.raises(ValueError, match="SelfAttention: residual is given, but the layer has no w_o"):
        bare(x, residual=x)
