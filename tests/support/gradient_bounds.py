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


class Comparison:
    """A call with random gradients of its results, and the reference's gradients of its operands."""

    def __init__(self, q: Any, k: Any, v: Any, rng: Any, all_results: bool = True, **options: Any) -> None:
        """`all_results`: lse and weights have gradients as well."""
        self.operands, self.options, self.names = (q, k, v), options, given_names(options)
        self.out, self.lse = sa.attention(q, k, v, return_lse=True, **options)
        self.upstream = {"grad_out": rng.standard_normal(self.out.shape).astype(self.out.dtype)}
        if all_results:
            keys = k.shape[-3 if options.get("layout") == "bshd" and k.ndim > 2 else -2]
            for name, shape in (("grad_lse", self.lse.shape), ("grad_weights", (*self.lse.shape, keys))):
                self.upstream[name] = rng.standard_normal(shape).astype(self.lse.dtype)
        known = {name: x for name, x in options.items() if name not in ("num_threads", "precision")}
        dtype = np.longdouble if q.dtype == np.float64 else np.float64
        upstream = dict(self.upstream)
        self.exact = reference.attention_backward(
            upstream.pop("grad_out"), q, k, v, wrt=self.names, dtype=dtype, **upstream, **known
        )

    def gradients(self, rounded: bool) -> sa.Gradients:
        """Compute the gradients from rounded out and lse, or from exact ones."""
        if not rounded:
            return sa.attention_vjp(*self.operands, wrt=self.names, **self.options)[1](**self.upstream)
        upstream = dict(self.upstream)
        given = (upstream.pop("grad_out"), *self.operands, self.out, self.lse)
        return sa.attention_backward(*given, wrt=self.names, **upstream, **self.options)

    def shares(self, rounded: bool) -> dict[str, float]:
        """Return the largest error of each gradient as a share of its bound."""
        found = self.gradients(rounded)
        unit = relative_bound(*self.operands, self.exact.sigma, self.lse, rounded, self.options)
        arguments = {**dict(zip("qkv", self.operands, strict=True)), **self.options}
        return {name: share(getattr(found, name), self.exact, name, arguments, unit) for name in self.names}


def multiplies_pairs(*operands: Any) -> bool:
    """Whether the backward pass rounds weights and the gradients of scores to bfloat16."""
    return sa.active_isa() == "avx512_bf16" and all(x.dtype.name == "bfloat16" for x in operands)


def relative_bound(q: Any, k: Any, v: Any, sigma: float, lse: Any, rounded: bool, options: dict[str, Any]) -> float:
    """Return (16 + 4 sigma) u, where sigma includes what is added to scores, and how far out and lse were rounded."""
    unit = 2.0**-53 if q.dtype == np.float64 else 2.0**-24
    of_values, of_scores = rounding(q, k, v, **options)
    sigma += added_to_scores(q, k, lse, options)
    bound = (CONSTANT + PER_SIGMA * sigma) * unit + of_values + sigma * of_scores
    if multiplies_pairs(q, k, v):
        bound += 2.0**-8
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
        farthest = q.shape[-2] + k.shape[-2] + float(np.max(abs(np.asarray(options.get("q_offset", 0)))))
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


def check(q: Any, k: Any, v: Any, **options: Any) -> None:
    """Fail if a gradient's error exceeds its bound, from exact out and lse or from rounded ones."""
    comparison = Comparison(q, k, v, np.random.default_rng(3), **options)
    for rounded in (False, True):
        beyond = {name: share for name, share in comparison.shares(rounded).items() if not share <= 1}
        assert not beyond, f"errors as shares of their bounds, from {'rounded' if rounded else 'exact'} out: {beyond}"
