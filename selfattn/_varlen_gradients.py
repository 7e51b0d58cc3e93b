"""Gradients of attention over packed sequences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _core
from ._arguments import as_array, core_options, flag
from ._backward import Gradients, Vjp, checked_names, computed_in, delivered, score_arguments, sum_to, targets_of
from ._errors import refusal
from ._keywords import clean_signature, refuse_unknown
from ._packing import OWN, Packed, joined
from ._typing import VarlenGradientOptions, VarlenVjpOptions
from ._varlen import attention_varlen

if TYPE_CHECKING:
    from typing_extensions import Unpack

_HINTS = {"q_lens": "cu_seqlens_q", "kv_lens": "cu_seqlens_k"}


@clean_signature(attention_varlen, without=("out", "return_lse", "return_weights"))
def attention_varlen_backward(
    grad_out: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    cu_seqlens_q: ArrayLike | None = None,
    cu_seqlens_k: ArrayLike | None = None,
    *,
    wrt: Sequence[str] = ("q", "k", "v"),
    grad_lse: Any = None,
    into: Gradients | Mapping[str, Any] | None = None,
    accumulate: bool = False,
    **options: Unpack[VarlenGradientOptions],
) -> Gradients:
    """Compute the gradients of `attention_varlen` from its results.

    The gradients of a sequence's q, k, v and bias are bit-identical to the gradients that `attention_backward` computes
    for that sequence alone.

    Parameters
    ----------
    grad_out : array_like, shape of out
        ∂L/∂out, in q's dtype, or float32 for 16-bit q.
    q, k, v, cu_seqlens_q, cu_seqlens_k
        As for `attention_varlen`. If q, k and v are lists, so are the other operands and the gradients of q, k and v.
    out : array_like
        The result of `attention_varlen` for the same arguments. For 16-bit q, `out` may be float32.
    lse : array_like, shape (H, total_q)
        The log-sum-exp that `attention_varlen` returned, in float32 or float64.
    wrt : sequence of str
        Names of the arguments whose gradients are wanted, as for `attention_backward`.
    grad_lse : array_like, shape (H, total_q), optional
        ∂L/∂lse.
    into : Gradients or mapping of names to ndarrays, optional
        Arrays for the gradients, or lists of arrays where the gradient is a list.
    accumulate : bool, default False
        Add to the arrays in `into` instead of overwriting them, as in `attention_backward`.
    **options
        The options of `attention_varlen`, with the values that were passed to it.

    Returns
    -------
    Gradients
        As from `attention_backward`. The gradient of `bias` is a list with an array for each sequence, or None for a
        sequence without a bias. The gradients of `sinks`, `t5`, `scale`, and of `alibi_slopes` that all sequences
        share, are sums over the sequences.

    Raises
    ------
    TypeError, ValueError
        As for `attention_varlen` and `attention_backward`. Nothing has been written.

    Examples
    --------
    >>> import numpy as np
    >>> import selfattn as sa
    >>> rng = np.random.default_rng(0)
    >>> q, k, v, grad_out = rng.standard_normal((4, 10, 2, 8))  # 3 + 7 tokens, 2 heads
    >>> out, lse = sa.attention_varlen(q, k, v, [0, 3, 10], return_lse=True)
    >>> grads = sa.attention_varlen_backward(grad_out, q, k, v, out, lse, [0, 3, 10])
    >>> grads.k.shape
    (10, 2, 8)
    """
    refuse_unknown(attention_varlen_backward, options, _HINTS)
    function = "attention_varlen_backward"
    sequences = _Sequences(function, Packed.check(function, (q, k, v), cu_seqlens_q, cu_seqlens_k), options, wrt)
    given = into._asdict() if isinstance(into, Gradients) else into
    given = _flat(given) if isinstance(given, Mapping) else given
    targets = targets_of(function, given, accumulate, sequences.names())
    sequences.options.exact = bool(accumulate)  # gradients are rounded after they are added
    upstream = sequences.rows("grad_out", grad_out), sequences.columns("grad_lse", grad_lse)
    found = sequences.backward(upstream, sequences.rows("out", out), sequences.columns("lse", lse))
    return sequences.deliver(found, targets, accumulate)


@clean_signature(attention_varlen, without=("out", "return_weights"))
def attention_varlen_vjp(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: ArrayLike | None = None,
    cu_seqlens_k: ArrayLike | None = None,
    *,
    wrt: Sequence[str] = ("q", "k", "v"),
    **options: Unpack[VarlenVjpOptions],
) -> tuple[Any, Vjp]:
    """Compute `attention_varlen` and return a function that computes its gradients.

    Parameters
    ----------
    q, k, v, cu_seqlens_q, cu_seqlens_k
        As for `attention_varlen`. They must not change before `vjp` is called.
    wrt : sequence of str
        As for `attention_varlen_backward`.
    **options
        The options of `attention_varlen`, except ``out`` and ``return_weights``.

    Returns
    -------
    out : ndarray, list or tuple
        What `attention_varlen` returns for these options.
    vjp : callable
        ``vjp(grad_out, grad_lse=None)`` returns the `Gradients`, in the form of `attention_varlen_backward`; it may be
        called several times.

    Raises
    ------
    TypeError, ValueError, MemoryError
        As `attention_varlen`, or `wrt` names an argument that is not given.

    Notes
    -----
    As with `attention_vjp`, the gradients are more accurate than gradients computed from rounded results.

    Examples
    --------
    >>> import numpy as np
    >>> import selfattn as sa
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 10, 2, 8))  # 3 + 7 tokens, 2 heads
    >>> out, vjp = sa.attention_varlen_vjp(q, k, v, [0, 3, 10], causal=True)
    >>> vjp(np.ones_like(out)).v.shape
    (10, 2, 8)
    """
    refuse_unknown(attention_varlen_vjp, options, _HINTS)
    function = "attention_varlen_vjp"
    return_lse = flag(function, "return_lse", options.pop("return_lse", False))
    packed = Packed.check(function, (q, k, v), cu_seqlens_q, cu_seqlens_k)
    sequences = _Sequences(function, packed, options, wrt)
    forward = sequences.options.copy()
    forward.return_lse, forward.exact = True, True
    exact_out, exact_lse = _core.attention_varlen(function, sequences.inputs, None, forward)
    out = packed.split(exact_out.astype(packed.q.dtype, copy=True), packed.queries)

    def vjp(grad_out: Any, grad_lse: Any = None) -> Gradients:
        """Return the gradients, given the gradients of out and lse."""
        upstream = sequences.rows("grad_out", grad_out), sequences.columns("grad_lse", grad_lse)
        return sequences.deliver(sequences.backward(upstream, exact_out, exact_lse), {}, False)

    if not return_lse:
        return out, vjp
    return (out, packed.split(exact_lse.astype(exact_out.dtype), packed.queries, axis=1)), vjp


class _Sequences:
    """The arguments of a forward pass, converted."""

    def __init__(self, function: str, packed: Packed, options: Mapping[str, Any], wrt: Sequence[str]) -> None:
        self.function = function
        self.packed = packed
        self.t5 = options.get("t5")
        self.inputs = packed.inputs(function, **{name: options.get(name) for name in OWN})
        shared = {name: value for name, value in options.items() if name not in OWN}
        self.options = core_options(function, layout="bshd", **shared)
        self.slopes_shape = np.shape(options.get("alibi_slopes", 0.0))
        self.wrt = checked_names(function, wrt, {**dict.fromkeys("qkv", True), **score_arguments(options)})

    @property
    def biases(self) -> list[NDArray[Any] | None]:
        return self.inputs.bias or []

    def names(self) -> tuple[str, ...]:
        """Return the names of all gradients; the entries of a list are named 'name[i]'."""
        names: list[str] = []
        for name in self.wrt:
            if name == "bias":
                names += [f"bias[{i}]" for i, bias in enumerate(self.biases) if bias is not None]
            elif self.packed.lists and name in ("q", "k", "v"):
                names += [f"{name}[{i}]" for i in range(self.packed.number)]
            else:
                names.append(name)
        return tuple(names)

    def rows(self, name: str, value: Any) -> NDArray[Any]:
        """Return an array that has the rows of q, packed."""
        if not self.packed.lists:
            return as_array(self.function, name, value)
        array, starts = joined(self.function, name, self._list(name, value))
        if not np.array_equal(starts, self.packed.queries):
            lengths = np.diff(self.packed.queries)
            raise refusal(
                ValueError, self.function, name, f" has lengths {np.diff(starts)} but ", "q", f" has {lengths}"
            )
        return array

    def _list(self, name: str, value: Any) -> Sequence[Any]:
        if not isinstance(value, (list, tuple)):
            text = f" is of type {type(value).__name__}, but a list is needed, as for "
            raise refusal(TypeError, self.function, name, text, "q", "")
        return value

    def columns(self, name: str, value: Any) -> NDArray[Any] | None:
        """Return an array (H, total_q), packed."""
        if value is None or not self.packed.lists:
            return None if value is None else as_array(self.function, name, value)
        parts = [as_array(self.function, f"{name}[{i}]", x) for i, x in enumerate(self._list(name, value))]
        shapes = [(self.packed.q.shape[1], n) for n in np.diff(self.packed.queries).tolist()]
        if [part.shape for part in parts] != shapes:
            raise refusal(
                ValueError, self.function, name, f" has shapes {[x.shape for x in parts]}, but {shapes} are needed"
            )
        return np.concatenate(parts, axis=1)

    def backward(
        self, upstream: tuple[NDArray[Any], NDArray[Any] | None], out: NDArray[Any], lse: NDArray[Any] | None
    ) -> dict[str, Any]:
        """Return the gradients, not rounded, in the form in which the caller passed the arguments."""
        grad_out, grad_lse = upstream
        found = _core.attention_varlen_backward(
            self.function,
            self.inputs,
            _core.GradientInputs(grad_out=grad_out, out=out, lse=lse, grad_lse=grad_lse),
            self.wrt,
            self.options,
        )
        return {name: self._in_shape(name, value) for name, value in found.items()}

    def _in_shape(self, name: str, found: Any) -> Any:
        if name in ("q", "k", "v"):
            return self.packed.split(found, self.packed.queries if name == "q" else self.packed.keys)
        if name == "bias":
            return [
                None if bias is None else sum_to(array, bias.shape)
                for array, bias in zip(found, self.biases, strict=True)
            ]
        return self._of_numbers(name, found)

    def deliver(self, found: Mapping[str, Any], targets: Mapping[str, Any], accumulate: bool) -> Gradients:
        """Return what `backward` returned in the dtypes of the gradients, in the caller's arrays if there are any."""
        flat = delivered(self.function, _flat(found), self._dtype_of, targets, accumulate)
        return Gradients(**{name: _nested(name, value, flat) for name, value in found.items()})

    def _dtype_of(self, name: str) -> np.dtype[Any]:
        argument, _, index = name.partition("[")
        if argument in ("q", "k", "v"):
            return getattr(self.packed, argument).dtype  # type: ignore[no-any-return]
        if argument == "bias":
            return self.biases[int(index[:-1])].dtype  # type: ignore[union-attr]
        return computed_in(self.packed.q.dtype)

    def _of_numbers(self, name: str, found: list[NDArray[np.float64]]) -> NDArray[np.float64]:
        """Sum what the core returns for each row of queries (sinks, slopes, scale) or each distance (T5's table)."""
        heads = self.packed.q.shape[1]
        if name == "t5":
            total = np.zeros(self.options.distance_bias.shape)  # type: ignore[union-attr]
            for array in found:
                total += array
            return self.t5.gradient(total)  # type: ignore[union-attr, no-any-return]
        if name == "scale":
            return np.asarray(sum((array.sum() for array in found), 0.0))
        per_head = np.array([array.sum(axis=-1) for array in found]).reshape(self.packed.number, heads)
        return sum_to(per_head, self.slopes_shape if name == "alibi_slopes" else self.options.sinks.shape)  # type: ignore[union-attr]


def _flat(named: Mapping[str, Any]) -> dict[str, Any]:
    """Return arrays by name; the arrays of a list are named 'name[i]'."""
    flat: dict[str, Any] = {}
    for name, value in named.items():
        if isinstance(value, (list, tuple)):
            flat |= {f"{name}[{i}]": array for i, array in enumerate(value) if array is not None}
        else:
            flat[name] = value
    return flat


def _nested(name: str, like: Any, flat: Mapping[str, Any]) -> Any:
    """Return an array or a list of arrays from what `_flat` returned."""
    return [flat.get(f"{name}[{i}]") for i in range(len(like))] if isinstance(like, list) else flat[name]
