"""Gradients compared with the reference, relative to the bound in docs/numerics.md."""

from __future__ import annotations

from typing import Any

import numpy as np

import selfattn as sa
from selfattn import reference
from selfattn._rounding import rounding

CONSTANT, PER_SIGMA = 16, 4
SCORE_TERMS = ("bias", "sinks", "alibi_slopes", "t5")


def given_names(options: dict[str, Any]) -> tuple[str, ...]:
    """The names of everything that has a gradient in a call with these options."""
    return ("q", "k", "v", "scale", *(name for name in SCORE_TERMS if options.get(name) is not None))


def computed_in(dtype: Any) -> Any:
    return np.float64 if dtype == np.float64 else np.float32


def shares(
    q: Any, k: Any, v: Any, *, rng: Any, all_results: bool = False, rounded: bool = False, **options: Any
) -> dict[str, float]:
    """Compute all gradients for random ones of the results; return the largest error of each as a share of its bound.

    `all_results`: lse and weights have gradients as well. `rounded`: compute from rounded out and lse.
    """
    names = given_names(options)
    shape = np.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
    out, lse = sa.attention(q, k, v, return_lse=True, **options)
    assert out.shape[:-3] == shape or out.ndim == 2
    grad_out = rng.standard_normal(out.shape).astype(out.dtype)
    more: dict[str, Any] = {}
    if all_results:
        more["grad_lse"] = rng.standard_normal(lse.shape).astype(lse.dtype)
        more["grad_weights"] = rng.standard_normal((*lse.shape, k.shape[-3 if is_heads_last(options) else -2]))
        more["grad_weights"] = more["grad_weights"].astype(lse.dtype)
    if rounded:
        found = sa.attention_backward(grad_out, q, k, v, out, lse, wrt=names, **more, **options)
    else:
        found = sa.attention_vjp(q, k, v, wrt=names, **options)[1](grad_out, **more)
    kept = {name: x for name, x in options.items() if name not in ("num_threads", "precision")}
    dtype = np.longdouble if q.dtype == np.float64 else np.float64
    exact = reference.attention_backward(grad_out, q, k, v, wrt=names, dtype=dtype, **more, **kept)
    unit = relative_bound(q, k, v, exact.sigma, lse, rounded, options)
    arguments = {"q": q, "k": k, "v": v, **options}
    return {name: share(getattr(found, name), exact, name, arguments, unit) for name in names}


def is_heads_last(options: dict[str, Any]) -> bool:
    return bool(options.get("layout") == "bshd")


def relative_bound(q: Any, k: Any, v: Any, sigma: float, lse: Any, rounded: bool, options: dict[str, Any]) -> float:
    """Return (16 + 4 sigma) u, where sigma includes what is added to scores, and how far out and lse were rounded."""
    unit = 2.0**-53 if q.dtype == np.float64 else 2.0**-24
    of_values, of_scores = rounding(q, k, v, **options)
    sigma += added_to_scores(q, k, lse, options)
    bound = (CONSTANT + PER_SIGMA * sigma) * unit + of_values + sigma * of_scores
    if rounded:
        bound += unit * float(np.max(abs(lse), initial=0, where=np.isfinite(lse)))
        bound += {"float16": 2.0**-11, "bfloat16": 2.0**-8}.get(q.dtype.name, 0.0)
    return bound


def added_to_scores(q: Any, k: Any, lse: Any, options: dict[str, Any]) -> float:
    """Return a bound of what options add to scores."""
    total = 0.0
    for terms in (options.get("bias"), getattr(options.get("t5"), "table", None)):
        if terms is not None:
            total += float(np.max(abs(terms), initial=0, where=np.isfinite(terms)))
    if options.get("alibi_slopes") is not None:
        farthest = q.shape[-2] + k.shape[-2] + float(np.max(abs(np.asarray(options.get("q_offset") or 0))))
        total += float(np.max(abs(np.asarray(options["alibi_slopes"])), initial=0)) * farthest
    return total


def share(found: Any, exact: reference.GradientResult, name: str, arguments: dict[str, Any], unit: float) -> float:
    """Return the largest error of a gradient as a share of its bound."""
    expected, magnitude = exact.gradients[name], exact.magnitudes[name]
    given = arguments["t5"].table if name == "t5" else arguments.get(name)
    assert found.shape == expected.shape == (np.shape(given) if name != "scale" else ())
    own_type = name in ("q", "k", "v", "bias")
    assert found.dtype == (given.dtype if own_type else computed_in(arguments["q"].dtype)), name
    assert np.isfinite(found.astype(np.float64)).all(), name
    bound = unit * magnitude
    rounding_unit = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24}.get(found.dtype.name, 2.0**-53)
    bound = bound + (abs(expected) + bound) * rounding_unit + (2.0**-25 if found.dtype == np.float16 else 0)
    bound = bound + 1e5 * float(np.finfo(computed_in(found.dtype)).smallest_normal)  # weights below it may be lost
    return float(np.max(abs(found - expected) / bound, initial=0))
