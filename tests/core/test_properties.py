"""Hypothesis: random shapes, strides and options, against the reference; and changes that must not change a result."""

from __future__ import annotations

import itertools
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import selfattn as sa

checked = settings(deadline=None, max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
NARROW = [np.float16, ml_dtypes.bfloat16]
TYPES = [np.float32, np.float64, *NARROW]
lengths = st.one_of(st.integers(1, 20), st.sampled_from([47, 48, 49, 96, 97, 127, 128, 129, 300]))


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
        options["mask"] = rng.random(broadcast()) < draw(st.sampled_from([0.1, 0.5, 0.95]))
    if draw(st.booleans()):
        options["bias"] = rng.standard_normal(broadcast()).astype(draw(st.sampled_from(TYPES)))
    if draw(st.booleans()):
        options["kv_lens"] = rng.integers(0, kv_len + 1, batch)
        if "q_offset" not in options:  # lengths below q_len are ambiguous without q_lens
            options["q_lens"] = rng.integers(0, q_len + 1, batch)
    if draw(st.booleans()):
        options["q_lens"] = rng.integers(0, q_len + 1, batch)
    if draw(st.booleans()):
        options["kv_starts"] = rng.integers(0, kv_len + 1, batch)
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


@checked
@given(problems())
def test_any_problem(isa: str, check: Any, problem: Any) -> None:
    arrays, options = problem
    check(*arrays, trivial=True, **options)


@checked
@given(st.integers(0, 1 << 30), st.integers(1, 60), st.integers(1, 200))
def test_the_order_of_keys_hardly_matters(seed: int, q_len: int, kv_len: int) -> None:
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((n, 6)) for n in (q_len, kv_len, kv_len))
    mask = rng.random((q_len, kv_len)) < 0.7
    order = rng.permutation(kv_len)
    found = sa.attention(q, k[order], v[order], mask=mask[:, order])
    assert np.allclose(found, sa.attention(q, k, v, mask=mask), rtol=0, atol=1e-13)


@checked
@given(st.integers(0, 1 << 30), st.integers(1, 60), st.integers(1, 140), st.integers(1, 140), st.sampled_from(TYPES))
def test_hidden_keys_behind_the_others_change_no_bit(
    isa: str, seed: int, q_len: int, kv_len: int, more: int, dtype: Any
) -> None:
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((n, 6)).astype(dtype) for n in (q_len, kv_len + more, kv_len + more))
    k[kv_len:], v[kv_len:] = np.nan, np.inf
    expected = sa.attention(q, k[:kv_len], v[:kv_len])
    assert np.array_equal(sa.attention(q, k, v, kv_lens=kv_len), expected)
    assert np.array_equal(sa.attention(q, k, v, mask=np.arange(kv_len + more) < kv_len), expected)


@checked
@given(st.integers(0, 1 << 30), st.integers(2, 150), st.integers(1, 149), st.sampled_from(TYPES))
def test_causal_rows_ignore_what_comes_later(isa: str, seed: int, length: int, cut: int, dtype: Any) -> None:
    rng = np.random.default_rng(seed)
    cut = min(cut, length - 1)
    q, k, v = (rng.standard_normal((length, 6)).astype(dtype) for _ in range(3))
    expected = sa.attention(q, k, v, causal=True)
    k[cut:], v[cut:] = np.nan, np.nan
    found = sa.attention(q, k, v, causal=True)
    assert np.array_equal(found[:cut], expected[:cut])
    assert np.isnan(found[cut:]).all()


@checked
@given(st.integers(0, 1 << 30), st.integers(1, 40), st.lists(st.integers(1, 90), min_size=1, max_size=5))
def test_parts_merge_into_the_whole(seed: int, q_len: int, sizes: list[int]) -> None:
    rng = np.random.default_rng(seed)
    ends = np.cumsum([0, *sizes])
    q, k, v = (rng.standard_normal((n, 6)) for n in (q_len, ends[-1], ends[-1]))
    mask = rng.random((q_len, ends[-1])) < 0.3
    parts = [sa.attention(q, k[a:b], v[a:b], mask=mask[:, a:b], return_lse=True) for a, b in itertools.pairwise(ends)]
    out, lse = sa.merge_states(*zip(*parts, strict=True))
    expected, expected_lse = sa.attention(q, k, v, mask=mask, return_lse=True)
    assert np.allclose(out, expected, rtol=0, atol=1e-13)
    assert np.allclose(lse, expected_lse, rtol=1e-13)


@pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("factor", [-2.0, 0.5, 4.0])
def test_values_scale_through(isa: str, normal: Any, factor: float, dtype: Any) -> None:
    q, k, v = normal(70, 8, dtype=dtype), normal(90, 8, dtype=dtype), normal(90, 8, dtype=dtype)
    found = sa.attention(q, k, v * np.dtype(dtype).type(factor))
    assert np.array_equal(found, sa.attention(q, k, v) * np.dtype(dtype).type(factor))


@checked
@given(st.integers(0, 1 << 30), st.integers(1, 60), st.integers(1, 200), st.sampled_from(NARROW))
def test_numbers_of_16_bits_are_those_of_float32_rounded_once(
    isa: str, seed: int, q_len: int, kv_len: int, dtype: Any
) -> None:
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((n, 6)).astype(dtype) for n in (q_len, kv_len, kv_len))
    found, lse = sa.attention(q, k, v, return_lse=True)
    wide = [x.astype(np.float32) for x in (q, k, v)]
    expected, expected_lse = sa.attention(*wide, return_lse=True)
    plans = [sa.explain(q, k, v), sa.explain(*wide)]
    if all(plan["unit"] == "fma" and plan["kernel"] == plans[0]["kernel"] for plan in plans):
        assert np.array_equal(lse, expected_lse)
        assert np.array_equal(found, expected.astype(dtype))
    else:  # bfloat16 weights are rounded, float16 is split in two; and another kernel adds in another order
        ulp = np.finfo(dtype).eps if dtype == np.float16 else 2.0**-7
        assert np.allclose(lse, expected_lse, rtol=0, atol=1e-3)
        assert np.allclose(found.astype(float), expected, rtol=0, atol=ulp * float(abs(v.astype(float)).max()))
