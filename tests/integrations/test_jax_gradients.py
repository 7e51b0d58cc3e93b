"""Gradients of JAX's attention function, computed by selfattn."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from jax_operands import (
    HEADS,
    KEYS,
    OPTIONS,
    ROWS,
    assert_bits,
    assert_close,
    attend,
    each_option,
    float64,
    jax,
    jnp,
    lengths,
    mask,
    normal,
    qkv,
    some_options,
    theirs,
    to_core,
)

import selfattn as sa
from selfattn.integrations import _jax_calls, _jax_formula


def split(options: Any) -> tuple[Any, Any]:
    return options.get("bias"), {name: value for name, value in options.items() if name != "bias"}


def gradients(function: Any, operands: Any, options: Any, grad_out: Any) -> Any:
    """Return the gradients for query, key, value and, if there is one, bias."""
    bias, fixed = split(options)
    given = operands if bias is None else (*operands, bias)
    out, vjp = jax.vjp(lambda *x: function(*x, **fixed), *given)
    return vjp(grad_out.astype(out.dtype))


@some_options
def test_options_as_in_jax(name: str) -> None:
    options = OPTIONS[name]

    def original(q: Any, k: Any, v: Any, bias: Any = None, **fixed: Any) -> Any:
        return theirs(q, k, v, None if bias is None else jnp.broadcast_to(bias, (2, HEADS, ROWS, KEYS)), **fixed)

    operands = qkv()
    found, expected = (gradients(f, operands, options, normal(6, *operands[0].shape)) for f in (attend, original))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert_close(a, b, units=100)


@each_option
@float64()
def test_bits_are_those_of_arrays(dtype: Any, options: Any) -> None:
    operands = qkv(dtype)
    grad_out = normal(6, *operands[0].shape, dtype=dtype)
    found = gradients(attend, operands, options, grad_out)
    wrt = ["q", "k", "v", "bias"][: len(found)]
    _, vjp = sa.attention_vjp(*map(np.asarray, operands), wrt=wrt, **to_core(options))
    expected = vjp(np.asarray(grad_out))
    for name, gradient in zip(wrt, found, strict=True):
        exact = getattr(expected, name)
        if name == "bias":  # sums over heads and batch are in another order
            assert gradient.dtype == exact.dtype
            assert_close(gradient, exact)
        else:
            assert_bits(gradient, exact)


def formula(options: Any) -> Any:
    """Return the plain function for options that JAX's function computes in float32."""
    config = _jax_calls.Config(options.get("scale", 8**-0.5), options.get("is_causal", False), -1, -1)
    fixed = {
        "mask": options.get("mask"),
        "query_lengths": options.get("query_seq_lengths"),
        "key_lengths": options.get("key_value_seq_lengths"),
    }
    return lambda q, k, v, bias=None, **_: _jax_formula.attend(config, _jax_calls.Operands(q, k, v, bias, **fixed))


@float64()
def test_float64() -> None:
    options, operands = OPTIONS["all"], qkv("float64")
    options = {**options, "bias": options["bias"].astype("float64")}
    grad_out = normal(6, *operands[0].shape, dtype="float64")
    exact = jax.jit(lambda *x: gradients(formula(options), x, options, grad_out))(*operands)
    for a, b in zip(gradients(attend, operands, options, grad_out), exact, strict=True):
        assert_close(a, b, units=1e-7)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_gradients_are_rounded_once(dtype: Any) -> None:
    operands = qkv(dtype)
    grad_out = normal(6, *operands[0].shape, dtype=dtype)
    wide = [x.astype("float32") for x in operands]
    for a, b in zip(
        gradients(attend, operands, {}, grad_out), gradients(attend, wide, {}, grad_out.astype("float32")), strict=True
    ):
        unit = 2.0**-9 if dtype == "bfloat16" else 2.0**-12
        assert np.all(abs(np.asarray(a, np.float64) - np.asarray(b)) <= 2 * unit * abs(np.asarray(b)).max())


def test_narrow_operands_with_a_wide_bias() -> None:
    operands, options = qkv("bfloat16"), OPTIONS["bias of rows"]
    found = gradients(attend, operands, options, normal(6, *operands[0].shape))
    assert [x.dtype.name for x in found] == ["bfloat16"] * 3 + ["float32"]


def loss(*operands: Any, **options: Any) -> Any:
    return (attend(*operands, **options) ** 2).sum()


def test_value_and_grad_under_jit() -> None:
    operands = qkv()
    plain = jax.value_and_grad(loss, (0, 1, 2))(*operands)
    compiled = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*operands)
    jax.tree.map(lambda a, b: assert_close(a, b, units=4), compiled, plain)  # JAX's own sum may differ
    jax.tree.map(assert_bits, jax.jit(jax.grad(loss, (0, 1, 2)))(*operands), plain[1])


def program(function: Any, *operands: Any) -> str:
    return str(jax.jit(function).lower(*operands).as_text())


@pytest.mark.parametrize(("wanted", "bits"), [((0,), 1), ((1,), 2), ((0, 1, 2), 7), ((3,), 8), ((0, 3), 9)])
def test_only_wanted_gradients_are_computed(wanted: Any, bits: int) -> None:
    operands = *qkv(), OPTIONS["bias"]["bias"]
    text = program(jax.grad(loss, wanted), *operands)
    assert re.findall(r"wrt = (\d+)", text) == [str(bits)]
    assert "wrt" not in program(loss, *operands)
    stopped = jax.grad(lambda q, *rest: loss(q, *map(jax.lax.stop_gradient, rest)), 0)
    assert re.findall(r"wrt = (\d+)", program(stopped, *operands)) == ["1"]


def test_wanted_gradients_of_a_traced_function_may_change() -> None:
    operands = qkv()
    expected = jax.grad(loss, (0, 1, 2))(*operands)
    for i in range(3):
        assert_bits(jax.grad(loss, i)(*operands), expected[i])
        jax.tree.map(assert_bits, jax.grad(loss, (0, 1, 2))(*operands), expected)


@pytest.mark.parametrize("mapped", [(0, 0, 0, 0), (0, None, None, None), (None, 0, 0, None), (None, None, None, 0)])
@pytest.mark.parametrize("shape", [(1, HEADS, ROWS, KEYS), (2, 1, 1, KEYS), (1, HEADS, ROWS, 1), (1, 1, 1, 1)])
def test_vmap_of_grad(mapped: Any, shape: Any) -> None:
    operands = *qkv(), normal(5, *shape)
    stacked = [x if axis is None else jnp.stack([x, 2 * x, -x]) for axis, x in zip(mapped, operands, strict=True)]
    gradient = jax.grad(loss, (0, 1, 2, 3))
    found = jax.vmap(gradient, mapped)(*stacked)
    for i in range(3):
        expected = gradient(*(x if axis is None else x[i] for axis, x in zip(mapped, stacked, strict=True)))
        for a, b in zip(found, expected, strict=True):
            assert_bits(a[i], b)


def test_grad_of_vmap() -> None:
    q, k, v = qkv()
    found = jax.grad(lambda k: jax.vmap(lambda q: loss(q, k, v))(jnp.stack([q, -q])).sum())(k)
    assert_close(found, sum(jax.grad(loss, 1)(x, k, v) for x in (q, -q)))


def test_scan_and_checkpoint() -> None:
    q, k, v = qkv()
    keys, values = jnp.stack([k, -k]), jnp.stack([v, 2 * v])

    def scanned(q: Any, keys: Any, values: Any, step: Any) -> Any:
        return (jax.lax.scan(lambda x, layer: (step(x, *layer), None), q, (keys, values))[0] ** 2).sum()

    def unrolled(q: Any, keys: Any, values: Any) -> Any:
        return (attend(attend(q, keys[0], values[0]), keys[1], values[1]) ** 2).sum()

    expected = jax.grad(unrolled, (0, 1, 2))(q, keys, values)
    for step in (attend, jax.checkpoint(attend)):
        jax.tree.map(
            assert_bits, jax.jit(jax.grad(scanned, (0, 1, 2)), static_argnums=3)(q, keys, values, step), expected
        )


def test_rows_without_keys_and_hidden_keys_have_gradient_zero() -> None:
    q, k, v = qkv()
    k, v = (x.at[1, 3:].set(jnp.nan) for x in (k, v))
    dq, dk, dv = jax.grad(lambda *x: attend(*x, key_value_seq_lengths=lengths(0, 3)).sum(), (0, 1, 2))(q, k, v)
    assert not dq[0].any()
    assert not dk[0].any()
    assert not dk[1, 3:].any()
    assert not dv[1, 3:].any()
    assert dv[1, :3].all()


@float64()
def test_second_derivatives() -> None:
    options = OPTIONS["all"]
    bias, fixed = split(options)
    given = *qkv("float64"), bias.astype("float64")
    wrt = 0, 1, 2, 3

    def second(function: Any) -> Any:
        def slope(*x: Any) -> Any:
            first = jax.grad(lambda *y: (function(*y, **fixed) ** 3).sum(), wrt)(*x)
            return sum((g**2).sum() for g in first)

        return jax.jit(jax.grad(slope, wrt))(*given)

    for a, b in zip(second(attend), second(formula(options)), strict=True):
        assert_close(a, b, units=1e-6)


def test_second_derivatives_of_narrow_operands_have_their_type() -> None:
    def slope(q: Any, *rest: Any) -> Any:
        return (jax.grad(loss)(q, *rest).astype("float32") ** 2).sum()

    assert jax.eval_shape(jax.grad(slope), *qkv("bfloat16")).dtype == jnp.bfloat16


def test_forward_mode_is_refused() -> None:
    q, k, v = qkv()
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda q: attend(q, k, v), (q,), (q,))


def test_masks_and_lengths_may_be_traced() -> None:
    q, k, v = qkv()
    kept, numbers = mask(2, 1, ROWS, KEYS), lengths(3, 5)

    def call(q: Any, mask: Any, numbers: Any) -> Any:
        return loss(q, k, v, mask=mask, key_value_seq_lengths=numbers)

    assert_bits(jax.jit(jax.grad(call))(q, kept, numbers), jax.grad(call)(q, kept, numbers))
