"""Attention and its gradients in plain JAX operations, which JAX can differentiate for second derivatives."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def gradients(config: Any, operands: Any, grad_out: Any, wrt: tuple[str, ...]) -> tuple[Any, ...]:
    """Return the gradients for the operands that `wrt` names, each in its operand's dtype."""
    given = tuple(getattr(operands, name) for name in wrt)
    out, vjp = jax.vjp(lambda *values: attend(config, operands._replace(**dict(zip(wrt, values, strict=True)))), *given)
    found: tuple[Any, ...] = vjp(grad_out.astype(out.dtype))
    return found


def attend(config: Any, operands: Any) -> Any:
    """Return attention in the type of computation. Stores all scores."""
    query, key, value = operands.query, operands.key, operands.value
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    batch, rows, heads, width = query.shape
    grouped = query.reshape(batch, rows, key.shape[2], -1, width).astype(dtype)
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, key.astype(dtype), precision="highest") * config.scale
    scores = scores.reshape(batch, heads, rows, -1)
    if operands.bias is not None:
        scores = scores + operands.bias.astype(dtype)
    visible = _visible(config, operands, scores.shape)
    peak = jnp.max(jnp.where(visible, scores, -jnp.inf), axis=-1, keepdims=True, initial=-jnp.inf)
    peak = jax.lax.stop_gradient(jnp.where(jnp.isfinite(peak), peak, 0))
    parts = jnp.exp(jnp.where(visible, scores - peak, -jnp.inf))
    total = jnp.sum(parts, axis=-1, keepdims=True)
    weights = (parts / jnp.where(total == 0, 1, total)).reshape(batch, key.shape[2], -1, rows, key.shape[1])
    out = jnp.einsum("bkgts,bskh->btkgh", weights, value.astype(dtype), precision="highest")
    return out.reshape(query.shape)


def _visible(config: Any, operands: Any, shape: tuple[int, ...]) -> Any:
    row, column = jnp.arange(shape[2])[:, None], jnp.arange(shape[3])
    visible = jnp.ones(shape, bool)
    if operands.mask is not None:
        visible &= operands.mask
    if config.causal:
        visible &= column <= row
    if config.left >= 0:
        visible &= (row - column <= config.left) & (column - row <= config.right)
    if operands.query_lengths is not None:
        visible &= row < operands.query_lengths[:, None, None, None]
    if operands.key_lengths is not None:
        visible &= column < operands.key_lengths[:, None, None, None]
    return visible
