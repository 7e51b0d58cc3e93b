"""Gradients of a layer from y to x, context, weights and the terms of its attention."""

from __future__ import annotations

import inspect
import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from layer_definition import expected

import selfattn as sa

BATCH, LENGTH, KEYS, D_MODEL, D_CONTEXT, HEADS, KV_HEADS, DIM, VALUE_DIM, D_OUT = 2, 11, 7, 10, 6, 4, 2, 6, 5, 9
WEIGHTS = ("w_q", "w_k", "w_v", "w_o")
BIASES = ("b_q", "b_k", "b_v", "b_o")
DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]


def layer(rng: Any, d_context: int = D_MODEL, kv_heads: int = KV_HEADS) -> dict[str, Any]:
    columns = {"q": HEADS * DIM, "k": kv_heads * DIM, "v": kv_heads * VALUE_DIM, "o": D_OUT}
    depths = {"q": D_MODEL, "k": d_context, "v": d_context, "o": HEADS * VALUE_DIM}
    given = {f"w_{x}": rng.standard_normal((depths[x], n)) / 3 for x, n in columns.items()}
    given |= {f"b_{x}": rng.standard_normal(n) for x, n in columns.items()}
    x = rng.standard_normal((BATCH, LENGTH, D_MODEL))
    return {"x": x, **given, "num_heads": HEADS, "num_kv_heads": kv_heads}


def cross(rng: Any, *batch: int) -> dict[str, Any]:
    return {**layer(rng, D_CONTEXT), "context": rng.standard_normal((*batch, KEYS, D_CONTEXT))}


def cases(rng: Any) -> dict[str, dict[str, Any]]:
    """Calls of a layer by name; each option of attention occurs in at least one."""
    t5 = sa.T5Bias(rng.standard_normal((8, HEADS)), max_distance=20)
    bare = {name: x for name, x in layer(rng).items() if not name.startswith("b_")}
    return {
        "plain": layer(rng),
        "one head per group": layer(rng, kv_heads=HEADS),
        "no biases": bare,
        "no output matrix": {name: x for name, x in bare.items() if name != "w_o"},
        "no batch": {**layer(rng), "x": rng.standard_normal((LENGTH, D_MODEL)), "causal": True},
        "two axes of batch": {**layer(rng), "x": rng.standard_normal((2, 1, LENGTH, D_MODEL))},
        "rope": {**layer(rng), "rope": True, "causal": True},
        "interleaved rope": {
            **layer(rng),
            "rope": sa.RoPE(100.0, interleaved=True),
            "positions": np.arange(LENGTH) * 2,
        },
        "partial rope": {**layer(rng), "rope": sa.RoPE(50.0, 4), "positions": rng.integers(0, 99, (BATCH, LENGTH))},
        "scaled rope": {**layer(rng), "rope": sa.RoPE(inv_freq=[1.0, 0.1, 0.3], attention_scaling=1.3)},
        "coordinates": {
            **layer(rng),
            "rope": sa.RoPE(axes=[0, 1, 1]),
            "positions": rng.integers(0, 99, (2, BATCH, LENGTH)),
        },
        "context": {**cross(rng, BATCH), "rope": True, "positions": np.arange(LENGTH) + 3},
        "shared context": {**cross(rng), "kv_starts": 2},
        "context for a batch": {**cross(rng, 3, 1), "kv_lens": 6, "x": rng.standard_normal((BATCH, LENGTH, D_MODEL))},
        "padding": {**layer(rng), "kv_lens": [8, LENGTH], "causal": True, "rope": True},
        "shorter queries": {**layer(rng), "q_lens": [6, 0], "window": (2, 1)},
        "both lengths": {**layer(rng), "q_lens": [4, 6], "kv_lens": [8, 7], "causal": True},
        "offset": {**layer(rng), "q_offset": [2, -1], "causal": True, "softcap": 1.5},
        "mask": {**layer(rng), "mask": rng.random((BATCH, 1, LENGTH, LENGTH)) < 0.6},
        "bias": {**layer(rng), "bias": rng.standard_normal((HEADS, LENGTH, LENGTH)), "scale": 0.3},
        "slopes": {**layer(rng), "alibi_slopes": rng.random(HEADS), "sinks": rng.standard_normal(HEADS)},
        "t5": {**layer(rng), "t5": t5, "num_threads": 2, "precision": "highest"},
        "chunk": {**layer(rng), "chunk": 4, "causal": True, "sinks": rng.standard_normal(HEADS)},
        "prefix": {**layer(rng), "prefix_lens": [5, 0], "causal": True, "rope": True},
        "dropout": {**layer(rng), "dropout": 0.3, "seed": 11, "causal": True},
    }


NAMES = list(cases(np.random.default_rng(0)))


def names_of(call: dict[str, Any]) -> tuple[str, ...]:
    """Everything in a call that has a gradient."""
    optional = ("context", "bias", "alibi_slopes", "sinks", "t5")
    return ("x", "scale", *(name for name in (*WEIGHTS, *BIASES, *optional) if name in call))


def nudged(call: dict[str, Any], name: str, by: Any) -> dict[str, Any]:
    if name == "t5":
        return {**call, "t5": sa.T5Bias(call["t5"].table + by, max_distance=20)}
    return {**call, name: (DIM**-0.5 if name == "scale" and "scale" not in call else call[name]) + by}


def converted(call: dict[str, Any], dtype: Any) -> dict[str, Any]:
    """Return a call with x, context and weights in a dtype."""
    return {name: x.astype(dtype) if name in ("x", "context", *WEIGHTS, *BIASES) else x for name, x in call.items()}


@pytest.mark.dtypes("float64")
@pytest.mark.parametrize("name", NAMES)
def test_central_differences(isa: str, rng: Any, name: str) -> None:
    call = cases(rng)[name]
    wrt = names_of(call)
    y, vjp = sa.self_attention_vjp(**call, wrt=wrt)
    assert np.allclose(y, sa.self_attention(**call), rtol=1e-13, atol=1e-13)
    grad_y = rng.standard_normal(y.shape)
    found = vjp(grad_y)
    assert tuple(found) == wrt
    for argument in wrt:
        gradient = found[argument]
        given = call["t5"].table if argument == "t5" else call.get(argument, 0.0)
        assert (gradient.shape, gradient.dtype) == (np.shape(given), np.float64)
        step = rng.standard_normal(gradient.shape) * 1e-5
        ends = [np.vdot(grad_y, sa.self_attention(**nudged(call, argument, by))) for by in (step, -step)]
        assert np.isclose((ends[0] - ends[1]) / 2, np.vdot(gradient, step), rtol=1e-5, atol=1e-10), argument


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: x.__name__)
@pytest.mark.parametrize("name", ["rope", "context", "padding", "bias"])
def test_every_dtype(isa: str, rng: Any, name: str, dtype: Any) -> None:
    call = converted(cases(rng)[name], dtype)
    wrt = names_of(call)
    y, vjp = sa.self_attention_vjp(**call, wrt=wrt)
    exact_y, exact_vjp = sa.self_attention_vjp(**converted(call, np.float64), wrt=wrt)
    grad_y = rng.standard_normal(y.shape).astype(dtype)
    found, wanted = vjp(grad_y), exact_vjp(grad_y.astype(np.float64))
    once = {"float16": 2.0**-11, "bfloat16": 2.0**-8}.get(y.dtype.name, 0.0)  # what rounding to the dtype adds
    unit = 1e-14 if dtype == np.float64 else 1e-5
    assert y.dtype == dtype
    assert np.all(abs(y.astype(np.float64) - exact_y) <= unit * 10 + once * abs(exact_y))
    # That of b_k is 0 without rope, and that of the scale a sum of large terms of both signs.
    largest = max(np.max(abs(exact)) for exact in wanted.values())
    for argument, exact in wanted.items():
        numbers = argument in ("scale", "bias")
        expected_dtype = np.float64 if argument == "bias" or dtype == np.float64 else np.float32 if numbers else dtype
        assert found[argument].dtype == expected_dtype, argument
        error = abs(found[argument].astype(np.float64) - exact)
        assert np.all(error <= unit * largest + (0 if numbers else once) * abs(exact)), argument


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: x.__name__)
def test_y_is_that_of_self_attention(isa: str, rng: Any, dtype: Any) -> None:
    call = converted(cases(rng)["padding"], dtype)
    results = sa.self_attention(**call, return_lse=True, return_weights=True)
    again, _ = sa.self_attention_vjp(**call, return_lse=True, return_weights=True)
    tolerance = {"float16": 0.02, "bfloat16": 0.2, "float32": 1e-5}.get(np.dtype(dtype).name, 1e-13)
    for one, other in zip(results, again, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        finite = np.isfinite(one.astype(np.float64))
        assert np.allclose(one[finite].astype(float), other[finite].astype(float), rtol=tolerance, atol=tolerance)


@pytest.mark.one_isa
def test_every_option_occurs() -> None:
    occurring = set().union(*cases(np.random.default_rng(0)).values())
    elsewhere = {"wrt", "q_norm", "k_norm", "return_lse", "return_weights"}
    assert set(inspect.signature(sa.self_attention_vjp).parameters) - elsewhere <= occurring


@pytest.mark.dtypes("float64")
def test_dropout_by_definition(isa: str, rng: Any) -> None:
    """Central differences of the layer's definition, whose factors of dropout are those of `reference`."""
    options: dict[str, Any] = {"dropout": 0.4, "seed": 2**63 + 5, "window": (4, 1), "q_offset": 0}
    call = layer(rng)
    y, vjp = sa.self_attention_vjp(**call, **options, wrt=("x", *WEIGHTS, *BIASES))
    grad_y = rng.standard_normal(y.shape)

    def loss(changed: dict[str, Any]) -> float:
        params = {name: changed[name] for name in (*WEIGHTS, *BIASES)}
        return float(np.vdot(grad_y, expected(changed["x"], params, HEADS, KV_HEADS, **options)[0]))

    for name, gradient in vjp(grad_y).items():
        step = rng.standard_normal(gradient.shape) * 1e-5
        slope = (loss(nudged(call, name, step)) - loss(nudged(call, name, -step))) / 2
        assert np.isclose(slope, np.vdot(gradient, step), rtol=1e-5, atol=1e-10), name


@pytest.mark.dtypes("float64")
def test_gradients_of_lse_and_weights(isa: str, rng: Any) -> None:
    call = {**layer(rng), "rope": True}
    results, vjp = sa.self_attention_vjp(**call, wrt=("x", "w_k"), return_lse=True, return_weights=True)
    upstream = [rng.standard_normal(x.shape) for x in results]
    found = vjp(*upstream)

    def loss(**changed: Any) -> float:
        again = sa.self_attention(**{**call, **changed}, return_lse=True, return_weights=True)
        return float(sum(np.vdot(a, b) for a, b in zip(upstream, again, strict=True)))

    for name, gradient in found.items():
        step = rng.standard_normal(gradient.shape) * 1e-5
        slope = (loss(**{name: call[name] + step}) - loss(**{name: call[name] - step})) / 2
        assert np.isclose(slope, np.vdot(gradient, step), rtol=1e-5)


@pytest.mark.dtypes("float32")
@pytest.mark.parametrize("anything", [np.nan, np.inf, 1e30])
def test_padding_may_hold_anything(isa: str, rng: Any, anything: float) -> None:
    call = converted({**cases(rng)["padding"], "kv_lens": [8, 5]}, np.float32)
    padding = np.arange(LENGTH) >= np.array([[8], [5]])
    grad_y = rng.standard_normal((BATCH, LENGTH, D_OUT)).astype(np.float32)
    wrt = ("x", *WEIGHTS, *BIASES, "scale")
    results = []
    for value in (0.0, anything):
        call["x"][padding] = value
        _, vjp = sa.self_attention_vjp(**call, wrt=wrt)
        results.append(vjp(grad_y))
    for name in wrt:
        assert np.allclose(results[0][name], results[1][name], rtol=1e-5, atol=1e-4), name
    assert not results[1]["x"][padding].any()


@pytest.mark.dtypes("float64")
def test_operands_may_have_any_strides(isa: str, rng: Any) -> None:
    call = layer(rng)
    y, vjp = sa.self_attention_vjp(**call)
    strided = {name: np.repeat(x, 2, axis=-1)[..., ::2] if np.ndim(x) else x for name, x in call.items()}
    again, other_vjp = sa.self_attention_vjp(**strided)
    assert np.allclose(y, again, rtol=1e-13, atol=1e-13)
    grad_y = rng.standard_normal((*y.shape[:-1], 2 * D_OUT))[..., ::2]
    found, wanted = other_vjp(grad_y), vjp(grad_y.copy())
    for name in ("x", *WEIGHTS):
        assert np.allclose(found[name], wanted[name], rtol=1e-12, atol=1e-12)
    assert sorted(found) == sorted(("x", *WEIGHTS))


@pytest.mark.dtypes("float64")
@pytest.mark.parametrize("shape", [(0, D_MODEL), (0, LENGTH, D_MODEL), (2, 0, D_MODEL)])
def test_nothing_at_all(isa: str, rng: Any, shape: Any) -> None:
    call = {**layer(rng), "x": np.zeros(shape), "rope": True}
    y, vjp = sa.self_attention_vjp(**call, wrt=("x", *WEIGHTS, *BIASES))
    found = vjp(np.zeros(y.shape))
    assert y.shape == (*shape[:-1], D_OUT)
    assert all(found[name].shape == call[name].shape and not found[name].any() for name in found)


@pytest.mark.dtypes("float64")
def test_only_what_is_wanted(isa: str, rng: Any) -> None:
    call = {name: x for name, x in layer(rng).items() if name not in ("w_o", "b_o")}
    y, vjp = sa.self_attention_vjp(**call)
    assert list(vjp(y)) == ["x", "w_q", "w_k", "w_v"]
    y, vjp = sa.self_attention_vjp(**layer(rng), wrt=["b_o"])
    assert np.allclose(vjp(y)["b_o"], y.sum(axis=(0, 1)))
    assert sa.self_attention_vjp(**layer(rng), wrt=())[1](y) == {}


@pytest.mark.one_isa
@pytest.mark.parametrize(
    ("changed", "exception", "message"),
    [
        ({"wrt": "x"}, TypeError, "wrt is 'x', but a sequence of names is needed"),
        ({"wrt": ("q",)}, ValueError, "wrt names 'q', but it must be one of 'x', 'w_q', "),
        ({"wrt": [{}]}, ValueError, "wrt names {}, but it must be one of 'x', 'w_q', "),
        ({"wrt": ("context",)}, ValueError, "wrt names 'context', but there is no context"),
        ({"wrt": ("b_k",), "b_k": None}, ValueError, "wrt names 'b_k', but there is no b_k"),
        ({"wrt": ("sinks",)}, ValueError, "wrt names 'sinks', but there is no sinks"),
        ({"x": np.zeros(D_MODEL)}, ValueError, "x has shape (10,) but needs 2 dimensions or more: (..., S, d_model)"),
        ({"x": np.zeros((3, 9))}, ValueError, "x has d_model 9 but the weights have 10 rows"),
        (
            {"x": np.zeros((3, D_MODEL), np.float32)},
            TypeError,
            "x has dtype float32, but w_q has float64: they must agree, convert one with .astype",
        ),
        ({"context": np.zeros(6)}, ValueError, "context has shape (6,) but needs 2 dimensions or more"),
        ({"context": np.zeros((3, 6))}, ValueError, "context has d_model 6 but the weights have 10 rows"),
        ({"context": np.zeros((3, 4, D_MODEL))}, ValueError, "the leading dimensions (3,) of k do not broadcast"),
        ({"num_heads": 5}, ValueError, "num_heads 5 is not a multiple of num_kv_heads 2"),
        ({"w_k": np.zeros((D_MODEL, 7))}, ValueError, "w_k has 7 columns, but 2 KV heads of head_dim 6 (from w_q)"),
        ({"positions": np.arange(LENGTH)}, ValueError, "positions is given, but the layer has no rope"),
        ({"positions": [1, 2], "rope": True}, ValueError, "positions has shape (2,), which does not broadcast to"),
        ({"rope": sa.RoPE(rotary_dim=8)}, ValueError, "rope rotates 8 elements, but head_dim is 6"),
        ({"kv_lens": [12, 3]}, ValueError, "kv_lens holds 12, which is outside 0..11 (the length of k)"),
        ({"mask": np.ones((5, 11, 11), bool)}, ValueError, "mask has shape (5, 11, 11), which does not broadcast to"),
        ({"return_lse": 1}, TypeError, "return_lse is 1, but True or False is needed"),
        ({"layout": "bshd"}, TypeError, "unexpected keyword argument 'layout'"),
        ({"num_head": 4}, TypeError, "unexpected keyword argument 'num_head' (did you mean 'num_heads'?)"),
    ],
)
def test_errors(rng: Any, changed: dict[str, Any], exception: type[Exception], message: str) -> None:
    with pytest.raises(exception, match="^self_attention_vjp: " + re.escape(message)):
        sa.self_attention_vjp(**{**layer(rng), **changed})


@pytest.mark.one_isa
def test_keys_of_x_need_weights_for_x(rng: Any) -> None:
    with pytest.raises(ValueError, match=r"^self_attention_vjp: x has d_model 10 but w_k has 6 rows: without context "):
        sa.self_attention_vjp(**layer(rng, D_CONTEXT))


@pytest.mark.one_isa
@pytest.mark.parametrize(
    ("grad_y", "exception", "message"),
    [
        (np.zeros((2, 11, 8)), ValueError, "grad_y has shape (2, 11, 8) but (2, 11, 9) is needed"),
        (np.zeros((2, 11, 9), np.float32), TypeError, "grad_y has dtype float32, but float64 is needed"),
    ],
)
def test_errors_of_vjp(rng: Any, grad_y: Any, exception: type[Exception], message: str) -> None:
    _, vjp = sa.self_attention_vjp(**layer(rng))
    with pytest.raises(exception, match="^self_attention_vjp: " + re.escape(message)):
        vjp(grad_y)
    _, vjp = sa.self_attention_vjp(**converted(layer(rng), np.float16))
    with pytest.raises(TypeError, match=r"^self_attention_vjp: grad_y has dtype float64, but float16 or float32 is"):
        vjp(np.zeros((2, 11, 9)))
