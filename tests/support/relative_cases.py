"""Relative attention and its gradients by formulas in float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest

from selfattn.reference import dropout_factors


class Case(NamedTuple):
    """What a call gets: extents, the rows of r, and options."""

    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    segment: int = 5
    memory: int = 0
    dim: int = 8
    value_dim: int = 8
    rows: int | None = None
    shared: bool = False
    options: dict[str, Any] = {}  # noqa: RUF012 - never changed

    @property
    def length(self) -> int:
        return self.memory + self.segment


class Drawn(NamedTuple):
    q: Any
    k: Any
    v: Any
    r: Any
    u: Any
    w: Any


def draw(rng: np.random.Generator, case: Case, dtype: Any) -> Drawn:
    pytest.importorskip("ml_dtypes")  # teaches NumPy bfloat16
    rows = case.length if case.rows is None else case.rows
    q = rng.standard_normal((case.batch, case.heads, case.segment, case.dim))
    k = rng.standard_normal((case.batch, case.kv_heads, case.length, case.dim))
    v = rng.standard_normal((case.batch, case.kv_heads, case.length, case.value_dim))
    r = rng.standard_normal((rows, case.dim) if case.shared else (case.heads, rows, case.dim))
    u, w = rng.standard_normal((2, case.heads, case.dim))
    return Drawn(*(x.astype(dtype) for x in (q, k, v, r)), u, w)


def visible(case: Case, options: dict[str, Any]) -> Any:
    """Return which pairs see each other: (batch, 1 or heads, segment, length)."""
    i, j = np.ogrid[: case.segment, : case.length]
    distance = i + case.memory - j
    seen = np.ones((case.batch, 1, case.segment, case.length), bool)
    if options.get("causal", True):
        seen &= distance >= 0
    left, right = options.get("window") or (None, None)
    if left is not None:
        seen &= distance <= left
    if right is not None:
        seen &= distance >= -right
    for name, place, before in (("q_lens", i, True), ("kv_lens", j, True), ("kv_starts", j, False)):
        if name in options:
            bound = np.asarray(options[name]).reshape(-1, 1, 1, 1)
            seen &= (place < bound) if before else (place >= bound)
    return seen & options.get("mask", True)


class Exact(NamedTuple):
    """Gradients, and the sum of the magnitudes of what each of their elements adds up."""

    gradients: dict[str, Any]
    magnitudes: dict[str, Any]
    sigma: float  # the largest magnitude of what a score adds up


def probabilities(scores: Any, seen: Any) -> Any:
    with np.errstate(invalid="ignore"):
        hidden = np.where(seen, scores, -np.inf)
        probs = np.where(seen, np.exp(hidden - np.max(hidden, axis=-1, keepdims=True)), 0)
        total = probs.sum(-1, keepdims=True)
        return np.where(total > 0, probs / total, 0)


def sum_of_groups(x: Any, group: int) -> Any:
    """Sum (batch, heads, ...) over the query heads of each key head."""
    return x.reshape(len(x), -1, group, *x.shape[2:]).sum(2)


def exact_gradients(x: Drawn, grad_out: Any, case: Case, grad_lse: Any = None) -> Exact:
    q, k, v, r, u, w = (np.asarray(a, np.float64) for a in x)
    grad_out = np.asarray(grad_out, np.float64)
    options, group = case.options, case.heads // case.kv_heads
    scale, cap = options.get("scale") or case.dim**-0.5, options.get("softcap")
    k, v = (np.repeat(a, group, axis=1) for a in (k, v))
    r = np.broadcast_to(r, (case.heads, *r.shape[-2:]))
    i, j = np.ogrid[: case.segment, : case.length]
    row = np.clip(i + case.memory - j + options.get("r_origin", 0), 0, r.shape[1] - 1)
    vectors = r[:, row]  # (heads, segment, length, dim)
    by_content, by_distance = q + u[:, None], q + w[:, None]
    products = np.einsum("bhid,bhjd->bhij", by_content, k) + np.einsum("bhid,hijd->bhij", by_distance, vectors)
    scores = scale * products
    sums = abs(q) + abs(u)[:, None], abs(q) + abs(w)[:, None]  # an error of q + w is one of its terms
    sizes = np.einsum("bhid,bhjd->bhij", sums[0], abs(k)) + np.einsum("bhid,hijd->bhij", sums[1], abs(vectors))
    bend = np.ones_like(scores) if cap is None else 1 - np.tanh(scores / cap) ** 2
    scores = scores if cap is None else cap * np.tanh(scores / cap)
    seen = np.broadcast_to(visible(case, options), scores.shape)
    probs = probabilities(scores + options.get("bias", 0), seen)
    factors = dropout_factors(scores.shape, options["dropout"], options["seed"]) if "dropout" in options else 1.0
    dprobs = factors * np.einsum("bhie,bhje->bhij", grad_out, v)
    delta = (probs * dprobs).sum(-1, keepdims=True)
    added = 0 if grad_lse is None else grad_lse[..., None]
    dscores = probs * (dprobs - delta + added)
    size_of_dprobs = factors * np.einsum("bhie,bhje->bhij", abs(grad_out), abs(v))
    size = probs * (size_of_dprobs + (probs * size_of_dprobs).sum(-1, keepdims=True) + abs(added))

    def gradients(kind: Any, d: Any, rows: tuple[Any, Any], product: Any) -> dict[str, Any]:
        content_rows, distance_rows = rows
        part = scale * bend * d
        content = np.einsum("bhij,bhjd->bhid", part, kind(k))
        relative = np.einsum("bhij,hijd->bhid", part, kind(vectors))
        weighed = np.einsum("bhij,bhid->hijd", part, distance_rows)
        dr = np.zeros((case.heads, *r.shape[1:]))
        np.add.at(dr, (slice(None), np.broadcast_to(row, (case.segment, case.length))), weighed)
        found = {
            "q": content + relative,
            "k": np.einsum("bhij,bhid->bhjd", part, content_rows),
            "v": np.einsum("bhij,bhie->bhje", probs * factors, kind(grad_out)),
            "r": dr.sum(0) if case.shared else dr,
            "u": content.sum((0, 2)),
            "w": relative.sum((0, 2)),
            "scale": (bend * d * product).sum(),
            "bias": d,
        }
        return found | {name: sum_of_groups(found[name], group) for name in "kv"}

    value = gradients(np.asarray, dscores, (by_content, by_distance), products)
    magnitude = gradients(np.abs, size, sums, sizes)
    return Exact(value, magnitude, (scale * sizes + abs(options.get("bias", 0))).max())
