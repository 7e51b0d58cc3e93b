"""JAX's attention function, computed by selfattn inside JAX's compiled programs on CPUs."""

from __future__ import annotations

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from .._arguments import ACCEPTED, flag, is_float, real
from ..compat._checks import equal_dtypes
from ..compat._jax import (
    check_implementation,
    check_lengths,
    check_operands,
    check_score_operand,
    window_sides,
)
from ._jax_calls import DIFFERENTIABLE, Config, Operands, attend

__all__ = ["dot_product_attention"]

_NAME = "dot_product_attention"


def dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: Literal["xla"] | None = None,
) -> jax.Array:
    """Compute ``jax.nn.dot_product_attention`` on JAX's CPU backend, also under `jax.jit`, `jax.grad` and `jax.vmap`.

    Parameters
    ----------
    query : array, shape (B, T, N, H) or (T, N, H)
    key : array, shape (B, S, K, H) or (S, K, H)
    value : array, shape (B, S, K, H) or (S, K, H)
        All in one dtype: float32, float16, bfloat16 or float64. K divides N.
    bias : array, broadcasting to (B, N, T, S), optional
        Added to the scores; any of these dtypes.
    mask : array of bool, broadcasting to (B, N, T, S), optional
        True = attend.
    scale : float, optional
        Default ``1 / sqrt(H)``. A number, not a traced value.
    is_causal : bool, default False
        Query i sees the keys up to i (top-left alignment).
    query_seq_lengths, key_value_seq_lengths : array (B,) of int32 or int64, optional
        Number of valid queries and keys of each batch entry.
    local_window_size : int or (left, right), optional
        Number of keys that a query sees on each side of its own position; a single number applies to both sides.
    implementation : {None, "xla"}
        Ignored.

    Returns
    -------
    Array, of query's shape
        In query's dtype.

    Raises
    ------
    TypeError, ValueError
        When the function is traced: wrong types or shapes; arrays that are not on a CPU.
    ValueError, jax.errors.JaxRuntimeError
        When the program runs: a length is negative or too large. The type depends on the thread that runs it.

    Notes
    -----
    Row-major arrays are read and written in place. `selfattn.compat.dot_product_attention` lists the differences from
    JAX's function; there is no ``return_residual``.

    Gradients of query, key, value and bias are fused as well, and computed only if they are needed. For them, the
    forward pass keeps the result in the type of computation and the log-sum-exp of each row in float64, even where JAX
    has no float64. Second derivatives by `jax.grad` are computed in plain JAX, with memory for all scores. They are not
    defined if a hidden key or value is not finite: a NaN or infinity there reaches second derivatives of visible keys
    too, while results and first derivatives ignore it. Forward mode (`jax.jvp`, `jax.hessian`) raises JAX's error for
    functions with a custom gradient: use ``jax.jacrev(jax.jacrev(f))``.

    A call runs on selfattn's threads (`selfattn.set_num_threads`), and cannot be interrupted. Each of XLA's threads
    that calls selfattn keeps a team of its own.

    Examples
    --------
    >>> import jax
    >>> from selfattn.integrations.jax import dot_product_attention
    >>> q = k = v = jax.numpy.ones((2, 10, 4, 8))
    >>> jax.jit(dot_product_attention)(q, k, v).shape
    (2, 10, 4, 8)
    >>> jax.grad(lambda q: dot_product_attention(q, k, v, is_causal=True).sum())(q).shape
    (2, 10, 4, 8)
    """
    check_implementation(implementation)
    operands = _operands((query, key, value), bias, mask, query_seq_lengths, key_value_seq_lengths)
    sides = window_sides(local_window_size)
    left, right = (-1, -1) if sides is None else (min(side, (1 << 63) - 1) for side in sides)
    width = operands.query.shape[-1]
    factor = 1 / math.sqrt(width) if scale is None else real(_NAME, "scale", scale)
    config = Config(factor, flag(_NAME, "is_causal", is_causal), left, right)
    return attend(config, operands).reshape(jnp.shape(query))


def _operands(heads: tuple[Any, Any, Any], bias: Any, mask: Any, query_lengths: Any, key_lengths: Any) -> Operands:
    query, key, value = (_array(name, x) for name, x in zip(("query", "key", "value"), heads, strict=True))
    equal_dtypes(_NAME, query=query, key=key, value=value)
    check_operands(query, key, value)
    if query.ndim == 3:
        query, key, value = query[None], key[None], value[None]
    batch, rows, num_heads, width = query.shape
    _, keys, key_heads, key_width = key.shape
    if width == 0:
        raise ValueError(f"{_NAME}: query has head_dim 0, but the softmax scale needs head_dim >= 1")
    if key_width != width:
        raise ValueError(f"{_NAME}: key has head_dim {key_width} but query has {width}")
    if num_heads % key_heads if key_heads else num_heads:
        raise ValueError(
            f"{_NAME}: query has {num_heads} heads, which is not a multiple of the {key_heads} heads of key"
        )
    return Operands(
        query,
        key,
        value,
        _of_scores("bias", bias, (batch, num_heads, rows, keys)),
        _of_scores("mask", mask, (batch, num_heads, rows, keys)),
        _lengths("query_seq_lengths", query_lengths, batch),
        _lengths("key_value_seq_lengths", key_lengths, batch),
    )


def _array(name: str, value: Any) -> Any:
    array = jnp.asarray(value)
    if name in DIFFERENTIABLE and not is_float(array.dtype):
        raise TypeError(f"{_NAME}: {name} has dtype {array.dtype}, but {ACCEPTED}")
    if not isinstance(array, jax.core.Tracer):
        _check_place(name, array)
    return array


def _check_place(name: str, array: Any) -> None:
    for device in array.devices():
        if device.platform != "cpu":
            raise ValueError(f"{_NAME}: {name} is on device {device}, but only JAX's CPU backend is supported")


def _of_scores(name: str, value: Any, shape: tuple[int, ...]) -> Any:
    if value is None:
        return None
    array = _array(name, value)
    check_score_operand(name, array, shape)
    return array.reshape((1,) * (4 - array.ndim) + array.shape)


def _lengths(name: str, value: Any, batch: int) -> Any:
    if value is None:
        return None
    array = _array(name, value)
    if array.dtype not in (jnp.int32, jnp.int64):
        raise TypeError(f"{_NAME}: {name} has dtype {array.dtype}, but int32 or int64 is needed")
    check_lengths(name, array, batch)
    return array
