"""Gradients of relative attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _core
from ._backward import Gradients, Operands, Upstream, Vjp
from ._keywords import clean_signature, refuse_unknown
from ._relative import prepare, relative_attention
from ._typing import Array, RelativeGradientOptions, RelativeVjpOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

_ALL = ("q", "k", "v", "r", "u", "w")


@clean_signature(relative_attention, without=("out", "return_lse", "return_weights"))
def relative_attention_backward(
    grad_out: ArrayLike,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    r: ArrayLike,
    u: ArrayLike,
    w: ArrayLike,
    out: ArrayLike,
    lse: ArrayLike,
    *,
    wrt: Sequence[str] = _ALL,
    grad_lse: ArrayLike | None = None,
    grad_weights: ArrayLike | None = None,
    into: Gradients | Mapping[str, Array] | None = None,
    accumulate: bool = False,
    **options: Unpack[RelativeGradientOptions],
) -> Gradients:
    r"""Compute the gradients of `relative_attention` from its results.

    Scores are computed again, one block at a time, and gradients of products are summed by distance without storing
    anything of size S × (mem_len + S).

    Parameters
    ----------
    grad_out : array_like, shape of out
        ∂L/∂out, in q's dtype, or float32 for 16-bit q.
    q, k, v, r, u, w : array_like
        As for `relative_attention`.
    out, lse : array_like
        The results of `relative_attention` for the same arguments, as for `attention_backward`.
    wrt : sequence of str
        Names of the arguments whose gradients are wanted: "r", "u", "w" and the names that `attention_backward`
        accepts.
    grad_lse, grad_weights, into, accumulate
        As for `attention_backward`.
    **options
        The options of `relative_attention`, with the values that were passed to it.

    Returns
    -------
    Gradients
        As from `attention_backward`. The gradient of r has r's shape and dtype. The gradients of u and w have the type
        of computation: float64 for float64 q, else float32.

    Raises
    ------
    TypeError, ValueError
        As for `relative_attention` and `attention_backward`. Nothing has been written.

    Notes
    -----
    With dS as in `attention_backward` and the distance ``t = i + mem_len − j``: ∂u = scale · Σ_ij dS_ij · k_j,
    ∂w = scale · Σ_ij dS_ij · r_t, ∂r_t = scale · Σ dS_ij · (q_i + w) over the pairs with distance t. A row at an end of
    r gets the sum over all distances that use it. For a given instruction set, shape and options, gradients do not
    depend on the number of threads, not even in the last bit.

    Examples
    --------
    >>> import numpy as np
    >>> import selfattn as sa
    >>> rng = np.random.default_rng(0)
    >>> k, v = rng.standard_normal((2, 4, 12, 8))  # 4 heads, a memory of 7 and a segment of 5
    >>> q, r = k[:, 7:], rng.standard_normal((12, 8))
    >>> u, w = rng.standard_normal((2, 4, 8))
    >>> out, lse = sa.relative_attention(q, k, v, r, u, w, mem_len=7, return_lse=True)
    >>> grads = sa.relative_attention_backward(np.ones_like(out), q, k, v, r, u, w, out, lse, mem_len=7)
    >>> grads.r.shape
    (12, 8)
    """
    refuse_unknown(relative_attention_backward, options)
    operands = _RelativeOperands.check("relative_attention_backward", (q, k, v, r, u, w), options, wrt)
    return operands.deliver(Upstream(grad_out, grad_lse, grad_weights), out, lse, into, accumulate)


@clean_signature(relative_attention, without=("out",))
def relative_attention_vjp(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    r: ArrayLike,
    u: ArrayLike,
    w: ArrayLike,
    *,
    wrt: Sequence[str] = _ALL,
    **options: Unpack[RelativeVjpOptions],
) -> tuple[Any, Vjp]:
    """Compute `relative_attention` and return a function that computes its gradients, as `attention_vjp` does.

    Parameters
    ----------
    q, k, v, r, u, w : array_like
        As for `relative_attention`. They must not change before `vjp` is called.
    wrt : sequence of str
        As for `relative_attention_backward`.
    **options
        The options of `relative_attention`, except ``out``.

    Returns
    -------
    out, vjp
        As from `attention_vjp`, with the results of `relative_attention`.

    Raises
    ------
    TypeError, ValueError, MemoryError
        As `relative_attention`, or `wrt` names an argument that is not given.

    Examples
    --------
    >>> import numpy as np
    >>> import selfattn as sa
    >>> rng = np.random.default_rng(0)
    >>> q, k, v, r = rng.standard_normal((4, 4, 10, 8))
    >>> u, w = rng.standard_normal((2, 4, 8))
    >>> out, vjp = sa.relative_attention_vjp(q, k, v, r, u, w)
    >>> vjp(np.ones_like(out)).u.shape
    (4, 8)
    """
    refuse_unknown(relative_attention_vjp, options)
    return _RelativeOperands.check("relative_attention_vjp", (q, k, v, r, u, w), options, wrt).vjp()


class _RelativeOperands(Operands):
    """The arguments of a forward pass of relative attention, converted."""

    always = _ALL

    def convert(self, arrays: Sequence[ArrayLike], options: Mapping[str, Any]) -> None:
        """Set the attributes that hold converted arguments."""
        (self.q, self.k, self.v), self.terms, self.options = prepare(self.function, arrays, **options)

    def forward(self, options: _core.Options) -> Any:
        """Compute the forward pass."""
        return _core.relative_attention(self.function, (self.q, self.k, self.v), self.terms, None, options)

    def differentiate(self, given: _core.GradientInputs) -> dict[str, NDArray[Any]]:
        """Compute the backward pass."""
        heads = self.q, self.k, self.v
        return _core.relative_attention_backward(self.function, heads, self.terms, given, self.wrt, self.options)

    def in_shape(self, found: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Sum the core's results over batch entries, and over heads if they share r."""
        totals = super().in_shape({name: array for name, array in found.items() if name not in ("r", "u", "w")})
        for name, given in (("r", self.terms.r), ("u", self.terms.u), ("w", self.terms.w)):
            if name not in found:
                continue
            array = found[name]
            shared = tuple(range(array.ndim - given.ndim))
            totals[name] = array.sum(axis=shared, dtype=np.float64).reshape(given.shape)
        return totals

    def dtype_of(self, name: str) -> np.dtype[Any]:
        """Return the dtype of a gradient."""
        return self.terms.r.dtype if name == "r" else super().dtype_of(name)
