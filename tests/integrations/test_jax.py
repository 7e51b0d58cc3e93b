"""JAX's attention function, computed by selfattn inside compiled programs: the same numbers, no copies."""

from __future__ import annotations

import doctest
import inspect
import re
import sys
import threading
from typing import Any

import numpy as np
import pytest
from jax_operands import (
    HEADS,
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
)

import selfattn as sa
from selfattn import compat


@some_options
def test_options_as_in_jax(name: str) -> None:
    options = OPTIONS[name]
    q, k, v = qkv()
    assert_close(attend(q, k, v, **options), theirs(q, k, v, **broadcast(options)))


def broadcast(options: Any) -> Any:
    """Give the bias all heads: JAX's function does not take one head for several groups."""
    if "bias" not in options:
        return options
    return {**options, "bias": jnp.broadcast_to(options["bias"], (2, HEADS, ROWS, 7))}


@each_option
@float64()
def test_bits_are_those_of_arrays(dtype: Any, options: Any) -> None:
    q, k, v = qkv(dtype)
    expected = compat.dot_product_attention(*map(np.asarray, (q, k, v)), **options)
    assert_bits(attend(q, k, v, **options), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_everything_traced(dtype: Any) -> None:
    options = OPTIONS["all"]
    fixed = {name: options[name] for name in ("scale", "is_causal")}
    traced = {name: value for name, value in options.items() if name not in fixed}
    program = jax.jit(lambda q, k, v, traced: attend(q, k, v, **traced, **fixed))
    assert_bits(program(*qkv(dtype), traced), attend(*qkv(dtype), **options))


def test_signature_is_that_of_jax() -> None:
    own, original = (inspect.signature(f).parameters for f in (attend, theirs))
    names = [name for name in original if name != "return_residual"]
    assert list(own) == names
    for name in names:
        assert own[name].kind == original[name].kind
        assert own[name].default == original[name].default


def test_three_dimensions() -> None:
    q, k, v = (x[0] for x in qkv())
    assert_close(attend(q, k, v, key_value_seq_lengths=lengths(3)), theirs(q, k, v, key_value_seq_lengths=lengths(3)))
    assert attend(q, k, v, normal(5, ROWS, 7), mask(7)).shape == q.shape


def test_large_operands_on_all_threads() -> None:
    q, k, v = qkv(rows=300, keys=700, width=64)
    expected = compat.dot_product_attention(*map(np.asarray, (q, k, v)), is_causal=True)
    assert_bits(attend(q, k, v, is_causal=True), expected)


def test_rows_without_keys_give_zeros_and_hidden_keys_are_not_read() -> None:
    q, k, v = qkv()
    k, v = (x.at[1, 3:].set(jnp.nan) for x in (k, v))
    out = attend(q, k, v, key_value_seq_lengths=lengths(0, 3))
    assert not out[0].any()
    assert np.isfinite(out).all()


def test_subnormal_numbers_survive() -> None:
    q, k, v = qkv()
    tiny = v * np.float32(1e-40)
    found = jax.jit(attend)(q, k, tiny)
    assert_bits(found, compat.dot_product_attention(*map(np.asarray, (q, k, tiny))))


@pytest.mark.parametrize(("rows", "keys"), [(0, 7), (9, 0), (0, 0)])
def test_empty_operands(rows: int, keys: int) -> None:
    q, k, v = qkv(rows=rows, keys=keys)
    out, vjp = jax.vjp(attend, q, k, v)
    assert out.shape == q.shape
    assert not out.any()
    for gradient, x in zip(vjp(out), (q, k, v), strict=True):
        assert gradient.shape == x.shape
        assert not gradient.any()


def operations(program: Any, *operands: Any) -> set[str]:
    text = program.lower(*operands).compile().as_text()
    return set(re.findall(r"^\s+(?:ROOT )?%?[\w.-]+ = (?:\([^=]*?\)|\S+) ([\w-]+)\(", text, flags=re.M))


def test_operands_are_not_copied() -> None:
    q, k, v = qkv()
    allowed = {"parameter", "custom-call"}
    assert operations(jax.jit(attend), q, k, v) == allowed
    shared = jax.vmap(attend, (0, None, None, None, None))
    given = jnp.stack([q, q]), k, v, normal(5, 1, 1, ROWS, 7), mask(1, 1, ROWS, 7)
    assert operations(jax.jit(shared), *given) - {"bitcast"} == allowed


@pytest.mark.parametrize("mapped", ["q", "k", "qkv", "bias", "mask", "lengths", "q bias", "all"])
def test_vmap(mapped: str) -> None:
    q, k, v = qkv()
    operands = q, k, v, normal(5, 1, HEADS, 1, 7), mask(2, 1, ROWS, 7), lengths(4, 9), lengths(7, 2)
    names = ["q", "k", "v", "bias", "mask", "lengths", "lengths"]
    chosen = [
        mapped in ("all", name) or name in mapped.split() or (mapped == "qkv" and name in "qkv") for name in names
    ]
    stacked = [jnp.stack([x, x[::-1], x]) if pick else x for pick, x in zip(chosen, operands, strict=True)]

    def call(q: Any, k: Any, v: Any, bias: Any, mask: Any, query_lengths: Any, key_lengths: Any) -> Any:
        return attend(q, k, v, bias, mask, query_seq_lengths=query_lengths, key_value_seq_lengths=key_lengths)

    found = jax.vmap(call, [0 if pick else None for pick in chosen])(*stacked)
    for i in range(3):
        assert_bits(found[i], call(*(x[i] if pick else x for pick, x in zip(chosen, stacked, strict=True))))
    nested = jax.vmap(jax.vmap(call, [0 if pick else None for pick in chosen]), (None,) * 6 + (0,))
    many = jnp.stack([stacked[-1]] * 2)
    assert_bits(nested(*stacked[:-1], many)[1], found)


def test_vmap_over_another_axis() -> None:
    q, k, v = qkv()
    found = jax.vmap(lambda q: attend(q, k, v), in_axes=3, out_axes=1)(jnp.stack([q, -q], axis=3))
    assert_bits(found[:, 1], attend(-q, k, v))


def test_scan_and_loops() -> None:
    q, k, v = qkv()
    stack = jnp.stack([k, -k]), jnp.stack([v, 2 * v])
    out, _ = jax.lax.scan(lambda x, layer: (attend(x, *layer), None), q, stack)
    assert_bits(out, attend(attend(q, k, v), -k, 2 * v))


def test_calls_from_several_threads() -> None:
    q, k, v = qkv(rows=100, keys=120, width=32)
    program = jax.jit(lambda s: attend(q * s, k, v))
    expected = {s: np.asarray(program(float(s))) for s in range(4)}
    wrong = []

    def work(s: int) -> None:
        wrong.extend(s for _ in range(30) if not np.array_equal(program(float(s)), expected[s]))

    threads = [threading.Thread(target=work, args=(s,)) for s in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_bits_do_not_depend_on_threads() -> None:
    q, k, v = qkv(rows=200, keys=300, width=64)

    def both() -> Any:
        return jax.jit(jax.value_and_grad(lambda q: (attend(q, k, v, is_causal=True) ** 2).sum()))(q)

    several = both()
    with threads(1):
        one = both()
    jax.tree.map(assert_bits, one, several)


class threads:
    """Sets the number of threads for a while."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __enter__(self) -> None:
        sa.set_num_threads(self.count)

    def __exit__(self, *_: Any) -> None:
        sa.set_num_threads(None)


def test_docstring_examples() -> None:
    result = doctest.testmod(sys.modules[attend.__module__])
    assert result.attempted > 0
    assert result.failed == 0
