"""A hypothesis strategy: attention with random shapes, strides and options."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

checked = settings(deadline=None, max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
NARROW = [np.float16, ml_dtypes.bfloat16]
TYPES = [np.float32, np.float64, *NARROW]
lengths = st.one_of(st.integers(1, 20), st.sampled_from([47, 48, 49, 96, 97, 127, 128, 129, 300]))


def limits(draw: Any, rng: np.random.Generator, sizes: tuple[int, int, int]) -> dict[str, Any]:
    """Return options that limit by positions and lengths which keys are visible."""
    batch, q_len, kv_len = sizes
    options: dict[str, Any] = {}
    if draw(st.booleans()):
        options["causal"] = True
    if draw(st.booleans()):
        options["q_offset"] = (
            rng.integers(-q_len, kv_len + 5, batch) if draw(st.booleans()) else draw(st.integers(-9, 99))
        )
    if draw(st.booleans()):
        side = st.one_of(st.none(), st.integers(0, 150))
        options["window"] = (draw(side), draw(side))
    if draw(st.booleans()):
        options["chunk"] = draw(st.integers(1, 99))
    elif options.get("window", (None, None))[0] is None and draw(st.booleans()):
        options["prefix_lens"] = rng.integers(0, kv_len + 1, batch)
    if draw(st.booleans()):
        options["kv_lens"] = rng.integers(0, kv_len + 1, batch)
        if "q_offset" not in options:  # lengths below q_len are ambiguous without q_lens
            options["q_lens"] = rng.integers(0, q_len + 1, batch)
    if draw(st.booleans()):
        options["q_lens"] = rng.integers(0, q_len + 1, batch)
    if draw(st.booleans()):
        options["kv_starts"] = rng.integers(0, kv_len + 1, batch)
    return options


@st.composite
def problems(draw: Any) -> tuple[list[Any], dict[str, Any]]:
    rng = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    batch, kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    heads, q_len, kv_len = kv_heads * group, draw(lengths), draw(lengths)
    dim, value_dim = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    dtype = draw(st.sampled_from(TYPES))
    keys = draw(st.sampled_from(NARROW)) if dtype not in NARROW and draw(st.booleans()) else dtype
    shapes = [(batch, heads, q_len, dim), (batch, kv_heads, kv_len, dim), (batch, kv_heads, kv_len, value_dim)]
    arrays = []
    for shape, kind in zip(shapes, (dtype, keys, keys), strict=True):
        step = draw(st.sampled_from([1, 1, 2, -1]))
        wide = rng.standard_normal((*shape[:-1], shape[-1] * abs(step))).astype(kind)
        arrays.append(wide[..., ::step] if draw(st.booleans()) else np.asfortranarray(wide[..., ::step]))
    scores = (batch, heads, q_len, kv_len)
    options: dict[str, Any] = {}

    def broadcast() -> tuple[int, ...]:
        return tuple(n if draw(st.booleans()) else 1 for n in scores)

    options |= limits(draw, rng, (batch, q_len, kv_len))
    if draw(st.booleans()):
        options["mask"] = rng.random(broadcast()) < draw(st.sampled_from([0.1, 0.5, 0.95]))
    if draw(st.booleans()):
        options["bias"] = rng.standard_normal(broadcast()).astype(draw(st.sampled_from(TYPES)))
    if draw(st.booleans()):
        options["softcap"] = draw(st.floats(0.1, 30))
    if draw(st.booleans()):
        options["alibi_slopes"] = rng.random(heads) / 50
    if draw(st.booleans()):
        options["sinks"] = rng.standard_normal(heads)
    if draw(st.booleans()):
        options["scale"] = draw(st.floats(-1, 1))
    if draw(st.booleans()):
        options.update(dropout=draw(st.floats(0, 0.9)), seed=draw(st.integers(0, 2**64 - 1)))
    return arrays, options
