"""Attention and its gradients as operations of JAX: calls of the core's handlers, and how they are differentiated."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import _core
from . import _jax_formula
from ._versions import check_version

# The names of the handlers in XLA. On another platform, XLA's error says that it has no handler of this name.
_FORWARD, _BACKWARD = "selfattn_attention_for_cpus", "selfattn_attention_backward_for_cpus"


class Config(NamedTuple):
    """The options that are fixed when the function is traced."""

    scale: float
    causal: bool
    left: int  # -1: no window
    right: int

    def attributes(self, **flags: int) -> dict[str, Any]:
        """Return the attributes of a call of a handler."""
        integers = {"causal": self.causal, "left": self.left, "right": self.right, **flags}
        return {"scale": np.float64(self.scale), **{name: np.int64(value) for name, value in integers.items()}}


class Operands(NamedTuple):
    """Arrays with all axes: (B, T, N, H), (B, S, K, H), scores with four axes, lengths with one. None: absent."""

    query: Any
    key: Any
    value: Any
    bias: Any = None
    mask: Any = None
    query_lengths: Any = None
    key_lengths: Any = None


DIFFERENTIABLE = tuple(_core.XLA_WANTED)


def _for(operands: Operands, gradients: dict[str, Any]) -> Operands:
    """Return the gradients of the operands: zeros, which take no memory, where none is given."""
    zeros = {
        name: jax.custom_derivatives.zero_from_primal(x, symbolic_zeros=True)
        for name in DIFFERENTIABLE
        if (x := getattr(operands, name)) is not None
    }
    return Operands(**{**dict.fromkeys(Operands._fields), **zeros, **gradients})


# Three functions have custom gradients, so that second derivatives work: `attend`, which users call; `_keep`, which
# also returns what the gradients need; and `_gradients`.


def _attend_function(config: Config, operands: Operands) -> Any:
    query = operands.query
    return _call(_FORWARD, jax.ShapeDtypeStruct(query.shape, query.dtype), config, operands)


def _attend_forward(config: Config, traced: Any) -> Any:
    operands, wanted = _untraced(traced)
    out, lse = _keep(config, operands)
    return out.astype(operands.query.dtype), (operands, out, lse, wanted)


def _attend_backward(config: Config, kept: Any, grad_out: Any) -> tuple[Operands]:
    operands, out, lse, wanted = kept
    wrt = tuple(name for name, bit in _core.XLA_WANTED.items() if wanted.shape[0] & bit)
    if not wrt or isinstance(grad_out, jax.custom_derivatives.SymbolicZero):
        return (_for(operands, {}),)
    gradients = _gradients((config, wrt), grad_out, operands, out, lse)
    return (_for(operands, dict(zip(wrt, gradients, strict=True))),)


def _keep_function(config: Config, operands: Operands) -> Any:
    """Return attention in the type of computation, and the bits of each row's log-sum-exp in float64."""
    query = operands.query
    batch, rows, heads, _ = query.shape
    results = (
        jax.ShapeDtypeStruct(query.shape, _computed_in(query.dtype)),
        jax.ShapeDtypeStruct((batch, heads, rows, 2), jnp.uint32),
    )
    return _call(_FORWARD, results, config, operands)


def _keep_forward(config: Config, traced: Any) -> Any:
    operands, wanted = _untraced(traced)
    out, lse = _keep(config, operands)
    return (out, lse), (operands, out, lse, wanted)


def _keep_backward(config: Config, kept: Any, grads: Any) -> tuple[Operands]:
    return _attend_backward(config, kept, grads[0])


def _gradients_function(static: Any, grad_out: Any, operands: Operands, out: Any, lse: Any) -> tuple[Any, ...]:
    config, wrt = static
    arrays = [getattr(operands, name) for name in wrt]
    computed = _computed_in(operands.query.dtype)
    results = tuple(
        jax.ShapeDtypeStruct(array.shape, computed if name == "bias" else array.dtype)
        for name, array in zip(wrt, arrays, strict=True)
    )
    found = _call(_BACKWARD, results, config, operands, (grad_out,), (out, lse), wrt=_bits(_core.XLA_WANTED, wrt))
    return tuple(gradient.astype(array.dtype) for gradient, array in zip(found, arrays, strict=True))


def _gradients_forward(static: Any, grad_out: Any, operands: Operands, out: Any, lse: Any) -> Any:
    return _gradients(static, grad_out, operands, out, lse), (grad_out, operands)


def _gradients_backward(static: Any, kept: Any, grads: Any) -> Any:
    config, wrt = static
    grad_out, operands = kept
    names = tuple(name for name in DIFFERENTIABLE if getattr(operands, name) is not None)

    def plain(grad_out: Any, *arrays: Any) -> Any:
        changed = operands._replace(**dict(zip(names, arrays, strict=True)))
        return _jax_formula.gradients(config, changed, grad_out, wrt)

    _, vjp = jax.vjp(plain, grad_out, *(getattr(operands, name) for name in names))
    grad_grad_out, *found = vjp(tuple(grads))
    # None for out and the log-sum-exps: the gradients of the operands already include what goes through them.
    return grad_grad_out, _for(operands, dict(zip(names, found, strict=True))), None, None


def _untraced(traced: Any) -> tuple[Operands, Any]:
    """Return the operands, and which gradients are wanted, encoded as the length of an array without elements.

    A compiled function may be differentiated for one argument, then for another. JAX keeps the shapes for each case,
    but keeps only once how the values that backward rules get and return are nested.
    """
    operands = Operands(*(x if x is None else x.value for x in traced))
    wanted = [name for name in DIFFERENTIABLE if (x := getattr(traced, name)) is not None and x.perturbed]
    return operands, jnp.zeros((_bits(_core.XLA_WANTED, wanted), 0), bool)


def _computed_in(dtype: Any) -> Any:
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def _bits(bits: dict[str, int], names: Iterable[str]) -> int:
    return sum(bits[name] for name in names)


def _call(
    target: str,
    results: Any,
    config: Config,
    operands: Operands,
    before: tuple[Any, ...] = (),
    between: tuple[Any, ...] = (),
    **flags: int,
) -> Any:
    """Call a handler of csrc/bindings/xla.cpp."""
    given = {name: array for name in _core.XLA_GIVEN if (array := getattr(operands, name)) is not None}
    heads = (operands.query, operands.key, operands.value)
    attributes = config.attributes(given=_bits(_core.XLA_GIVEN, given), **flags)
    call = jax.ffi.ffi_call(target, results, vmap_method="expand_dims")  # unmapped arrays are not repeated
    return call(*before, *heads, *between, *given.values(), **attributes)


def _with_gradient(function: Any, forward: Any, backward: Any, *, symbolic_zeros: bool) -> Any:
    differentiable = jax.custom_vjp(function, nondiff_argnums=(0,))
    differentiable.defvjp(forward, backward, symbolic_zeros=symbolic_zeros)
    return jax.jit(differentiable, static_argnums=0)


check_version(jax)
for _target, _handler in ((_FORWARD, _core.xla_attention), (_BACKWARD, _core.xla_attention_backward)):
    jax.ffi.register_ffi_target(_target, _handler, platform="cpu")
attend = _with_gradient(_attend_function, _attend_forward, _attend_backward, symbolic_zeros=True)
_keep = _with_gradient(_keep_function, _keep_forward, _keep_backward, symbolic_zeros=True)
_gradients = _with_gradient(_gradients_function, _gradients_forward, _gradients_backward, symbolic_zeros=False)
