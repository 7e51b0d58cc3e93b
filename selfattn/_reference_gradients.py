"""The gradients of `selfattn.reference.attention`, step by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[Any]


class GradientResult(NamedTuple):
    """The requested gradients, and the quantities in which error bounds are expressed."""

    gradients: dict[str, Floats]  # by the names in `wrt`, each with the shape of its argument
    magnitudes: dict[str, Floats]  # the same sums, with the absolute value of every number
    sigma: float  # sigma of the forward pass


@dataclass
class _Pass:
    """The numbers from which gradients are computed. Rows are (*batch, H, S, width), pairs are (*batch, H, Sq, Sk)."""

    q: Floats
    k: Floats  # repeated for each head of a group
    v: Floats
    grad_out: Floats
    grad_lse: Floats  # (*batch, H, Sq, 1)
    grad_weights: Floats
    weights: Floats  # before dropout
    factors: Floats  # factors of dropout
    sink_weights: Floats  # (*batch, H, Sq, 1)
    products: Floats  # before the scale
    bend: Floats  # the derivative of the softcap
    scale: Floats
    distance: Floats  # i + offset - j of each pair
    relative: tuple[Floats, ...]  # u, w (H, 1, D) and the vector of r for each pair, (*batch, H, Sq, Sk, D); or nothing

    def absolute(self) -> _Pass:
        """Return the pass over absolute values, with 1 for the softcap's derivative, whose errors are relative to 1."""
        values = {name: abs(value) for name, value in vars(self).items() if name != "relative"}
        relative = tuple(abs(x) for x in self.relative)
        queries, keys = values["q"], values["k"]
        values["products"] = _products(queries, keys, relative)
        return _Pass(**{**values, "bend": np.ones_like(self.bend), "relative": relative})


def gradients(
    forward: Any,
    operands: Mapping[str, Any],
    upstream: tuple[Any, Any, Any],
    wrt: Sequence[str],
) -> GradientResult:
    """Return the gradients for a forward pass of the reference, whose `operands` are its arguments by name.

    `operands` also has "distance": i + offset - j of each pair; with t5 "buckets": the row of the table for each pair;
    with dropout "factors". The forward pass itself was computed without dropout.
    """
    through = _make_pass(forward, operands, upstream)
    exact = _all_sums(through, _score_gradients(through, subtract=True))
    sizes = through.absolute()
    magnitudes = _all_sums(sizes, _score_gradients(sizes, subtract=False))
    return GradientResult(
        {name: _like_argument(name, exact, operands) for name in wrt},
        {name: abs(_like_argument(name, magnitudes, operands)) for name in wrt},
        forward.sigma,
    )


def _make_pass(forward: Any, operands: Mapping[str, Any], upstream: tuple[Any, Any, Any]) -> _Pass:
    dtype = forward.weights.dtype
    pairs = forward.weights.shape if forward.weights.ndim > 2 else (1, *forward.weights.shape)
    heads_last = operands.get("layout") == "bshd"

    def rows(x: Any) -> Floats:
        x = np.asarray(x, dtype=dtype)
        x = x[None] if x.ndim == 2 else x.swapaxes(-2, -3) if heads_last else x
        x = np.repeat(x, pairs[-3] // max(x.shape[-3], 1), axis=-3)
        return np.broadcast_to(x, (*pairs[:-3], *x.shape[-3:]))

    def per_row(x: Any) -> Floats:
        return np.zeros((*pairs[:-1], 1), dtype) if x is None else np.asarray(x, dtype).reshape(*pairs[:-1], 1)

    q, k, v, grad_out = (rows(x) for x in (operands["q"], operands["k"], operands["v"], upstream[0]))
    relative = _relative_vectors(operands.get("relative"), operands["distance"], q)
    scale, cap, sinks = (operands.get(name) for name in ("scale", "softcap", "sinks"))
    scale = np.asarray(1 / np.sqrt(dtype.type(q.shape[-1])) if scale is None else scale, dtype)
    products, lse = _products(q, k, relative), per_row(forward.lse)
    sink = np.full_like(lse, -np.inf) if sinks is None else np.asarray(sinks, dtype)[:, None, None]
    return _Pass(
        q=q, k=k, v=v, grad_out=grad_out,
        grad_lse=per_row(upstream[1]),
        grad_weights=np.zeros(pairs, dtype) if upstream[2] is None else np.asarray(upstream[2], dtype).reshape(pairs),
        weights=forward.weights.reshape(pairs),
        factors=np.broadcast_to(operands.get("factors", 1.0), pairs).astype(dtype),
        sink_weights=np.exp(np.where(np.isneginf(lse), -np.inf, sink - np.where(np.isneginf(lse), 0, lse))),
        products=products,
        bend=np.ones_like(products) if cap is None else 1 - np.tanh(scale * products / cap) ** 2,
        scale=scale,
        distance=np.broadcast_to(operands["distance"], pairs).astype(dtype),
        relative=relative,
    )  # fmt: skip


def _relative_vectors(relative: Any, distance: Any, q: Floats) -> tuple[Floats, ...]:
    if relative is None:
        return ()
    r, u, w, _ = relative
    r, u, w = (np.asarray(x, q.dtype) for x in (r, u, w))
    r = np.broadcast_to(r, (q.shape[-3], *r.shape[-2:]))
    return u[:, None], w[:, None], r[np.arange(len(r))[:, None, None], _relative_rows(relative, distance)]


def _relative_rows(relative: Any, distance: Any) -> NDArray[np.int64]:
    rows: NDArray[np.int64] = np.clip(distance + relative[3], 0, np.shape(relative[0])[-2] - 1)
    return rows


def _products(q: Floats, k: Floats, relative: tuple[Floats, ...]) -> Floats:
    if not relative:
        return np.asarray(q @ k.swapaxes(-1, -2))
    u, w, vectors = relative
    return np.asarray((q + u) @ k.swapaxes(-1, -2) + np.einsum("...id,...ijd->...ij", q + w, vectors))


def _score_gradients(p: _Pass, subtract: bool) -> tuple[Floats, Floats]:
    """Return the gradients of all scores after the softcap, and each row's part of the sink's gradient."""
    of_weights = (p.grad_out @ p.v.swapaxes(-1, -2) + p.grad_weights) * p.factors
    mean = (p.weights * of_weights).sum(axis=-1, keepdims=True)
    sign = -1 if subtract else 1
    change = mean + sign * p.grad_lse  # subtracted from the gradient of each weight of the row
    return p.weights * (of_weights + sign * change), sign * p.sink_weights * change


def _all_sums(p: _Pass, of_scores: tuple[Floats, Floats]) -> dict[str, Floats]:
    """Return all gradients, with every axis of heads and batch."""
    scores, sinks = of_scores
    bent = scores * p.bend
    scaled = p.scale * bent
    for_queries, for_keys = scaled @ p.k, scaled.swapaxes(-1, -2) @ p.q
    sums = {
        "v": (p.weights * p.factors).swapaxes(-1, -2) @ p.grad_out,
        "bias": scores,
        "sinks": sinks[..., 0].sum(axis=-1),
        "alibi_slopes": -(scores * abs(p.distance)).sum(axis=(-1, -2)),
        "t5": scores,
        "scale": (bent * p.products).sum(),
    }
    if p.relative:
        u, w, vectors = p.relative
        with_vectors = np.einsum("...ij,...ijd->...id", scaled, vectors)
        sums["u"], sums["w"] = for_queries.sum(axis=-2), with_vectors.sum(axis=-2)
        sums["r"] = scaled[..., None] * (p.q + w)[..., None, :]
        for_queries, for_keys = for_queries + with_vectors, scaled.swapaxes(-1, -2) @ (p.q + u)
    return {**sums, "q": for_queries, "k": for_keys}


def _like_argument(name: str, sums: Mapping[str, Floats], operands: Mapping[str, Any]) -> Floats:
    """Sum a gradient over the axes along which its argument was broadcast."""
    total = sums[name]
    if name == "t5":
        buckets = np.broadcast_to(operands["buckets"], total.shape)
        return np.asarray(_by_index(total[..., None], buckets, len(np.asarray(operands["t5"].table)))[..., 0].T)
    if name in ("r", "u", "w"):
        given = np.asarray(operands["relative"]["ruw".index(name)])
        if name == "r":
            rows = np.broadcast_to(_relative_rows(operands["relative"], operands["distance"]), total.shape[:-1])
            total = _by_index(total, rows, given.shape[-2])
        return _sum_to(total, given.shape)
    shape = np.shape(operands[name]) if name != "scale" else ()
    if name in ("q", "k", "v") and len(shape) > 2:
        heads_last = operands.get("layout") == "bshd"
        heads = shape[-2 if heads_last else -3]
        total = total.reshape(*total.shape[:-3], heads, total.shape[-3] // max(heads, 1), *total.shape[-2:])
        total = total.sum(axis=-3)
        total = total.swapaxes(-2, -3) if heads_last else total
    return _sum_to(total, shape)


def _by_index(pairs: Floats, index: NDArray[np.int64], count: int) -> Floats:
    """Sum, for each head, the vectors (*batch, H, Sq, Sk, width) of all (query, key) pairs that have the same index."""
    per_head, indices = np.moveaxis(pairs, -4, 0), np.moveaxis(index, -3, 0)
    total = np.zeros((len(per_head), count, pairs.shape[-1]), pairs.dtype)
    for sums, vectors, places in zip(total, per_head, indices, strict=True):
        np.add.at(sums, places, vectors)
    return total


def _sum_to(array: Floats, shape: tuple[int, ...]) -> Floats:
    while array.ndim > len(shape):
        array = array.sum(axis=0)
    for axis, n in enumerate(shape):
        if n == 1:
            array = array.sum(axis=axis, keepdims=True)
    return array
