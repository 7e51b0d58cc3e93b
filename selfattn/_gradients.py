"""Gradients of attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from numpy.typing import ArrayLike

from ._attention import ONLY_HERE, attention
from ._backward import Gradients, Operands, Upstream, Vjp
from ._keywords import clean_signature, refuse_unknown
from ._typing import Array, GradientOptions, VjpOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack


@clean_signature(attention, without=("out", "return_lse", "return_weights", *ONLY_HERE))
def attention_backward(
    grad_out: ArrayLike,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    out: ArrayLike,
    lse: ArrayLike,
    *,
    wrt: Sequence[str] = ("q", "k", "v"),
    grad_lse: ArrayLike | None = None,
    grad_weights: ArrayLike | None = None,
    into: Gradients | Mapping[str, Array] | None = None,
    accumulate: bool = False,
    **options: Unpack[GradientOptions],
) -> Gradients:
    r"""Compute the gradients of `attention` from its results.

    For a scalar L that depends on `out`, and perhaps on lse and weights, this returns the derivatives of L with respect
    to the arguments that `wrt` names. Scores are computed again, one block at a time: nothing of size Sq × Sk is
    stored, unless a bias of that size has a gradient.

    Parameters
    ----------
    grad_out : array_like, shape of out
        ∂L/∂out, in q's dtype, or float32 for 16-bit q.
    q, k, v : array_like
        As for `attention`.
    out : array_like
        The result of `attention` for the same arguments. For 16-bit q, `out` may be float32: gradients are more
        accurate if `out` was not rounded, see `attention_vjp`.
    lse : array_like, shape (..., H, Sq)
        The log-sum-exp that `attention` returned, in float32 or float64.
    wrt : sequence of str
        Names of the arguments whose gradients are wanted: "q", "k", "v", "bias", "sinks", "alibi_slopes", "t5" (the
        table of its T5Bias), "scale". Gradients that are not named cost nothing.
    grad_lse : array_like, shape (..., H, Sq), optional
        ∂L/∂lse.
    grad_weights : array_like, shape (..., H, Sq, Sk), optional
        ∂L/∂weights. Needs memory for further arrays of this size.
    into : Gradients or mapping of names to ndarrays, optional
        Arrays for the gradients: each with exactly the shape and dtype of the gradient that it gets.
    accumulate : bool, default False
        Add to the arrays in `into` instead of overwriting them. 16-bit arrays are added to in float32: each sum is
        rounded once.
    **options
        The options of `attention`, with the values that were passed to it.

    Returns
    -------
    Gradients
        A named tuple. Gradients of q, k, v and bias have the dtype of the argument, to which they are rounded once. The
        other gradients are float64 for float64 q, else float32.

    Raises
    ------
    TypeError, ValueError
        As for `attention`; or `wrt` names an argument that is unknown or not given, or shapes do not fit. Nothing has
        been written.

    Notes
    -----
    With P = softmax(S), D_i = Σ_d ∂out_id · out_id − ∂lse_i and dP = ∂out · vᵀ: ∂v = Pᵀ · ∂out, dS = P ∘ (dP − D),
    ∂q = scale · dS · k, ∂k = scale · dSᵀ · q (Dao, "FlashAttention-2", 2023). A hidden key has gradient 0, whatever it
    holds. A query that sees no key has gradient 0 too, and adds nothing to other gradients. A query whose absolute lse,
    in units of log2, exceeds 2²⁰ (2⁴⁹ if lse and the computation are float64) is treated in the same way, because the
    rounding error of such an lse is too large. For a given instruction set, shape and options, gradients do not depend
    on the number of threads, the rest of the batch or strides, not even in the last bit.

    Examples
    --------
    >>> import numpy as np
    >>> import selfattn as sa
    >>> rng = np.random.default_rng(0)
    >>> q, k, v, grad_out = rng.standard_normal((4, 2, 4, 10, 8))
    >>> out, lse = sa.attention(q, k, v, causal=True, return_lse=True)
    >>> grads = sa.attention_backward(grad_out, q, k, v, out, lse, causal=True)
    >>> grads.q.shape
    (2, 4, 10, 8)
    """
    refuse_unknown(attention_backward, options)
    function = "attention_backward"
    operands = Operands.check(function, (q, k, v), options, wrt)
    return operands.deliver(Upstream(grad_out, grad_lse, grad_weights), out, lse, into, accumulate)


@clean_signature(attention, without=("out", *ONLY_HERE))
def attention_vjp(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, *, wrt: Sequence[str] = ("q", "k", "v"), **options: Unpack[VjpOptions]
) -> tuple[Any, Vjp]:
    """Compute `attention` and return a function that computes its gradients.

    Parameters
    ----------
    q, k, v : array_like
        As for `attention`. They must not change before `vjp` is called.
    wrt : sequence of str
        As for `attention_backward`.
    **options
        The options of `attention`, except ``out``, ``return_key_mass``, ``key_indices``, ``block_indices``,
        ``block_size``, ``rope`` and ``positions``.

    Returns
    -------
    out : ndarray or tuple
        What `attention` returns for these options.
    vjp : callable
        ``vjp(grad_out, grad_lse=None, grad_weights=None)`` returns the `Gradients`; it may be called several times.

    Raises
    ------
    TypeError, ValueError, MemoryError
        As `attention`, or `wrt` names an argument that is not given. `vjp` raises a ValueError for a gradient of
        another shape than the result's.

    Notes
    -----
    `out` is kept in the type of computation and lse in float64. The gradients are therefore more accurate than those
    that `attention_backward` computes from rounded results. With 16-bit operands on units that multiply bfloat16, `out`
    may differ from the result of `attention` by rounding. A query whose absolute lse, in units of log2, exceeds 2²⁰
    (2⁴⁹ in float64) is treated as if it saw no key, as in `attention_backward`.

    Examples
    --------
    >>> import numpy as np
    >>> import selfattn as sa
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 2, 4, 10, 8))
    >>> out, vjp = sa.attention_vjp(q, k, v, causal=True)
    >>> vjp(np.ones_like(out)).v.shape
    (2, 4, 10, 8)
    """
    refuse_unknown(attention_vjp, options)
    return Operands.check("attention_vjp", (q, k, v), options, wrt).vjp()
