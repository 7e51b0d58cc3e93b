"""One attention call on tensors: its arguments, its results, and its gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .. import _core
from .._arguments import core_options, flag, no_t5_bias, real, window_sides
from .._attention import _DEFAULTS
from .._bias import T5Bias
from .._errors import refusal
from .._gradients import attention_backward
from .._packing import Packed
from .._varlen_gradients import attention_varlen_backward
from ._tensors import as_operand, computed_in, to_array, to_tensor

# The arguments that may have a gradient: the first fields of a Call, named as in `wrt` of attention_backward.
DIFFERENTIABLE = ("q", "k", "v", "bias", "sinks", "alibi_slopes", "t5", "scale")


class Call(NamedTuple):
    """The arguments of the operator, in the order of its schema."""

    q: Any
    k: Any
    v: Any
    bias: Any = None
    sinks: Any = None
    alibi_slopes: Any = None
    t5: Any = None  # the table of the T5Bias
    scale: Any = None
    mask: Any = None
    q_offset: Any = None
    q_lens: Any = None
    kv_lens: Any = None
    kv_starts: Any = None
    prefix_lens: Any = None
    cu_seqlens_q: Any = None  # with these two, q, k and v are packed sequences (total, heads, size)
    cu_seqlens_k: Any = None
    seed: Any = None
    causal: bool = False
    left: int = -1  # the left side of the window; negative: unbounded
    right: int = -1
    chunk: int | None = None
    softcap: float | None = None
    dropout: float = 0.0
    bidirectional: bool = True
    max_distance: int = 128
    layout: str = "bhsd"
    precision: str = "highest"
    num_threads: int | None = None
    residuals: bool = False  # also return what gradients need
    weights: bool = False

    def tensors(self) -> tuple[Any, ...]:
        """Return the fields that are tensors or None."""
        return self[: len(TENSORS)]

    def options(self) -> dict[str, Any]:
        """Return the options of `attention`."""
        options: dict[str, Any] = {name: to_array(x) for name in _ARRAYS if (x := getattr(self, name)) is not None}
        options |= {name: getattr(self, name) for name in _PLAIN}
        if self.left >= 0 or self.right >= 0:
            options["window"] = tuple(None if side < 0 else side for side in (self.left, self.right))
        if self.scale is not None:
            options["scale"] = float(self.scale.detach())
        if self.t5 is not None:
            options["t5"] = T5Bias(to_array(self.t5), self.bidirectional, self.max_distance)
        if self.dropout:
            options["dropout"], options["seed"] = self.dropout, int(self.seed) % (1 << 64)
        return options

    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of out and of the log-sum-exp."""
        first, second = (1, *self.q.shape)[-3:-1]
        width = self.v.shape[-1]
        if max(x.ndim for x in self[:3]) == 2:
            return (second, width), (second,)
        fronts = [x.shape[:-3] for x in self[:3]]
        front = fronts[0] if fronts[0] == fronts[1] == fronts[2] else torch.broadcast_shapes(*fronts)
        heads, length = (second, first) if self.heads_last(self.q) else (first, second)
        tokens = (length, heads) if self.layout == "bshd" else (heads, length)
        return (*front, *tokens, width), (*front, heads, length)

    @property
    def packed(self) -> bool:
        """Whether q, k and v are packed sequences."""
        return self.cu_seqlens_q is not None

    def heads_last(self, operand: Any) -> bool:
        """Whether the head axis comes after the sequence axis."""
        return self.layout == "bshd" and operand.ndim > 2

    def new_out(self, dtype: torch.dtype) -> Any:
        """Return an uninitialized result; in q's memory order if it has q's shape."""
        shape, _ = self.shapes()
        if shape == tuple(self.q.shape):
            return torch.empty_like(self.q, dtype=dtype)
        return self.q.new_empty(shape, dtype=dtype)


TENSORS = Call._fields[: Call._fields.index("causal")]
# The options that `attention` takes in the same form. The others are scale, t5, dropout, seed and the window.
_SAME = [name for name in Call._fields if name in _DEFAULTS and name not in ("scale", "t5", "dropout", "seed")]
_ARRAYS = tuple(name for name in _SAME if name in TENSORS)
_PLAIN = tuple(name for name in _SAME if name not in TENSORS)


def make_call(q: Any, k: Any, v: Any, **options: Any) -> Call:
    """Return the call with these options of `attention`, some of which may be arrays or numbers instead of tensors."""
    for name in _ARRAYS:
        if options.get(name) is not None:
            options[name] = as_operand("attention", name, options[name])
    if (scale := options.get("scale")) is not None:
        options["scale"] = _scale(scale)
    if (window := options.pop("window", None)) is not None:
        options["left"], options["right"] = window_sides("attention", window)
    options["residuals"] = flag("attention", "return_lse", options.pop("return_lse", False))
    options["weights"] = flag("attention", "return_weights", options.pop("return_weights", False))
    if (t5 := options.pop("t5", None)) is not None:
        if not hasattr(t5, "table"):
            raise no_t5_bias("attention", t5)
        options["bidirectional"], options["max_distance"] = t5.bidirectional, t5.max_distance
        options["t5"] = as_operand("attention", "t5", t5.table)
    return Call(q, k, v, **options)


def _scale(scale: Any) -> Any:
    """Return a tensor with one element."""
    if not isinstance(scale, torch.Tensor):
        number = scale if torch.compiler.is_compiling() else real("attention", "scale", scale)
        return torch.full((), number, dtype=torch.float64)
    if scale.numel() != 1:
        text = f" has shape {tuple(scale.shape)}, but a number, or a tensor with one element, is needed"
        raise refusal(ValueError, "attention", "scale", text)
    if scale.dtype is torch.bool or scale.is_complex():
        raise refusal(TypeError, "attention", "scale", f" has dtype {scale.dtype}, but a real number is needed")
    return scale


def forward(*arguments: Any) -> tuple[Any, Any, Any, Any]:
    """Return out, out in the type of computation, lse in float64, and weights; empty tensors if not needed.

    The second is empty for 32-bit and 64-bit operands, where it would equal out.
    """
    call = Call(*arguments)
    dtype = computed_in(call.q.dtype) if call.residuals else call.q.dtype
    out = call.new_out(dtype)
    done = run(call, to_array(out))
    extras = [to_tensor(x) for x in done[1:]] if isinstance(done, tuple) else []
    lse = extras.pop(0) if call.residuals else _nothing(call)
    weights = extras.pop(0) if call.weights else _nothing(call)
    if dtype is call.q.dtype:
        return out, _nothing(call), lse, weights
    return out.to(call.q.dtype), out, lse, weights


def run(call: Call, out: Any = None) -> Any:
    """Return what the core does: arrays, and a list of weights for packed sequences."""
    given = call.options()
    slopes = given.pop("alibi_slopes", None) if call.packed else None
    options = core_options("attention", **given)
    options.exact = options.return_lse = call.residuals
    options.return_weights = call.weights
    q, k, v = (to_array(x) for x in call[:3])
    if not call.packed:
        return _core.attention(q, k, v, out, options)
    packed = Packed.check("attention", (q, k, v), to_array(call.cu_seqlens_q), to_array(call.cu_seqlens_k))
    inputs = packed.inputs("attention", alibi_slopes=slopes)
    return _core.attention_varlen("attention", inputs, out, options)


def forward_shapes(*arguments: Any) -> tuple[Any, Any, Any, Any]:
    """Return uninitialized results, from which compilers learn the shapes when they trace."""
    call = Call(*arguments)
    dtype, exact = call.q.dtype, computed_in(call.q.dtype)
    _, shape = call.shapes()
    kv_len = call.k.shape[-3 if call.heads_last(call.k) else -2]
    return (
        call.new_out(dtype),
        call.new_out(exact) if call.residuals and exact is not dtype else _nothing(call),
        call.q.new_empty(shape, dtype=torch.float64) if call.residuals else _nothing(call),
        call.q.new_empty((*shape, kv_len), dtype=exact) if call.weights else _nothing(call),
    )


def backward(
    grad_out: Any, grad_lse: Any, grad_weights: Any, out: Any, lse: Any, wanted: Sequence[bool], *arguments: Any
) -> tuple[Any, ...]:
    """Return the gradients of the DIFFERENTIABLE arguments; a gradient that is not wanted is an empty tensor."""
    call = Call(*arguments)
    names = [name for name, want in zip(DIFFERENTIABLE, wanted, strict=True) if want]
    upstream, q, k, v, result, row_lse = (to_array(x) for x in (grad_out, *call[:3], out, lse))
    upstream_lse, upstream_weights = (None if x is None else to_array(x) for x in (grad_lse, grad_weights))
    options = call.options()
    if call.packed:
        del options["layout"]
        bounds = to_array(call.cu_seqlens_q), to_array(call.cu_seqlens_k)
        found = attention_varlen_backward(
            upstream, q, k, v, result, row_lse, *bounds, wrt=names, grad_lse=upstream_lse, **options
        )
    else:
        found = attention_backward(
            upstream, q, k, v, result, row_lse, wrt=names, grad_lse=upstream_lse, grad_weights=upstream_weights,
            **options,
        )  # fmt: skip
    return tuple(
        to_tensor(getattr(found, name)).to(x.dtype).reshape(x.shape) if name in names else _nothing(call)
        for name, x in zip(DIFFERENTIABLE, call, strict=False)
    )


def backward_shapes(
    grad_out: Any, grad_lse: Any, grad_weights: Any, out: Any, lse: Any, wanted: Sequence[bool], *arguments: Any
) -> tuple[Any, ...]:
    """Return uninitialized gradients."""
    call = Call(*arguments)
    return tuple(
        call.q.new_empty(x.shape, dtype=x.dtype) if want else _nothing(call)
        for want, x in zip(wanted, call, strict=False)
    )


def _nothing(call: Call) -> Any:
    return call.q.new_empty(0)
