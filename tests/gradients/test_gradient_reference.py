"""The reference's gradients, against central differences of the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import selfattn as sa
from selfattn import reference

pytestmark = pytest.mark.one_isa(reason="calls the reference alone")

INF = float("inf")


def problem(rng: Any, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return arguments that have gradients, and other options."""

    def normal(*shape: int) -> Any:
        return rng.standard_normal(shape)

    arguments = {"q": normal(2, 4, 5, 3), "k": normal(2, 2, 7, 3), "v": normal(2, 2, 7, 2)}
    given: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "plain": ({}, {}),
        "two axes": ({"q": normal(5, 3), "k": normal(7, 3), "v": normal(7, 2), "sinks": normal(1)}, {"causal": True}),
        "heads last": (
            {"q": normal(2, 5, 4, 3), "k": normal(2, 7, 2, 3), "v": normal(1, 7, 2, 2), "bias": normal(4, 5, 7)},
            {"layout": "bshd", "scale": -0.7},
        ),
        "broadcast": ({"q": normal(3, 1, 4, 5, 3), "v": normal(7, 2)[None], "k": normal(7, 3)[None]}, {}),
        "scale": ({"scale": np.array(0.4)}, {"softcap": 1.5}),
        "no scale": ({"scale": np.array(0.0), "bias": normal(1, 7)}, {}),
        "softcap": ({"sinks": normal(4)}, {"softcap": 0.8, "window": (3, 1)}),
        "bias": ({"bias": np.where(rng.random((2, 1, 5, 7)) < 0.3, -INF, normal(2, 1, 5, 7))}, {"softcap": 2.0}),
        "bias of rows": ({"bias": normal(4, 5, 1), "sinks": normal(4)}, {"mask": rng.random((2, 1, 5, 7)) < 0.6}),
        "slopes": ({"alibi_slopes": normal(4)}, {"q_offset": [1, 4]}),
        "slopes of each entry": ({"alibi_slopes": normal(2, 4)}, {"causal": True, "kv_starts": [0, 3]}),
        "t5": ({"t5": normal(8, 4)}, {"q_lens": [3, 5], "kv_lens": [7, 6]}),
        "relative": ({"r": normal(4, 6, 3), "u": normal(4, 3), "w": normal(4, 3)}, {"q_offset": 2, "causal": True}),
        "shared r": ({"r": normal(9, 3), "u": normal(4, 3), "w": normal(4, 3)}, {"q_offset": 2, "r_origin": 4}),
        "lengths": ({"sinks": normal(4)}, {"q_lens": [0, 4], "kv_lens": [7, 0], "causal": True}),
    }
    extra, options = given[name]
    return {**arguments, **extra}, options


NAMES = (
    *("plain", "two axes", "heads last", "broadcast", "scale", "no scale", "softcap", "bias", "bias of rows", "slopes"),
    *("slopes of each entry", "t5", "relative", "shared r", "lengths"),
)


def call(function: Any, arguments: dict[str, Any], options: dict[str, Any], *first: Any, **more: Any) -> Any:
    """Call a function of the reference, whose options hold tables and vectors in other forms."""
    given = {**arguments, **options, **more}
    if "t5" in given:
        given["t5"] = sa.T5Bias(given["t5"], max_distance=5)
    if "r" in given:
        given["relative"] = (given.pop("r"), given.pop("u"), given.pop("w"), given.pop("r_origin", 0))
    if "scale" in given:
        given["scale"] = float(given["scale"])
    return function(*first, given.pop("q"), given.pop("k"), given.pop("v"), **given)


@pytest.mark.parametrize("name", NAMES)
def test_against_central_differences(rng: Any, name: str) -> None:
    arguments, options = problem(rng, name)
    results = call(reference.attention, arguments, options)
    seen = np.isfinite(results.lse)
    upstream = [rng.standard_normal(x.shape) for x in results[:3]]

    def loss(changed: dict[str, Any]) -> float:
        out, lse, weights = call(reference.attention, changed, options)[:3]
        return float(sum(np.sum(a * b) for a, b in zip(upstream, (out, np.where(seen, lse, 0), weights), strict=True)))

    more = {"grad_lse": upstream[1], "grad_weights": upstream[2], "wrt": tuple(arguments)}
    found = call(reference.attention_backward, arguments, options, upstream[0], **more)
    for argument, value in arguments.items():
        gradient, magnitude = found.gradients[argument], found.magnitudes[argument]
        assert gradient.shape == magnitude.shape == value.shape
        assert np.all(abs(gradient) <= magnitude * (1 + 1e-12))
        for _ in range(3):
            step = 1e-5 * rng.choice([-1, 1], value.shape)
            ends = [loss({**arguments, argument: value + s}) for s in (step, -step)]
            expected = (ends[0] - ends[1]) / 2
            bound = 1e-8 * float(np.sum(abs(step) * (1 + magnitude)))
            assert abs(float(np.sum(gradient * step)) - expected) <= bound, argument


def test_longdouble_is_an_option(rng: Any) -> None:
    q, k, v, grad_out = rng.standard_normal((4, 2, 5, 3))
    found = reference.attention_backward(grad_out, q, k, v, dtype=np.longdouble, causal=True)
    assert all(x.dtype == np.longdouble for x in found.gradients.values())
    expected = reference.attention_backward(grad_out, q, k, v, causal=True)
    assert all(np.allclose(x, expected.gradients[name], rtol=1e-12) for name, x in found.gradients.items())
