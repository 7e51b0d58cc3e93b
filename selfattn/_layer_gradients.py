"""Gradients of self-attention, from its output to its inputs and weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _core
from ._arguments import as_array, flag, thread_count
from ._attention import ONLY_HERE, attention
from ._backward import Operands, Upstream, checked_names, computed_in, score_arguments
from ._head_norms import HeadNorm, head_norms
from ._keywords import clean_signature, refuse_unknown
from ._layer_rotation import Rotation
from ._norm import LayerNorm, RMSNorm
from ._products import Product, rounded, rows_of
from ._rope import RoPE
from ._typing import Array, LayerVjpOptions
from ._weights import Weights, head_counts

if TYPE_CHECKING:
    from typing_extensions import Unpack

_Heads = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]  # queries, keys and values
LayerVjp = Callable[..., dict[str, Array]]
_NAME = "self_attention_vjp"
_WRT = ("x", "w_q", "w_k", "w_v", "w_o")
_TERMS = ("bias", "sinks", "alibi_slopes", "t5", "scale")  # arguments of attention itself


@clean_signature(attention, without=("layout", "out", *ONLY_HERE))
def self_attention_vjp(
    x: ArrayLike,
    w_q: ArrayLike,
    w_k: ArrayLike,
    w_v: ArrayLike,
    w_o: ArrayLike | None = None,
    *,
    wrt: Sequence[str] = _WRT,
    b_q: ArrayLike | None = None,
    b_k: ArrayLike | None = None,
    b_v: ArrayLike | None = None,
    b_o: ArrayLike | None = None,
    num_heads: int,
    num_kv_heads: int | None = None,
    context: ArrayLike | None = None,
    rope: RoPE | bool | None = None,
    q_norm: LayerNorm | RMSNorm | None = None,
    k_norm: LayerNorm | RMSNorm | None = None,
    positions: ArrayLike | None = None,
    **options: Unpack[LayerVjpOptions],
) -> tuple[Any, LayerVjp]:
    """Compute `self_attention` and return a function that computes its gradients.

    Parameters
    ----------
    x, w_q, w_k, w_v, w_o, b_q, b_k, b_v, b_o, num_heads, num_kv_heads, context, rope, q_norm, k_norm,
    positions
        As for `self_attention`. They must not change before `vjp` is called.
    wrt : sequence of str
        Names of the arguments whose gradients are wanted: x, context, the matrices and their biases, "q_norm.weight",
        "q_norm.bias", "k_norm.weight" and "k_norm.bias", and the options "bias", "sinks", "alibi_slopes", "t5" and
        "scale". The default is x and the matrices that are given.
    **options
        The options of `self_attention`, except ``out``.

    Returns
    -------
    y : ndarray or tuple
        The result of `self_attention` for these options, up to rounding.
    vjp : callable
        ``vjp(grad_y, grad_lse=None, grad_weights=None)`` returns a dict of the gradients by name; it may be called
        several times. Each gradient has the shape and dtype of its argument, except that the gradients of `sinks`,
        `alibi_slopes`, `t5` and `scale` are float64 for float64 x, else float32.

    Raises
    ------
    TypeError, ValueError, MemoryError
        As from `self_attention`; or `wrt` names an argument that is unknown or not given.

    Notes
    -----
    The bits of y and of all gradients depend neither on threads nor on strides. Those of y and of the gradients of x
    and context do not depend on the other entries of the batch either. (A context that several entries share gets the
    sum of their gradients.) 16-bit arguments are converted to float32, and results are rounded once.

    Examples
    --------
    >>> import numpy as np
    >>> import selfattn as sa
    >>> rng = np.random.default_rng(0)
    >>> x, w_q, w_k, w_v, w_o = rng.standard_normal((5, 32, 32))
    >>> y, vjp = sa.self_attention_vjp(x, w_q, w_k, w_v, w_o, num_heads=4, causal=True, rope=True)
    >>> grads = vjp(np.ones_like(y))
    >>> grads["x"].shape, grads["w_o"].shape
    ((32, 32), (32, 32))
    """
    refuse_unknown(self_attention_vjp, options)
    weights = ((w_q, w_k, w_v, w_o), (b_q, b_k, b_v, b_o))
    inputs = {"context": context, "rope": rope, "positions": positions, "q_norm": q_norm, "k_norm": k_norm}
    return differentiable(x, weights, (num_heads, num_kv_heads), wrt, {**inputs, **options})


def differentiable(
    x: Any, weights: Any, counts: tuple[Any, Any], wrt: Sequence[str], options: dict[str, Any], first_head: int = 0
) -> tuple[Any, LayerVjp]:
    """Do what `self_attention_vjp` does; for dropout, the first head counts as head `first_head`."""
    heads, kv_heads = head_counts(_NAME, *counts)
    w = Weights.check(_NAME, weights[0], heads, kv_heads)
    biases = w.biases(_NAME, weights[1])
    context, rope, positions = (options.pop(name, None) for name in ("context", "rope", "positions"))
    head_norm = (options.pop("q_norm", None), options.pop("k_norm", None))
    rotation = Rotation.check(_NAME, rope, positions, w.head_dim)
    norms = head_norms(_NAME, head_norm, (heads, kv_heads), w.head_dim, w.q.dtype)
    named = {"x": x, **{f"w_{letter}": getattr(w, letter) for letter in "qkvo"}}
    named |= {f"b_{letter}": bias for letter, bias in biases.items()} | {"context": context}
    named |= norms["q"].vectors() | norms["k"].vectors() | score_arguments(options)
    names = checked_names(_NAME, _WRT[:-1] if wrt == _WRT and w.o is None else wrt, named)
    queries = as_array(_NAME, "x", x)
    keys = queries if context is None else as_array(_NAME, "context", context)
    _core.check_layer_inputs(_NAME, queries, None if context is None else keys, w.q, w.k)
    threads = thread_count(_NAME, options.get("num_threads"))
    layer = _Layer(names, rotation.placed(queries), norms, context is None, threads)
    layer.first_head = first_head
    q = layer.add("q", queries, w.q, biases["q"], heads)
    k = layer.add("k", keys, w.k, biases["k"], kv_heads)
    v = layer.add("v", keys, w.v, biases["v"], kv_heads)
    return layer.attend((q, k, v), (w.o, biases["o"]), options)


class _Layer:
    """The projections of a call, and what to compute."""

    def __init__(
        self,
        names: tuple[str, ...],
        rotation: Rotation,
        norms: Mapping[str, HeadNorm],
        same_tokens: bool,
        num_threads: int,
    ) -> None:
        self.names = names
        self.num_threads = num_threads
        self.first_head = 0
        self.rotation = rotation
        self.norms = norms
        self.projected: dict[str, NDArray[Any]] = {}  # queries and keys before their norms
        self.same_tokens = same_tokens
        self.products: dict[str, Product] = {}
        # Positions of the tokens of queries and of keys; None means their indices.
        self.positions = {"q": rotation.positions, "k": rotation.positions if same_tokens else None}

    def add(self, letter: str, x: NDArray[Any], w: NDArray[Any], b: NDArray[Any] | None, heads: int) -> NDArray[Any]:
        """Project x to queries, keys or values, and return them as (..., tokens, heads, size)."""
        product = self.products[letter] = Product(letter, x, w, b, self.num_threads)
        result = product.forward()
        result = result.reshape(*result.shape[:-1], heads, result.shape[-1] // heads)
        if letter in self.positions:
            self.projected[letter] = result
            result = self.norms[letter].apply(result)
            self.rotation.apply(result, self.positions[letter], inverse=False)
        return result

    def attend(
        self, operands: _Heads, output: tuple[NDArray[Any] | None, NDArray[Any] | None], options: Any
    ) -> tuple[Any, LayerVjp]:
        """Compute attention and the output projection; return the results and the function for their gradients."""
        lse, weights = (flag(_NAME, f"return_{x}", options.pop(f"return_{x}", False)) for x in ("lse", "weights"))
        dtype = self.products["q"].dtype
        attended = self._operands(operands, options)
        forward = attended.options.copy()
        forward.return_lse, forward.return_weights, forward.exact = True, weights, True
        heads, exact_lse, *rest = _core.attention_for(_NAME, *operands, forward)
        joined = heads.reshape(*heads.shape[:-2], heads.shape[-2] * heads.shape[-1])
        last = None if output[0] is None else Product("o", joined, output[0], output[1], self.num_threads)
        y = joined.copy() if last is None else last.forward()

        def vjp(
            grad_y: ArrayLike, grad_lse: ArrayLike | None = None, grad_weights: ArrayLike | None = None
        ) -> dict[str, Array]:
            """Return the gradients, given the gradients of y, lse and weights."""
            grad = _upstream(grad_y, y.shape, dtype)
            found: dict[str, Array] = {}
            if attended.wrt or grad_lse is not None or grad_weights is not None:  # these are checked in any case
                of_heads = (grad if last is None else last.of_input(grad)).reshape(heads.shape)
                upstream = Upstream(of_heads, grad_lse, grad_weights)
                found |= self._through(attended.rounded(attended.backward(upstream, heads, exact_lse)))
            if last is not None:
                found |= last.of_weights(grad, self.names)
            return {name: found[name] for name in self.names}

        if not (lse or weights):
            return rounded(y, dtype), vjp
        return (rounded(y, dtype), *([exact_lse.astype(heads.dtype)] if lse else []), *rest), vjp

    def _operands(self, operands: _Heads, options: Any) -> Operands:
        if self.same_tokens and options.get("q_offset") is None and options.get("kv_lens") is None:
            options = {**options, "q_offset": 0}  # query i and key i are the same token, even if only q_lens is given
        source = {"q": "x", "k": "x" if self.same_tokens else "context", "v": "x" if self.same_tokens else "context"}
        own = {x: {of, f"w_{x}", f"b_{x}", f"{x}_norm.weight", f"{x}_norm.bias"} for x, of in source.items()}
        wrt = [x for x, names in own.items() if names & set(self.names)]
        wrt += [name for name in self.names if name in _TERMS]
        attended = Operands(_NAME, operands, {**options, "layout": "bshd"}, tuple(wrt))
        attended.options.same_tokens = self.same_tokens
        attended.options.first_head = self.first_head
        return attended

    def _through(self, gradients: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Return the gradients of inputs and weights, given the gradients of queries, keys and values."""
        found: dict[str, NDArray[Any]] = {}
        inputs: dict[str, NDArray[Any]] = {}
        for letter in [letter for letter in "qkv" if letter in gradients]:
            product, heads = self.products[letter], gradients.pop(letter)
            if letter in self.positions:
                self.rotation.apply(heads, self.positions[letter], inverse=True)
                heads, of_norm = self.norms[letter].backward(self.projected[letter], heads, self.names)
                found |= of_norm
            grad = heads.reshape(len(product.rows), product.w.shape[1])
            found |= product.of_weights(grad, self.names)
            name = "x" if letter == "q" or self.same_tokens else "context"
            if name in self.names:
                part = product.of_input(grad)
                inputs[name] = inputs[name] + part if name in inputs else part
        for name, total in inputs.items():
            like = self.products["q" if name == "x" else "k"]
            found[name] = rounded(total.reshape(like.shape), like.dtype)
        return {**found, **gradients}


def _upstream(grad_y: ArrayLike, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return the gradient of y as (rows, columns) in the type of computation."""
    grad = as_array(_NAME, "grad_y", grad_y)
    _core.check_gradient(_NAME, "grad_y", grad, np.broadcast_to(np.empty((), dtype), shape))
    return rows_of(grad, computed_in(dtype))
