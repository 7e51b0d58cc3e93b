"""The specification: attention in plain NumPy, step by step, in double precision.

Nothing here is fused, blocked or fast. Tests and the self-test compare the core with it. It also defines precisely what
each option means.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from ._errors import refusal
from ._keywords import hinted
from ._reference_distances import distances, per_batch, relative_products, t5_buckets, t5_terms
from ._reference_gradients import GradientResult, gradients
from ._reference_visibility import visibility

if TYPE_CHECKING:
    from ._bias import T5Bias
    from ._typing import Layout


class Result(NamedTuple):
    """The results of `attention`, and the quantities in which error bounds are expressed."""

    out: NDArray[Any]  # (..., H, Sq, Dv), or (..., Sq, H, Dv) in layout "bshd"
    lse: NDArray[Any]  # (..., H, Sq)
    weights: NDArray[Any]  # (..., H, Sq, Sk)
    magnitude: NDArray[Any]  # sum_j p_ij |v_j|, the shape of out
    sigma: float  # the largest |scale| * sum_d |q_d k_d| of a visible pair


@hinted
def attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    causal: bool = False,
    q_offset: ArrayLike | None = None,
    window: tuple[int | None, int | None] | None = None,
    q_lens: ArrayLike | None = None,
    kv_lens: ArrayLike | None = None,
    kv_starts: ArrayLike | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    layout: Layout = "bhsd",
    t5: T5Bias | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
    chunk: int | None = None,
    prefix_lens: ArrayLike | None = None,
    relative: tuple[Any, ...] | None = None,
    dtype: DTypeLike = np.float64,
) -> Result:
    """Compute attention step by step; arguments as for `selfattn.attention`.

    Parameters
    ----------
    relative : (r, u, w, r_origin), optional
        As for `selfattn.relative_attention`; pass its mem_len as `q_offset`.
    dtype : dtype, default float64
        The type to compute in; `numpy.longdouble` to check float64 results.

    Examples
    --------
    >>> import numpy as np
    >>> import selfattn as sa
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 5, 8))
    >>> bool(np.allclose(sa.attention(q, k, v), sa.reference.attention(q, k, v).out))
    True
    """
    q, k, v = (np.asarray(x, dtype=dtype) for x in (q, k, v))
    ndim = max(q.ndim, k.ndim, v.ndim)
    q, k, v = (x[None] if x.ndim == 2 else x.swapaxes(-2, -3) if layout == "bshd" else x for x in (q, k, v))
    num_heads, q_len, head_dim = q.shape[-3:]
    kv_len = k.shape[-2]
    group = num_heads // max(k.shape[-3], 1)
    k, v = np.repeat(k, group, axis=-3), np.repeat(v, group, axis=-3)
    batch = np.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
    limits: dict[str, Any] = {"q_offset": q_offset, "q_lens": q_lens, "kv_lens": kv_lens}
    visible = visibility(
        q_len, kv_len, batch, num_heads, mask=mask, bias=bias, causal=causal, window=window, kv_starts=kv_starts,
        chunk=chunk, prefix_lens=prefix_lens, **limits,
    )  # fmt: skip
    positions_count = (
        causal
        or chunk is not None
        or alibi_slopes is not None
        or t5 is not None
        or any(x is not None for x in window or ())
    )
    if positions_count and q_lens is None and q_offset is None:
        _refuse_shorter_keys(kv_lens, q_len)
    scale = 1 / np.sqrt(head_dim) if scale is None else scale
    with np.errstate(all="ignore"):
        products, sizes = np.matmul(q, k.swapaxes(-1, -2)), np.matmul(abs(q), abs(k).swapaxes(-1, -2))
        distance = np.atleast_3d(-distances(q_len, kv_len, batch, **limits).T).T  # the same for all heads
        if relative is not None:
            products, sizes = relative_products(q, k, distance, relative)
        scores, sizes = scale * products, abs(scale) * sizes
        sigma = float(np.max(np.where(visible, sizes, 0), initial=0))
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        scores = np.where(visible, _add_biases(scores, distance, bias, alibi_slopes, t5), -np.inf)
        factors = dropout_factors(scores.shape, dropout, seed) if dropout else np.ones(())
        found = _softmax(scores, visible, v, _sink_scores(scores, sinks, q_lens), sigma, factors)
    if ndim == 2:
        return Result(found.out[0], found.lse[0], found.weights[0], found.magnitude[0], sigma)
    if layout == "bshd":
        return found._replace(out=found.out.swapaxes(-2, -3), magnitude=found.magnitude.swapaxes(-2, -3))
    return found


def attention_backward(
    grad_out: ArrayLike,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    wrt: Sequence[str] = ("q", "k", "v"),
    grad_lse: ArrayLike | None = None,
    grad_weights: ArrayLike | None = None,
    **options: Any,
) -> GradientResult:
    """Compute the gradients of `attention`; all operands must be finite, except that a bias may be -inf.

    Parameters
    ----------
    grad_out, q, k, v, wrt, grad_lse, grad_weights
        As for `selfattn.attention_backward`; `wrt` may name r, u and w as well.
    **options
        The options of `attention`.

    Examples
    --------
    >>> import numpy as np
    >>> from selfattn import reference
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 5, 8))
    >>> reference.attention_backward(np.ones((5, 8)), q, k, v).gradients["q"].shape
    (5, 8)
    """
    dropout, seed = options.pop("dropout", 0.0), options.pop("seed", None)
    forward = attention(q, k, v, **options)
    q_len, kv_len = forward.weights.shape[-2:]
    limits = [options.get(name) for name in ("q_offset", "q_lens", "kv_lens")]
    distance = -distances(q_len, kv_len, forward.weights.shape[:-3], *limits)
    operands = {"q": q, "k": k, "v": v, "distance": distance, **options}
    if options.get("t5") is not None:
        operands["buckets"] = t5_buckets(options["t5"], distance)
    if dropout:
        pairs = forward.weights.shape if forward.weights.ndim > 2 else (1, *forward.weights.shape)
        operands["factors"] = dropout_factors(pairs, dropout, seed)
    return gradients(forward, operands, (grad_out, grad_lse, grad_weights), wrt)


def philox(counter: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """Encrypt counters with Philox4x32-10 (Salmon et al., 2011); the last axis holds the four words of a counter."""
    word = np.uint64(0xFFFFFFFF)
    c0, c1, c2, c3 = np.moveaxis(np.asarray(counter, dtype=np.uint64), -1, 0)
    for i in range(10):
        low = np.uint64((seed + i * 0x9E3779B9) & 0xFFFFFFFF)
        high = np.uint64(((seed >> 32) + i * 0xBB67AE85) & 0xFFFFFFFF)
        a, b = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (b >> np.uint64(32)) ^ c1 ^ low, b & word, (a >> np.uint64(32)) ^ c3 ^ high, a & word
    return np.stack([c0, c1, c2, c3], axis=-1)


def dropout_factors(shape: tuple[int, ...], rate: float, seed: int | None, first: int = 0) -> NDArray[np.float64]:
    """Return dropout's factors of the weights (..., H, Sq, Sk): 0, or 1 / (1 - rate) where the weight is kept.

    `first` is the number of the first batch entry.
    """
    *batch, _, _, kv_len = shape
    entries = int(np.prod(batch, dtype=np.int64))
    coordinates = np.indices((entries, *shape[-3:-1], -(-kv_len // 4)), dtype=np.uint64)
    coordinates[0] += np.uint64(first)
    words = philox(np.moveaxis(coordinates, 0, -1), int(seed or 0))
    threshold = min(round(rate * 2**32), 2**32 - 1)
    factors = np.where(words >= np.uint64(threshold), 1 / (1 - rate), 0)
    return factors.reshape(*shape[:-1], -(-kv_len // 4) * 4)[..., :kv_len]


def _refuse_shorter_keys(kv_lens: ArrayLike | None, q_len: int) -> None:
    if kv_lens is not None and np.any(np.less(kv_lens, q_len)):
        raise refusal(
            ValueError,
            "attention",
            "kv_lens",
            " holds less than the queries of ",
            "q",
            ": pass ",
            "q_lens",
            " or ",
            "q_offset",
            " as well",
        )


def _add_biases(
    scores: NDArray[Any], distance: NDArray[Any], bias: ArrayLike | None, alibi_slopes: ArrayLike | None, t5: Any
) -> NDArray[Any]:
    if bias is not None:
        scores = scores + np.asarray(bias, dtype=scores.dtype)
    if alibi_slopes is not None:
        slopes = np.asarray(alibi_slopes, dtype=scores.dtype)[..., None, None]
        scores = scores - slopes * abs(distance)
    return scores if t5 is None else scores + t5_terms(t5, distance)


def _sink_scores(scores: NDArray[Any], sinks: ArrayLike | None, q_lens: ArrayLike | None) -> NDArray[Any]:
    """Return the score of each row's sink: -inf without one, and in rows of padding."""
    sink = np.full(scores.shape[:-1], -np.inf, dtype=scores.dtype)
    if sinks is not None:
        sink[...] = np.asarray(sinks, dtype=scores.dtype)[:, None]
    queries = per_batch(q_lens, scores.shape[:-3])
    if queries is not None:
        sink[np.broadcast_to(np.arange(scores.shape[-2]) >= queries[..., 0], sink.shape)] = -np.inf
    return sink


def _softmax(
    scores: NDArray[Any],
    visible: NDArray[np.bool_],
    v: NDArray[Any],
    sink: NDArray[Any],
    sigma: float,
    factors: NDArray[np.float64],
) -> Result:
    peak = np.maximum(np.max(scores, axis=-1, initial=-np.inf), sink)
    sees = visible.any(axis=-1)
    # Rows that see no key subtract 0. Rows whose visible scores are all -inf subtract -inf, which gives NaN.
    shift = np.where(np.isneginf(peak) & ~sees, 0, peak)[..., None]
    parts = np.where(visible, np.exp(scores - shift), 0)
    total = parts.sum(axis=-1) + np.where(np.isneginf(sink), 0, np.exp(sink - shift[..., 0]))
    weights = np.where(visible, parts / np.where(total == 0, 1, total)[..., None] * factors, 0)
    lse = np.where(np.isneginf(peak), -np.inf, peak + np.log(total))
    out = _weighted_sum(weights, visible, v)
    return Result(out, lse, weights, _weighted_sum(weights, visible, abs(v)), sigma)


def _weighted_sum(weights: NDArray[Any], visible: NDArray[np.bool_], v: NDArray[Any]) -> NDArray[Any]:
    """weights @ v without the hidden values, which must not contribute even as 0 * NaN."""
    finite = np.isfinite(v)
    total = np.matmul(weights, np.where(finite, v, 0))
    for j in np.flatnonzero(~finite.all(axis=tuple(i for i in range(v.ndim) if i != v.ndim - 2))):
        odd = np.where(finite[..., j, :], 0, v[..., j, :])[..., None, :]
        total = total + np.where(visible[..., j, None], weights[..., j, None] * odd, 0)
    return np.asarray(total)
