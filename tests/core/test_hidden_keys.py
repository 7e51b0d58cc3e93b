"""What is hidden does not matter, and what is visible reaches exactly the rows that see it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from mask_cases import SHAPES, arrays

import selfattn as sa
from selfattn import reference

pytestmark = pytest.mark.dtypes("float32", "float64")


def hidden_cases(shape: Any, rng: np.random.Generator) -> list[tuple[dict[str, Any], Any]]:
    """Options, and the keys (B, 1, Sk) that they hide from every row."""
    batch, _heads, _, q_len, kv_len = shape
    keys = np.arange(kv_len)
    lengths = rng.integers(1, kv_len, batch)
    some = rng.random(kv_len) < 0.5
    bias = np.where(some, 0.3, -np.inf)
    last = max(kv_len - 7, 1)
    return [
        ({"kv_lens": lengths}, keys >= lengths[:, None, None]),
        ({"mask": some}, ~some[None, None]),
        ({"bias": bias}, ~some[None, None]),
        ({"causal": True, "q_offset": last - q_len}, (keys >= last)[None, None]),
        ({"window": (3, 3), "q_offset": 20}, ((keys < 17) | (keys > 22 + q_len))[None, None]),
    ]


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("shape", SHAPES)
def test_hidden_values_are_inert(isa: str, rng: Any, shape: Any, garbage: float) -> None:
    for options, hidden in hidden_cases(shape, rng):
        q, k, v = arrays(rng, shape)
        expected = sa.attention(q, k, v, return_lse=True, return_weights=True, **options)
        for spoiled in (k, v):
            spoiled[np.broadcast_to(hidden, spoiled.shape[:3])] = garbage
        found = sa.attention(q, k, v, return_lse=True, return_weights=True, **options)
        assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True)), options


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["q", "k", "v", "bias"])
@pytest.mark.parametrize("q_len", [4, 60])
def test_visible_values_reach_the_rows_that_see_them(
    isa: str, normal: Any, value: float, where: str, q_len: int
) -> None:
    kv_len, place = 200, 150
    q, k, v = normal(1, q_len, 8), normal(1, kv_len, 8), normal(1, kv_len, 8)
    bias = np.zeros((q_len, kv_len), np.float32)
    options = {"bias": bias, "causal": True, "q_offset": place - q_len // 2}
    before = sa.attention(q, k, v, **options)
    sees = np.arange(q_len) + place - q_len // 2 >= place
    match where:
        case "q":
            q[0, q_len // 2 :, 3] = value
        case "k":
            k[0, place] = value
        case "v":
            v[0, place] = value
        case "bias":
            bias[:, place] = value
    out = sa.attention(q, k, v, **options)
    assert not np.isfinite(out[0, sees]).any()
    assert np.array_equal(out[0, ~sees], before[0, ~sees])


@pytest.mark.parametrize("shape", [(1, 700), (5, 700), (40, 700), (1, 4000), (60, 5000), (130, 900)])
@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_value_propagates_from_any_block(isa: str, normal: Any, shape: Any, which: str, value: float) -> None:
    # A NaN met early must survive all later blocks and the merging of ranges.
    q_len, kv_len = shape
    for place in (0, 5, kv_len // 2, kv_len - 1):
        for options in ({}, {"causal": True}, {"mask": np.arange(kv_len) % 3 < 2}, {"sinks": [0.5]}, {"softcap": 3.0}):
            qkv = {"q": normal(1, q_len, 8), "k": normal(1, kv_len, 8), "v": normal(1, kv_len, 8)}
            qkv[which][0, min(place, qkv[which].shape[1] - 1), 3] = value
            exact = reference.attention(**qkv, **options)
            out, lse = sa.attention(**qkv, **options, return_lse=True)
            for found, wanted in ((out, exact.out), (lse, exact.lse)):
                finite = np.isfinite(wanted)
                assert np.array_equal(np.isnan(found), np.isnan(wanted))
                assert np.array_equal(found[np.isinf(wanted)], wanted[np.isinf(wanted)])
                assert np.allclose(found[finite], wanted[finite], atol=1e-4)


@pytest.mark.parametrize(
    "lowest",
    [
        -1e9,
        -2.3e38,
        float(np.finfo(np.float32).min),
        -1e300,
    ],
)
@pytest.mark.parametrize("q_len", [2, 40])
def test_a_large_finite_bias_hides_nothing(isa: str, normal: Any, lowest: float, q_len: int) -> None:
    # Models pad with the lowest float. Among other keys such a key has weight 0; a row of such keys only is a mean.
    q, k, v = normal(q_len, 8), normal(50, 8), normal(50, 8)
    bias = np.zeros((q_len, 50), np.float64 if lowest < -1e39 else np.float32)
    bias[:, 20:] = lowest
    expected = sa.attention(q, k, v, mask=np.arange(50) < 20)
    assert np.array_equal(sa.attention(q, k, v, bias=bias), expected)
    bias[1] = lowest
    out, lse = sa.attention(q, k, v, bias=bias, return_lse=True)
    assert np.isfinite(out).all()
    assert np.all(out[1] <= v.max(axis=0))
    assert np.all(out[1] >= v.min(axis=0))
    assert not np.isnan(lse).any()


def test_a_row_whose_visible_scores_are_all_minus_infinity_is_nan(isa: str) -> None:
    # Not the same as seeing nothing.
    for q_len in (2, 30):
        q, k, v = np.ones((q_len, 2), np.float32), np.full((5, 2), -np.inf, np.float32), np.ones((5, 2), np.float32)
        out, lse = sa.attention(q, k, v, return_lse=True)
        assert np.isnan(out).all()
        assert np.isneginf(lse).all()
        assert not sa.attention(q, k, v, mask=np.zeros((q_len, 5), bool)).any()
        assert not sa.attention(q, k, v, sinks=[0.0]).any()
        first = sa.attention(q, k, v, causal=True, q_offset=0)  # the first row sees one key, the first one
        assert np.isnan(first).all()
        only = np.arange(5) == 4
        assert np.isnan(sa.attention(q, k, v, mask=only)).all()
        assert np.isnan(sa.attention(q, k, v, bias=np.where(only, 0.0, -np.inf))).all()


def test_mask_and_bias_hide_the_same(isa: str, normal: Any, rng: Any) -> None:
    q, k, v = normal(2, 40, 8), normal(2, 90, 8), normal(2, 90, 8)
    mask = rng.random((40, 90)) < 0.5
    bias = np.where(mask, np.float32(0), np.float32(-np.inf))
    assert np.array_equal(sa.attention(q, k, v, mask=mask), sa.attention(q, k, v, bias=bias))
    nan = np.where(mask, np.float32(0), np.float32(np.nan))
    assert np.array_equal(sa.attention(q, k, v, mask=mask, bias=nan), sa.attention(q, k, v, mask=mask))


@pytest.mark.parametrize("q_len", [3, 50])
@pytest.mark.parametrize("value_dim", [5, 11, 16, 21])
@pytest.mark.parametrize("column", [0, -1])
def test_hidden_values_are_inert_in_each_column(isa: str, normal: Any, q_len: int, value_dim: int, column: int) -> None:
    q, k, v = normal(q_len, 8), normal(90, 8), normal(90, value_dim)
    mask = np.arange(90) % 5 > 1
    for options, hidden in (({"mask": mask}, ~mask), ({"kv_lens": 61}, np.arange(90) >= 61)):
        expected = sa.attention(q, k, v, **options)
        spoiled = v.copy()
        spoiled[hidden, column] = np.nan
        assert np.array_equal(sa.attention(q, k, spoiled, **options), expected)


@pytest.mark.parametrize("q_len", [3, 50])
@pytest.mark.parametrize("q_offset", [10, 30, 80])
def test_values_that_only_some_rows_see(isa: str, normal: Any, q_len: int, q_offset: int) -> None:
    # Some NaN are hidden from all rows, others reach the last rows.
    q, k, v = normal(q_len, 8), normal(90, 8), normal(90, 8)
    mask = np.arange(90) % 7 > 0
    options = {"mask": mask, "causal": True, "q_offset": q_offset}
    expected = sa.attention(q, k, v, **options)
    v[~mask] = np.nan
    v[q_offset + 2, 3] = np.inf
    found = sa.attention(q, k, v, **options)
    assert np.array_equal(found[:2], expected[:2])
    sees = bool(mask[q_offset + 2])
    assert np.isinf(found[2:, 3]).all() == sees
    assert np.array_equal(np.delete(found[2:], 3, 1), np.delete(expected[2:], 3, 1))


@pytest.mark.parametrize("slope", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("q_len", [3, 50])
def test_no_slope_brings_a_hidden_key_back(isa: str, normal: Any, q_len: int, slope: float) -> None:
    q, k, v = normal(1, q_len, 8), normal(1, 90, 8), normal(1, 90, 8)
    mask = np.ones((q_len, 90), bool)
    mask[1] = False
    out, lse = sa.attention(q, k, v, mask=mask, alibi_slopes=[slope], return_lse=True)
    assert not out[0, 1].any()
    assert np.isneginf(lse[0, 1])


@pytest.mark.parametrize("q_len", [3, 50])
def test_a_nan_among_hidden_keys_is_visible(isa: str, normal: Any, q_len: int) -> None:
    q, k, v = normal(q_len, 8), normal(90, 8), normal(90, 8)
    for place in (0, 41, 89):
        bias = np.full(90, -np.inf, np.float32)
        bias[place] = np.nan
        assert np.isnan(sa.attention(q, k, v, bias=bias)).all()
        assert not sa.attention(q, k, v, bias=bias, mask=np.arange(90) != place).any()


def test_weights_of_hidden_keys_are_zero_next_to_a_visible_nan(isa: str, normal: Any) -> None:
    q, k = normal(1, 2, 8), normal(1, 6, 8)
    k[0, 1, 0] = np.nan
    mask = np.array([True, True, False, True, False, True])
    _, weights = sa.attention(q, k, k, mask=mask, return_weights=True)
    assert np.isnan(weights[..., mask]).all()
    assert np.all(weights[..., ~mask] == 0)


def test_weights_of_scores_that_all_are_minus_infinity_are_nan(isa: str) -> None:
    q, k, v = np.ones((2, 1), np.float32), np.full((3, 1), -np.inf, np.float32), np.ones((3, 1), np.float32)
    out, weights = sa.attention(q, k, v, return_weights=True)
    assert np.isnan(out).all()
    assert np.isnan(weights).all()
