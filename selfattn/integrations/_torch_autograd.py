"""Attention as a differentiable function of PyTorch: directly in eager mode, as an operator elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, get_type_hints

import torch

from ._tensors import forward_mode_refusal, is_plain, is_transformed, no_tangents, wants_gradient
from ._torch_call import DIFFERENTIABLE, TENSORS, Call, backward, backward_shapes, forward, forward_shapes
from ._torch_dense import dense_attention
from ._torch_vmap import map_backward, map_forward

_COUNT = len(DIFFERENTIABLE)
_UPSTREAM = 3  # the gradients of out, lse and weights are the first arguments of the backward operator
_BEFORE_CALL = 6  # and these are followed by out, lse, and which gradients are wanted
_UPSTREAM_NAMES = ("grad_out", "grad_lse", "grad_weights", "out", "lse", "wanted")


def attend(call: Call) -> tuple[Any, Any, Any]:
    """Return out, lse (in float64) and weights; the last two are empty if the call does not ask for them."""
    tensors = call.tensors()
    _FORWARD.check(*call)
    records = wants_gradient(*tensors)
    if records:
        call = Call(*call[:-2], True, call.weights)  # the compiler of PyTorch 2.5 does not know _replace
    out, _, lse, weights = _FORWARD.run(tensors, records)(*call)
    return out, lse, weights


class _Forms(NamedTuple):
    """One computation, in each of the forms that PyTorch needs."""

    kernel: Callable[..., Any]
    operator: Any
    function: Any
    transformed: Any
    names: tuple[str, ...]  # of the arguments

    def check(self, *arguments: Any) -> None:
        """Raise if an argument has a tangent."""
        no_tangents("attention", **dict(zip(self.names, arguments, strict=True)))

    def refuse(self, *tangents: Any) -> Any:
        """Raise for the first tangent."""
        raise forward_mode_refusal(
            "attention", next(name for name, x in zip(self.names, tangents, strict=True) if x is not None)
        )

    def run(self, tensors: tuple[Any, ...], records: bool) -> Callable[..., Any]:
        """Return the fastest form that works for these tensors; it depends on whether gradients are recorded."""
        if is_plain(*tensors):
            return self.function.apply if records else self.kernel
        if is_transformed():
            return self.transformed.apply  # type: ignore[no-any-return]
        return self.operator  # type: ignore[no-any-return]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    out, exact, lse, weights = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(exact, *([] if Call(*inputs).weights else [weights]))
    _save(ctx, (*inputs, exact if exact.ndim == out.ndim else out, lse))


def _save(ctx: Any, values: tuple[Any, ...]) -> None:
    """Save tensors where PyTorch can move or recompute them, and other values in the context."""
    ctx.others = [None if isinstance(x, torch.Tensor) else x for x in values]
    ctx.places = [i for i, x in enumerate(values) if isinstance(x, torch.Tensor)]
    ctx.save_for_backward(*(values[i] for i in ctx.places))


def _saved(ctx: Any) -> list[Any]:
    values = list(ctx.others)
    for i, tensor in zip(ctx.places, ctx.saved_tensors, strict=True):
        values[i] = tensor
    return values


def _pull_back(ctx: Any, grad_out: Any, _: Any, grad_lse: Any, grad_weights: Any) -> tuple[Any, ...]:
    *arguments, out, lse = _saved(ctx)
    call = Call(*arguments)
    if not call.residuals:
        raise RuntimeError("selfattn::sdpa: residuals is False, but gradients need them")
    if grad_lse is None and grad_weights is None and grad_out is None:
        return (None,) * len(call)
    if grad_out is None:
        grad_out = torch.zeros_like(out, dtype=call.q.dtype)
    wanted = list(ctx.needs_input_grad[:_COUNT])
    tensors = (grad_out, grad_lse, grad_weights, out, lse, *call.tensors())
    every = grad_out, grad_lse, grad_weights, out, lse, wanted, *call
    _BACKWARD.check(*every)
    found = _BACKWARD.run(tensors, wants_gradient(*tensors))(*every)
    gradients = (x if want else None for x, want in zip(found, wanted, strict=True))
    return (*gradients, *[None] * (len(call) - _COUNT))


def _keep_all(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    ctx.set_materialize_grads(False)
    _save(ctx, inputs)


def _pull_back_twice(ctx: Any, *upstream: Any) -> tuple[Any, ...]:
    """Differentiate the gradients. They also depend on out and lse, which count as functions of the arguments."""
    values = _saved(ctx)
    wanted = [i for i in range(_COUNT) if values[_BEFORE_CALL - 1][i] and upstream[i] is not None]
    variables = [
        i
        for i in (*range(_UPSTREAM), *range(_BEFORE_CALL, _BEFORE_CALL + _COUNT))
        if values[i] is not None and ctx.needs_input_grad[i]
    ]

    def gradients(*given: Any) -> Any:
        replaced = dict(zip(variables, given, strict=True))
        every = [replaced.get(i, x) for i, x in enumerate(values)]
        call = Call(*every[_BEFORE_CALL:])
        used = [i for i in range(_UPSTREAM) if every[i] is not None]

        def results(*chosen: Any) -> Any:
            fields = {Call._fields[i]: x for i, x in zip(wanted, chosen, strict=True)}
            found = dense_attention(call._replace(**fields))
            return tuple(found[i].to(every[i].dtype) for i in used)

        _, vjp = torch.func.vjp(results, *(call[i] for i in wanted))
        return vjp(tuple(every[i] for i in used))

    found: list[Any] = [None] * len(values)
    if wanted and variables:
        _, vjp = torch.func.vjp(gradients, *(values[i] for i in variables))
        for i, gradient in zip(variables, vjp(tuple(upstream[i] for i in wanted)), strict=True):
            found[i] = gradient
    return tuple(found)


_SCHEMA_TYPES = {bool: "bool", int: "int", int | None: "int?", float: "float", float | None: "float?", str: "str"}
_OTHERS = [f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in get_type_hints(Call).items() if name not in TENSORS]
_ARGUMENTS = ", ".join(
    ["Tensor query", "Tensor key", "Tensor value", *(f"Tensor? {name}" for name in TENSORS[3:]), *_OTHERS]
)


def _operator(name: str, compute: Any, shapes: Any, schema: str) -> Any:
    made = torch.library.custom_op(f"selfattn::{name}", compute, mutates_args=(), device_types="cpu", schema=schema)
    made.register_fake(shapes)
    return made


def _forms(
    operator: Any, kernel: Callable[..., Any], keep: Any, pull_back: Any, fold: Any, before: tuple[str, ...] = ()
) -> _Forms:
    """Make an operator differentiable and return it with functions of the same kind.

    `before` are the names of the arguments before the call's.
    """

    def below(*arguments: Any) -> Any:
        """Compute at the level below the transformation that was applied last."""
        forms.check(*arguments)
        tensors = tuple(x for x in arguments if isinstance(x, torch.Tensor))
        return forms.run(tensors, records=False)(*arguments)

    members = {
        "setup_context": staticmethod(keep),
        "backward": staticmethod(pull_back),
        "jvp": staticmethod(lambda ctx, *tangents: forms.refuse(*tangents)),
    }
    function = type("Selfattn", (torch.autograd.Function,), {"forward": staticmethod(kernel), **members})
    transformed: Any = type("SelfattnTransformed", (torch.autograd.Function,), members)
    transformed.forward = staticmethod(below)
    transformed.vmap = staticmethod(lambda *arguments: fold(transformed.apply, *arguments))
    forms = _Forms(kernel, operator, function, transformed, (*before, *Call._fields))
    operator.register_autograd(pull_back, setup_context=keep)
    operator.register_vmap(partial(fold, operator))
    return forms


operator = _operator("sdpa", forward, forward_shapes, f"({_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)")
backward_operator = _operator(
    "sdpa_backward",
    backward,
    backward_shapes,
    "(Tensor grad_out, Tensor? grad_lse, Tensor? grad_weights, Tensor out, Tensor lse, bool[] wanted, "
    f"{_ARGUMENTS}) -> ({', '.join(['Tensor'] * _COUNT)})",
)
_FORWARD = _forms(operator, forward, _keep, _pull_back, map_forward)
_BACKWARD = _forms(backward_operator, backward, _keep_all, _pull_back_twice, map_backward, _UPSTREAM_NAMES)
