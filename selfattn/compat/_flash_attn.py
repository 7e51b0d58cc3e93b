"""flash-attn 2's attention function on arrays, and the options that all flash-attn functions take.

The token axis comes before the head axis, and causal limits are aligned with the last key.
"""

from __future__ import annotations

from typing import Any, overload

from numpy.typing import ArrayLike

from .._arguments import flag, real
from .._attention import attention
from .._errors import refusal
from .._keywords import hinted
from .._typing import Array, No, Yes
from ._checks import arrays, dimensions, is_integer, no_dropout, own_names

Window = tuple[int, int]


# fmt: off
@overload
def flash_attn_func(
    q: ArrayLike, k: ArrayLike, v: ArrayLike,
    dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: Window = ..., softcap: float = ..., alibi_slopes: ArrayLike | None = ..., deterministic: bool = ...,
    return_attn_probs: No = ...,
) -> Array: ...
@overload
def flash_attn_func(
    q: ArrayLike, k: ArrayLike, v: ArrayLike,
    dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: Window = ..., softcap: float = ..., alibi_slopes: ArrayLike | None = ..., deterministic: bool = ...,
    *, return_attn_probs: Yes,
) -> tuple[Array, Array, Array]: ...
@overload
def flash_attn_func(
    q: ArrayLike, k: ArrayLike, v: ArrayLike,
    dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: Window = ..., softcap: float = ..., alibi_slopes: ArrayLike | None = ..., deterministic: bool = ...,
    return_attn_probs: bool = ...,
) -> Any: ...
# fmt: on
@hinted
@own_names("flash_attn_func", window="window_size", scale="softmax_scale")
def flash_attn_func(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: ArrayLike | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Compute ``flash_attn.flash_attn_func`` on arrays.

    Parameters
    ----------
    q : array_like, shape (B, Sq, H, D)
    k : array_like, shape (B, Sk, Hkv, D)
    v : array_like, shape (B, Sk, Hkv, Dv)
        All in one dtype: float32, float64, float16 or bfloat16. Hkv divides H.
    dropout_p : float
        Must be 0.
    softmax_scale : float, optional
        Default ``1 / sqrt(D)``.
    causal : bool, default False
        The last query is aligned with the last key.
    window_size : (left, right)
        Number of keys that a query sees on each side of its own position; negative = unbounded.
    softcap : float
        0 = none.
    alibi_slopes : array_like, shape (H,) or (B, H), optional
    deterministic : bool
        Concerns the original's backward pass. Here, results are bit-identical in every run, with True and with False.
    return_attn_probs : bool
        Also return the log-sum-exps and the attention weights.

    Returns
    -------
    out : ndarray, shape (B, Sq, H, Dv)
    softmax_lse : ndarray, shape (B, H, Sq)
        Only with `return_attn_probs`.
    S_dmask : ndarray, shape (B, H, Sq, Sk)
        Only with `return_attn_probs`: the weights.

    Notes
    -----
    =====================  ======================================  =========================================
    argument or case       flash-attn                              here
    =====================  ======================================  =========================================
    dropout_p > 0          drops weights at random                 ValueError
    dtypes                 float16, bfloat16                       float32 and float64 as well
    head sizes             up to 256, equal for k and v            any
    S_dmask                for tests, empty without dropout        the weights, in the computation dtype
    softmax_lse of a row   +inf                                    −inf
    without keys
    softmax_lse with       differs from the formula by a number    that of the documented formula
    causal and             per row
    alibi_slopes
    q, k, v                tensors that may require grad           arrays; no gradients
    =====================  ======================================  =========================================

    Examples
    --------
    >>> import numpy as np
    >>> from selfattn.compat import flash_attn_func
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 10, 4, 8), dtype=np.float32)
    >>> flash_attn_func(q, k, v, causal=True, window_size=(4, 0)).shape
    (2, 10, 4, 8)
    """
    name = "flash_attn_func"
    no_dropout(name, dropout_p)
    flag(name, "deterministic", deterministic)
    operands = arrays(name, q=q, k=k, v=v)
    dimensions(name, 4, **dict(zip("qkv", operands, strict=True)))
    extras = flag(name, "return_attn_probs", return_attn_probs)
    options = flash_options(name, softmax_scale, causal, window_size, softcap)
    return attention(
        *operands, **options, alibi_slopes=alibi_slopes, layout="bshd", return_lse=extras, return_weights=extras
    )


def flash_options(function: str, scale: Any, causal: Any, window_size: Any, softcap: Any) -> dict[str, Any]:
    """Return these arguments as options of selfattn's functions."""
    return {
        "scale": None if scale is None else real(function, "softmax_scale", scale),
        "causal": flag(function, "causal", causal),
        "window": _window(function, window_size),
        "softcap": real(function, "softcap", softcap) or None,  # 0.0: none
    }


def _window(function: str, value: Any) -> tuple[int | None, int | None] | None:
    if not isinstance(value, (tuple, list)) or len(value) != 2 or not all(is_integer(side) for side in value):
        raise refusal(TypeError, function, "window_size", f" is {value!r}, but a pair of integers is needed")
    left, right = (None if side < 0 else int(side) for side in value)
    return None if left is None and right is None else (left, right)
