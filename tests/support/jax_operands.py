"""Operands and options of tests with JAX."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
jnp = jax.numpy
attend = importlib.import_module("selfattn.integrations.jax").dot_product_attention
theirs = jax.nn.dot_product_attention

BATCH, ROWS, KEYS, HEADS, GROUPS, WIDTH = 2, 9, 7, 4, 2, 8


@contextmanager
def float64() -> Iterator[None]:
    """Give JAX float64 for a while; as a decorator, ``@float64()``, during a test."""
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", False)


def normal(seed: int, *shape: int, dtype: Any = "float32") -> Any:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape)).astype(dtype)


def qkv(dtype: Any = "float32", rows: int = ROWS, keys: int = KEYS, width: int = WIDTH) -> tuple[Any, Any, Any]:
    return (
        normal(1, BATCH, rows, HEADS, width, dtype=dtype),
        normal(2, BATCH, keys, GROUPS, width, dtype=dtype),
        normal(3, BATCH, keys, GROUPS, width, dtype=dtype),
    )


def mask(*shape: int) -> Any:
    kept = np.random.default_rng(4).random(shape) < 0.7
    kept[..., 0] = True  # no row is empty: JAX averages all values there
    return jnp.asarray(kept)


def lengths(*numbers: int) -> Any:
    return jnp.asarray(numbers, "int32")


# Options as JAX's function takes them; no row that counts is empty.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": -0.3},
    "causal": {"is_causal": True},
    "window": {"local_window_size": 2},
    "sides": {"local_window_size": (3, 0)},
    "query lengths": {"query_seq_lengths": lengths(4, 9)},
    "key lengths": {"key_value_seq_lengths": lengths(7, 1)},
    "window and lengths": {
        "local_window_size": (3, 1),
        "query_seq_lengths": lengths(4, 9),
        "key_value_seq_lengths": lengths(7, 6),
    },
    "mask": {"mask": mask(BATCH, HEADS, ROWS, KEYS)},
    "mask of keys": {"mask": mask(BATCH, 1, 1, KEYS)},
    "bias": {"bias": normal(5, BATCH, HEADS, ROWS, KEYS)},
    "shared bias": {"bias": normal(5, 1, HEADS, ROWS, KEYS)},
    "one bias": {"bias": normal(5, 1, 1, ROWS, KEYS)},
    "bias of keys": {"bias": normal(5, BATCH, 1, 1, KEYS)},
    "bias of heads' keys": {"bias": normal(5, 1, HEADS, 1, KEYS)},
    "bias of rows": {"bias": normal(5, 1, HEADS, ROWS, 1)},
    "all": {
        "bias": normal(5, 1, HEADS, ROWS, KEYS),
        "mask": mask(BATCH, 1, ROWS, KEYS),
        "scale": 0.5,
        "is_causal": True,
        "query_seq_lengths": lengths(9, 5),
        "key_value_seq_lengths": lengths(6, 7),
    },
}
# Every option in float32, and the other types where they matter most. JAX compiles for each of them.
each_option = pytest.mark.parametrize(
    ("dtype", "options"),
    [
        pytest.param(dtype, options, id=f"{dtype}-{name}")
        for dtype in ("float32", "float64", "bfloat16", "float16")
        for name, options in OPTIONS.items()
        if dtype == "float32" or name in ("plain", "all", "bias of rows")
    ],
)
# JAX 0.6 ignores a window without other masks, and query lengths without those of keys.
some_options = pytest.mark.parametrize("name", ["causal", "window and lengths", "bias of heads' keys", "all"])


def to_core(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of `selfattn.attention` that mean the same."""
    given = {name: np.asarray(value) if hasattr(value, "dtype") else value for name, value in options.items()}
    window = given.get("local_window_size")
    return {
        "layout": "bshd",
        "q_offset": 0,
        "causal": given.get("is_causal", False),
        "window": (window, window) if isinstance(window, int) else window,
        "q_lens": given.get("query_seq_lengths"),
        "kv_lens": given.get("key_value_seq_lengths"),
        **{name: given[name] for name in ("bias", "mask", "scale") if name in given},
    }


def assert_bits(found: Any, expected: Any) -> None:
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert found.tobytes() == expected.tobytes()


def assert_close(found: Any, expected: Any, units: float = 30) -> None:
    """Compare with a tolerance in units of the last place of float32 at the size of the largest number."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    assert np.max(abs(found - expected), initial=0) <= units * 2.0**-24 * max(1, np.max(abs(expected), initial=0))
