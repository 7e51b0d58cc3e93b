"""What is hidden has gradient 0 and changes no bit of another gradient; what is visible reaches only who sees it."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import selfattn as sa
from selfattn import reference

pytestmark = [pytest.mark.dtypes("float32", "float64"), pytest.mark.matrix]

# Some instruction sets multiply bfloat16 in pairs of keys or of rows, one of which may be hidden.
BOTH = pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])

# Several strips, blocks of rows, blocks of keys and, with 64 elements per vector, ranges of keys.
SHAPES = [(2, 4, 2, 40, 70, 5), (1, 1, 1, 33, 51, 8), (1, 2, 1, 130, 450, 64)]
NAMES = ("q", "k", "v", "scale", "sinks", "alibi_slopes", "bias")


def operands(rng: Any, shape: Any, dtype: Any) -> tuple[dict[str, Any], Any]:
    """Return q, k and v by name, and a gradient of out."""
    batch, heads, kv_heads, q_len, kv_len, dim = shape
    q, grad_out = rng.standard_normal((2, batch, heads, q_len, dim)).astype(dtype)
    k, v = rng.standard_normal((2, batch, kv_heads, kv_len, dim)).astype(dtype)
    return {"q": q, "k": k, "v": v}, grad_out


def gradients(qkv: dict[str, Any], grad_out: Any, wrt: Any = NAMES, **options: Any) -> dict[str, Any]:
    upstream = {name: options.pop(name, None) for name in ("grad_lse", "grad_weights")}
    _, vjp = sa.attention_vjp(**qkv, wrt=wrt, **options)
    return {name: x for name, x in vjp(grad_out, **upstream)._asdict().items() if x is not None}


def same(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    return found.keys() == expected.keys() and all(np.array_equal(found[name], expected[name]) for name in expected)


def hidden_cases(shape: Any, rng: Any) -> list[tuple[dict[str, Any], Any]]:
    """Options, and the keys (B or 1, 1, Sk) that they hide from every row."""
    batch, _, _, q_len, kv_len, _ = shape
    keys, some = np.arange(kv_len), rng.random(kv_len) < 0.5
    lengths = rng.integers(q_len, kv_len, batch)
    last = kv_len - 7
    return [
        ({"kv_lens": lengths}, keys >= lengths[:, None, None]),
        ({"kv_starts": lengths}, keys < lengths[:, None, None]),
        ({"mask": some}, ~some[None, None]),
        ({"mask": keys < 7}, (keys >= 7)[None, None]),
        ({"bias": np.where(some, np.float32(0.3), np.float32(-np.inf))}, ~some[None, None]),
        ({"causal": True, "q_offset": last - q_len}, (keys >= last)[None, None]),
        ({"window": (3, 3), "q_offset": 20}, ((keys < 17) | (keys > 22 + q_len))[None, None]),
        ({"mask": np.zeros(kv_len, bool)}, np.ones((1, 1, kv_len), bool)),
    ]


@BOTH
@pytest.mark.parametrize("garbage", [np.nan, np.inf, 3e38])
@pytest.mark.parametrize("shape", SHAPES)
def test_hidden_keys(isa: str, rng: Any, shape: Any, garbage: float, dtype: Any) -> None:
    for options, hidden in hidden_cases(shape, rng):
        given = {"sinks": rng.standard_normal(shape[1]), "alibi_slopes": np.full(shape[1], 0.01), **options}
        given.setdefault("bias", np.zeros(shape[4], np.float32))
        qkv, grad_out = operands(rng, shape, dtype)
        given["grad_weights"] = rng.standard_normal((*qkv["q"].shape[:3], shape[4])).astype(np.float32)
        expected = gradients(qkv, grad_out, **given)
        for name in "kv":
            everywhere = np.broadcast_to(hidden, qkv[name].shape[:3])
            qkv[name][everywhere] = garbage
            assert not expected[name][everywhere].any()
        given["grad_weights"][np.broadcast_to(hidden[:, :, None], given["grad_weights"].shape)] = garbage
        assert all(np.isfinite(x.astype(np.float64)).all() for x in expected.values())
        assert same(gradients(qkv, grad_out, **given), expected), options


@BOTH
@pytest.mark.parametrize("garbage", [np.nan, -np.inf])
@pytest.mark.parametrize("shape", SHAPES)
def test_queries_that_see_nothing(isa: str, rng: Any, shape: Any, garbage: float, dtype: Any) -> None:
    batch, heads, _, q_len, kv_len, _ = shape
    lengths, rows = rng.integers(1, q_len, batch), np.arange(q_len)
    mask = np.broadcast_to(rng.random(q_len)[:, None] < 0.8, (q_len, kv_len))
    bias = rng.standard_normal((q_len, kv_len)).astype(np.float32)
    for options, unseen in (
        ({"q_lens": lengths}, rows >= lengths[:, None, None]),
        ({"mask": mask}, ~mask[None, None, :, 0]),
        ({"causal": True, "q_offset": -9}, (rows < 9)[None, None]),
    ):
        given = {"sinks": rng.standard_normal(heads), "alibi_slopes": np.full(heads, 0.01), "bias": bias, **options}
        qkv, grad_out = operands(rng, shape, dtype)
        given["grad_lse"] = rng.standard_normal(grad_out.shape[:3]).astype(np.float32)
        given["grad_weights"] = rng.standard_normal((*grad_out.shape[:3], kv_len)).astype(np.float32)
        expected = gradients(qkv, grad_out, **given)
        everywhere = np.broadcast_to(unseen, grad_out.shape[:3])
        assert not expected["q"][everywhere].any()
        for array in (qkv["q"], given["grad_weights"]):
            array[everywhere] = garbage
        if "q_lens" in options:  # the sink of a row that sees no key counts, unless the row is padding
            grad_out[everywhere] = given["grad_lse"][everywhere] = garbage
        assert same(gradients(qkv, grad_out, **given), expected), options


def visible_pairs(shape: Any, options: dict[str, Any]) -> Any:
    """Return which query sees which key, for the only head and batch entry."""
    return reference.visibility(shape[3], shape[4], **options)[0]


LIMITS: list[dict[str, Any]] = [
    {"causal": True, "q_offset": 3},
    {"window": (5, 9), "q_offset": 60},
    {"mask": np.random.default_rng(1).random((120, 430)) < 0.05},
    {"bias": np.where(np.random.default_rng(2).random((120, 430)) < 0.05, np.float32(0), np.float32(-np.inf))},
]


@BOTH
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("options", LIMITS, ids=lambda options: "-".join(options))
@pytest.mark.parametrize("where", ["q", "grad_out", "grad_lse", "k", "v"])
def test_a_visible_value_reaches_only_those_who_see_it(
    isa: str, rng: Any, options: Any, where: str, value: float, dtype: Any
) -> None:
    shape = (1, 1, 1, 120, 430, 64)
    qkv, grad_out = operands(rng, shape, dtype)
    upstream = {"grad_out": grad_out, "grad_lse": rng.standard_normal(grad_out.shape[:3]).astype(np.float32)}
    sees = visible_pairs(shape, options)
    before = gradients(qkv, **upstream, wrt=("q", "k", "v"), **options)
    places = rng.choice(100, 2, replace=False)
    spoiled = {**qkv, **upstream}[where]
    spoiled[0, 0, places] = value
    rows = sees[:, places].any(axis=1) if where in "kv" else np.isin(np.arange(120), places)
    keys = sees[rows].any(axis=0) | (np.isin(np.arange(430), places) if where in "kv" else False)
    found = gradients(qkv, **upstream, wrt=("q", "k", "v"), **options)
    for name, touched in (("q", rows), ("k", keys), ("v", keys)):
        assert np.array_equal(found[name][0, 0, ~touched], before[name][0, 0, ~touched]), name
    seen = rows & sees.any(axis=1)
    assert seen.any()
    assert not np.isfinite(found["q"][0, 0, seen].astype(np.float32)).any()


@pytest.mark.parametrize("lowest", [-1e9, -1e20, -3e37, float(np.finfo(np.float32).min)])
def test_padding_with_large_negative_numbers(isa: str, normal: Any, lowest: float) -> None:
    # Rows that hold nothing else are padding as well.
    q, k, v = normal(2, 60, 8), normal(2, 110, 8), normal(2, 110, 8)
    mask = np.ones((60, 110), bool)
    mask[:, 70:] = mask[50:] = False
    given = {"bias": np.where(mask, np.float32(0.5), np.float32(lowest)), "sinks": [0.0, 1.0]}
    wrt = ("q", "k", "v", "scale")
    for options in ({"bias": given["bias"]}, given):
        hidden = {**options, "bias": np.where(mask, np.float32(0.5), np.float32(-np.inf))}
        out, lse = sa.attention(q, k, v, return_lse=True, **options)
        expected = gradients({"q": q, "k": k, "v": v}, q, wrt, **hidden)
        assert same(gradients({"q": q, "k": k, "v": v}, q, wrt, **options), expected)
        rounded = sa.attention_backward(q, q, k, v, out, lse, **options)
        assert all(np.allclose(getattr(rounded, name), expected[name], atol=1e-5) for name in "qkv")
        # The log-sum-exp of a float64 call may be given in float32.
        wide = [x.astype(np.float64) for x in (q, k, v)]
        out, lse = sa.attention(*wide, return_lse=True, **options)
        rounded = sa.attention_backward(wide[0], *wide, out, lse.astype(np.float32), **options)
        assert all(np.allclose(getattr(rounded, name), expected[name], atol=1e-5) for name in "qkv")


@pytest.mark.parametrize("size", [1e9, 3e37, 3e38])
def test_finite_scores_have_finite_gradients(isa: str, normal: Any, rng: Any, size: float) -> None:
    q, k, v = normal(2, 60, 8), normal(2, 110, 8), normal(2, 110, 8)
    bias = (size * rng.choice([-1, 0, 1], (60, 110))).astype(np.float32)
    bias[:20] = np.float32(size)
    for scale in (1.0, 1e9, -1e30):
        found = gradients({"q": q, "k": k, "v": v}, q, ("q", "k", "v", "bias"), bias=bias, scale=scale)
        assert all(np.isfinite(x).all() for x in found.values())


@pytest.mark.parametrize("dim", [1, 3, 17, 33])
def test_what_a_call_leaves_in_scratch_memory_does_not_matter(isa: str, normal: Any, dim: int) -> None:
    nan = np.full((1, 2, 300, 64), np.nan, np.float32)
    qkv = {"q": normal(2, 10, dim), "k": normal(2, 110, dim), "v": normal(2, 110, dim)}
    terms = {"bias": normal(2, 10, 110), "alibi_slopes": [0.1, 0.2], "t5": sa.T5Bias(normal(8, 2))}
    for given in ({}, terms):
        asked = ("q", "k", "v", "scale", *given)
        clean = gradients(qkv, qkv["q"], asked, num_threads=1, **given)
        gradients({"q": nan, "k": nan, "v": nan}, nan, num_threads=1, wrt=("q", "k", "v", "scale"))
        assert same(gradients(qkv, qkv["q"], asked, num_threads=1, **given), clean)
