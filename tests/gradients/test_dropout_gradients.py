"""Gradients under dropout, against their formulas in float64 with the mask of the definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import selfattn as sa
from selfattn import reference

RATE, SEED = 0.3, 0xFEDCBA9876543210
DROP: dict[str, Any] = {"dropout": RATE, "seed": SEED}


def exact_gradients(q: Any, k: Any, v: Any, upstream: Any, **options: Any) -> dict[str, Any]:
    """Return the gradients for those of out, lse and weights; q, k and v have the axes (batch, heads, length, size)."""
    d_out, d_lse, d_weights = upstream
    q, k, v, d_out = (np.asarray(x, np.float64) for x in (q, k, v, d_out))
    result = reference.attention(q, k, v, **options)
    group = q.shape[1] // k.shape[1]
    keys, values = np.repeat(k, group, 1), np.repeat(v, group, 1)
    scale = options.get("scale") or q.shape[-1] ** -0.5
    factors = reference.dropout_factors(result.weights.shape, options["dropout"], options["seed"])
    # Weights before dropout, from those of a call without.
    plain = {name: x for name, x in options.items() if name not in DROP}
    probs = reference.attention(q, k, v, **plain).weights
    d_probs = (d_out @ values.swapaxes(-1, -2) + d_weights) * factors
    delta = (probs * d_probs).sum(-1) - d_lse
    d_scores = probs * (d_probs - delta[..., None])
    bent = d_scores
    if (cap := options.get("softcap")) is not None:
        bent = d_scores * (1 - np.tanh(scale * (q @ keys.swapaxes(-1, -2)) / cap) ** 2)

    def of_kv_heads(x: Any) -> Any:
        return x.reshape(x.shape[0], -1, group, *x.shape[2:]).sum(2)

    found = {
        "q": scale * bent @ keys,
        "k": of_kv_heads(scale * bent.swapaxes(-1, -2) @ q),
        "v": of_kv_heads((probs * factors).swapaxes(-1, -2) @ d_out),
        "scale": (bent * (q @ keys.swapaxes(-1, -2))).sum(),
        "scale's size": abs(bent * (q @ keys.swapaxes(-1, -2))).sum(),  # its terms cancel
        "bias": d_scores,
    }
    if "sinks" in options:
        of_sink = np.exp(np.asarray(options["sinks"])[:, None] - result.lse)
        found["sinks"] = -(of_sink * delta).sum((0, 2))
    return found


def operands(rng: Any, dtype: str, q_len: int, kv_len: int) -> tuple[list[Any], Any]:
    shapes = ((2, 4, q_len, 9), (2, 2, kv_len, 9), (2, 2, kv_len, 5), (2, 4, q_len, 5))
    q, k, v, d_out = (rng.standard_normal(shape).astype(dtype) for shape in shapes)
    return [q, k, v], d_out


def close(found: Any, exact: dict[str, Any], name: str, dtype: str) -> None:
    tolerance = {"float64": 1e-13, "float32": 2e-5, "float16": 2e-3, "bfloat16": 1.5e-2}[dtype]
    size = np.abs(exact.get(f"{name}'s size", exact[name])).max()
    assert found.shape == exact[name].shape
    assert np.abs(np.asarray(found, np.float64) - exact[name]).max() <= tolerance * max(size, 1)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (30, 3)},
    "terms": {"softcap": 2.0, "scale": 0.7, "sinks": np.array([0.0, 1.0, -1.0, 3.0])},
    "mask": {"mask": np.arange(131) % 5 != 1},
}


@pytest.mark.dtypes("float32", "float64", "float16", "bfloat16")
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("name", OPTIONS)
def test_gradients(isa: str, rng: Any, dtype: str, name: str) -> None:
    pytest.importorskip("ml_dtypes")
    options = {**OPTIONS[name], **DROP}
    arrays, d_out = operands(rng, dtype, 61, 131)
    bias = rng.standard_normal((2, 4, 61, 131)).astype(dtype)
    wrt = ("q", "k", "v", "bias", "scale", *(["sinks"] if "sinks" in options else []))
    (out, lse, _), vjp = sa.attention_vjp(*arrays, wrt=wrt, bias=bias, return_lse=True, return_weights=True, **options)
    d_lse, d_weights = rng.standard_normal(lse.shape), rng.standard_normal((2, 4, 61, 131))
    exact = exact_gradients(*arrays, (d_out, d_lse, d_weights), bias=np.asarray(bias, np.float64), **options)
    found = vjp(d_out, grad_lse=d_lse, grad_weights=d_weights)._asdict()
    for argument in wrt:
        close(found[argument], exact, argument, dtype)
    # Stateless: the seed alone brings back the mask.
    only_out = exact_gradients(*arrays, (d_out, 0, 0), bias=np.asarray(bias, np.float64), **options)
    again = sa.attention_backward(d_out, *arrays, out, lse, wrt=wrt, bias=bias, **options)._asdict()
    for argument in wrt:
        close(again[argument], only_out, argument, dtype)


@pytest.mark.parametrize("q_len", [1, 2, 200])
def test_lengths(isa: str, rng: Any, q_len: int) -> None:
    for kv_len in (1, 3, 601):
        arrays, d_out = operands(rng, "float64", q_len, kv_len)
        _, vjp = sa.attention_vjp(*arrays, **DROP)
        exact = exact_gradients(*arrays, (d_out, 0, 0), **DROP)
        for argument, array in vjp(d_out)._asdict().items():
            if array is not None:
                close(array, exact, argument, "float64")


def test_central_differences(rng: Any) -> None:
    (q, k, v), d_out = operands(rng, "float64", 7, 10)
    out, vjp = sa.attention_vjp(q, k, v, causal=True, **DROP)
    gradients = vjp(d_out)
    step = 1e-6
    for name, array in (("q", q), ("k", k), ("v", v)):
        direction = rng.standard_normal(array.shape)
        moved = [
            sa.attention(**{"q": q, "k": k, "v": v, name: array + sign * step * direction}, causal=True, **DROP)
            for sign in (1, -1)
        ]
        expected = ((moved[0] - moved[1]) / (2 * step) * d_out).sum()
        assert abs((getattr(gradients, name) * direction).sum() - expected) < 1e-8
    assert out.shape == d_out.shape


def test_bits_depend_on_nothing_else(isa: str, rng: Any) -> None:
    arrays, d_out = operands(rng, "float32", 200, 700)
    expected = sa.attention_vjp(*arrays, causal=True, num_threads=1, **DROP)[1](d_out)
    for threads in (2, 5):
        found = sa.attention_vjp(*arrays, causal=True, num_threads=threads, **DROP)[1](d_out)
        assert all(np.array_equal(getattr(found, x), getattr(expected, x)) for x in "qkv")
    for x in (*arrays, d_out):
        x[1] = 1  # the other entry
    found = sa.attention_vjp(*arrays, causal=True, **DROP)[1](d_out)
    assert all(np.array_equal(getattr(found, x)[0], getattr(expected, x)[0]) for x in "qkv")


def test_no_dropout_costs_no_bit(isa: str, rng: Any) -> None:
    arrays, d_out = operands(rng, "float32", 30, 40)
    expected, found = (sa.attention_vjp(*arrays, **x)[1](d_out) for x in ({}, {"dropout": 0.0, "seed": 4}))
    assert all(np.array_equal(getattr(found, x), getattr(expected, x)) for x in "qkv")


def test_hidden_keys_stay_inert(isa: str, rng: Any) -> None:
    (q, k, v), d_out = operands(rng, "float32", 50, 61)
    mask = np.arange(61) != 11
    expected = sa.attention_vjp(q, k, v, mask=mask, **DROP)[1](d_out)
    k[:, :, 11], v[:, :, 11] = np.nan, np.inf
    found = sa.attention_vjp(q, k, v, mask=mask, **DROP)[1](d_out)
    assert all(np.array_equal(getattr(found, x), getattr(expected, x)) for x in "qkv")
    assert not found.k[:, :, 11].any()
    assert not found.v[:, :, 11].any()
