"""AttentionState: the results of attention over all keys, whatever the pieces in which the keys come."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pieces import absorb_all, stream
from random_problems import TYPES, checked, problems

import selfattn as sa
from selfattn import reference
from selfattn._rounding import rounding

BLOCK = sa.AttentionState.block_keys
each_type = pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: np.dtype(dtype).name)
# Queries per head: for the row kernel, and for the tile kernel with enough blocks that attention divides no keys.
ROWS = {"row": 1, "tile": 400}


def same(a: Any, b: Any) -> bool:
    return all(x.dtype == y.dtype and np.array_equal(x, y, equal_nan=True) for x, y in zip(a, b, strict=True))


@pytest.fixture
def check_pieces(assert_accurate: Any) -> Any:
    """Compare a result in pieces with the reference."""

    def run(q: Any, k: Any, v: Any, cuts: Any = (), *, whole_terms: bool = False, **options: Any) -> Any:
        known = {name: x for name, x in options.items() if name not in ("precision", "num_threads")}
        exact = reference.attention(q, k, v, dtype=np.longdouble if q.dtype == np.float64 else np.float64, **known)
        rounded = rounding(q, k, v, **options)
        out, lse = stream(q, k, v, cuts, whole_terms=whole_terms, **options)
        assert (out.dtype, lse.dtype) == (q.dtype, np.float64 if q.dtype == np.float64 else np.float32)
        assert_accurate(out, exact, trivial=True, rounded=rounded)
        assert lse.shape == exact.lse.shape
        finite = np.isfinite(exact.lse)
        assert np.array_equal(np.isneginf(lse), np.isneginf(exact.lse))
        unit = 2.0**-53 if q.dtype == np.float64 else 2.0**-24
        tolerance = (16 + 4 * exact.sigma) * unit + exact.sigma * rounded[1]
        assert np.all(abs(lse[finite] - exact.lse[finite]) <= tolerance * (1 + abs(exact.lse[finite])))
        return out, lse

    return run


def with_t5(options: dict[str, Any], heads: int, seed: int) -> dict[str, Any]:
    table = np.random.default_rng(seed).standard_normal((8, heads))
    return {**options, "t5": sa.T5Bias(table, bidirectional=seed % 3 == 0, max_distance=20 + seed % 50)}


@checked
@given(problems(), st.lists(st.integers(0, 300), max_size=6), st.booleans(), st.integers(0, 5))
def test_any_problem_in_any_pieces(
    isa: str, check_pieces: Any, problem: Any, cuts: list[int], whole_terms: bool, seed: int
) -> None:
    arrays, options = problem
    if seed > 2:
        options = with_t5(options, arrays[0].shape[1], seed)
    cuts = [min(cut, arrays[1].shape[2]) for cut in cuts]
    check_pieces(*arrays, cuts, whole_terms=whole_terms, **options)


@each_type
@pytest.mark.parametrize("q_len", [1, 5, 70])
def test_one_key_at_a_time(isa: str, normal: Any, check_pieces: Any, q_len: int, dtype: Any) -> None:
    q, k, v = normal(2, 4, q_len, 20, dtype=dtype), normal(2, 2, 90, 20, dtype=dtype), normal(2, 2, 90, 9, dtype=dtype)
    check_pieces(q, k, v, range(90), causal=True, window=(50, None), mask=normal(4, q_len, 90) > -1)


def test_layouts_and_axes(isa: str, normal: Any, check_pieces: Any) -> None:
    check_pieces(normal(30, 8), normal(200, 8), normal(200, 5), [3, 130], causal=True)
    q, k, v = normal(3, 30, 4, 8), normal(3, 200, 2, 8), normal(1, 200, 2, 5)
    found = check_pieces(q, k, v, [64, 65], layout="bshd", causal=True)
    swapped = [x.swapaxes(1, 2) for x in (q, k, v)]
    assert same([found[0].swapaxes(1, 2), found[1]], stream(*swapped, [64, 65], causal=True))
    check_pieces(normal(3, 2, 4, 6, 8), normal(2, 1, 70, 8), normal(3, 1, 1, 70, 5), [31])


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_precision(isa: str, normal: Any, check_pieces: Any, precision: str) -> None:
    check_pieces(normal(2, 150, 32), *normal(2, 2, 700, 32), [200, 512], precision=precision)


def options_of(rng: Any, kv_len: int, rows: int) -> dict[str, Any]:
    return {
        "causal": True,
        "window": (kv_len - 50, None),
        "softcap": 5.0,
        "alibi_slopes": rng.random(4) / 50,
        "sinks": rng.standard_normal(4),
        "mask": rng.random((4, rows, kv_len)) < 0.8,
        "bias": rng.standard_normal((1, 1, kv_len)),
        "kv_lens": np.array([kv_len, kv_len - 9]),
        "kv_starts": np.array([7, 0]),
        "q_offset": kv_len - rows,
    }


@each_type
@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("plain", [True, False])
def test_cuts_at_block_keys_change_no_bit(isa: str, rng: Any, normal: Any, kind: str, dtype: Any, plain: bool) -> None:
    kv_len, rows = 3 * BLOCK + 77, ROWS[kind]
    q, k = normal(2, 4, rows, 16, dtype=dtype), normal(2, 2, kv_len, 16, dtype=dtype)
    v = normal(2, 2, kv_len, 24, dtype=dtype)
    options = {} if plain else options_of(rng, kv_len, rows)
    expected = stream(q, k, v, **options)
    for cuts in ([BLOCK], [2 * BLOCK], [BLOCK, BLOCK, 2 * BLOCK, 3 * BLOCK]):
        assert same(stream(q, k, v, cuts, **options), expected)
    if kind == "tile":
        assert same(sa.attention(q, k, v, return_lse=True, **options), expected)
    assert same(stream(q, k, v, [BLOCK], whole_terms=True, **options), expected)


@pytest.mark.parametrize("dim", [300, 576, 1500])
@pytest.mark.parametrize("rows", [1, 60])
def test_wide_heads_are_cut_at_block_keys_too(isa: str, normal: Any, dim: int, rows: int) -> None:
    q, k, v = normal(1, rows, dim), normal(1, 2 * BLOCK, dim), normal(1, 2 * BLOCK, dim - 64)
    assert same(stream(q, k, v, [BLOCK]), stream(q, k, v))


@each_type
@pytest.mark.parametrize("kind", ROWS)
def test_threads_batch_and_strides_change_no_bit(isa: str, normal: Any, kind: str, dtype: Any) -> None:
    q, k, v = normal(3, 4, ROWS[kind], 24, dtype=dtype), *normal(2, 3, 2, 700, 24, dtype=dtype)
    cuts = [100, 350]
    expected = stream(q, k, v, cuts, causal=True, num_threads=1)
    assert same(stream(q, k, v, cuts, causal=True, num_threads=4), expected)
    assert same(stream(q[1:2], k[1:2], v[1:2], cuts, causal=True), [x[1:2] for x in expected])
    strided = [np.asfortranarray(q), k[..., ::-1].copy()[..., ::-1], v.repeat(2, axis=2)[:, :, ::2]]
    assert same(stream(*strided, cuts, causal=True), expected)


@each_type
def test_rows_have_the_bits_that_they_have_among_other_rows(isa: str, normal: Any, dtype: Any) -> None:
    q, k, v = normal(1, 300, 32, dtype=dtype), *normal(2, 1, 2100, 32, dtype=dtype)
    out, lse = stream(q, k, v, [BLOCK, 3 * BLOCK], causal=True)
    for rows in (slice(0, 100), slice(150, 300)):
        part = stream(q[:, rows], k, v, [2 * BLOCK], causal=True, q_offset=1800 + rows.start)
        assert same(part, (out[:, rows], lse[:, rows]))


@pytest.mark.parametrize("rows", ROWS.values())
def test_results_in_between(isa: str, normal: Any, rows: int) -> None:
    q, k, v = normal(1, 2, rows, 16), *normal(2, 1, 2, 900, 16)
    state = sa.AttentionState(q, kv_len=900, causal=True, sinks=[0.5, -1])
    for first in range(0, 900, 300):
        assert state.next_key == first
        state.absorb(k[:, :, first : first + 300], v[:, :, first : first + 300])
        hidden = np.arange(900) < first + 300
        found = state.result()
        assert same(found, state.result())
        expected = sa.attention(q, k, v, causal=True, sinks=[0.5, -1], mask=hidden, return_lse=True)
        assert np.allclose(found[0], expected[0], rtol=0, atol=1e-6)
        assert np.allclose(found[1], expected[1], rtol=0, atol=1e-5)
    assert same(found, stream(q, k, v, [300, 600], causal=True, sinks=[0.5, -1]))


def test_a_later_first_key(isa: str, normal: Any) -> None:
    q, k, v = normal(2, 80, 16), *normal(2, 2, 600, 16)
    mask = normal(80, 600) > -1
    state = sa.AttentionState(q, kv_len=600, first=250, causal=True, mask=mask)
    assert state.next_key == 250
    state.absorb(k[:, 250:300], v[:, 250:300])
    state.absorb(k[:, 300:], v[:, 300:], first=300)
    out, lse = state.result()
    expected = sa.attention(q, k, v, causal=True, mask=mask, kv_starts=250, return_lse=True)
    assert np.allclose(out, expected[0], rtol=0, atol=1e-6)
    assert np.allclose(lse, expected[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows", ROWS.values())
def test_narrower_keys(isa: str, normal: Any, check_pieces: Any, rows: int) -> None:
    for dtype in (np.float16, ml_dtypes.bfloat16):
        k, v = normal(2, 2, 700, 24, dtype=dtype)
        expected = check_pieces(normal(2, rows, 24), k, v, [BLOCK])
        assert expected[0].dtype == np.float32


@pytest.mark.parametrize("rows", ROWS.values())
@pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_hidden_keys_are_inert(isa: str, normal: Any, rows: int, dtype: Any) -> None:
    q, k, v = normal(2, rows, 16, dtype=dtype), *normal(2, 2, 700, 16, dtype=dtype)
    mask = np.arange(700) % 7 < 3
    options = {"mask": mask, "kv_lens": 650, "kv_starts": 20, "causal": True, "q_lens": rows - rows // 3}
    expected = stream(q, k, v, [100, 300], **options)
    mask_or_limit = ~mask | (np.arange(700) < 20) | (np.arange(700) >= 650)
    k[:, mask_or_limit], v[:, mask_or_limit] = np.nan, np.inf
    assert same(stream(q, k, v, [100, 300], **options), expected)
    assert np.isfinite(expected[0].astype(np.float32)).all()


@pytest.mark.parametrize("rows", ROWS.values())
def test_rows_that_see_nothing(isa: str, normal: Any, rows: int) -> None:
    q, k, v = normal(2, rows, 16), *normal(2, 2, 700, 16)
    mask = np.ones((rows, 700), bool)
    mask[0] = False
    out, lse = stream(q, k, v, [100, 300], mask=mask)
    assert not out[:, 0].any()
    assert np.isneginf(lse[:, 0]).all()
    sunk, lse = stream(q, k, v, [100, 300], mask=mask, sinks=[0.25, -3.0])
    assert not sunk[:, 0].any()
    assert np.allclose(lse[:, 0], [0.25, -3.0])
    out, lse = stream(q, k, v, [100], kv_lens=0, q_offset=0)
    assert not out.any()
    assert np.isneginf(lse).all()


@pytest.mark.parametrize("rows", ROWS.values())
@pytest.mark.parametrize("visible", [50, 699])
def test_scores_of_minus_infinity_are_undefined(isa: str, normal: Any, rows: int, visible: int) -> None:
    # A row that sees one key, with score -inf, is NaN as in IEEE arithmetic; if it sees a second key, it is not.
    q, k, v = normal(1, rows, 4), *normal(2, 1, 700, 4)
    q[:, 0] = [1, 0, 0, 0]
    k[:, visible] = [-np.inf, 0, 0, 0]
    mask = np.ones((rows, 700), bool)
    mask[0] = np.arange(700) == visible
    q[:, 1:], k[:, :, 0] = 0, np.where(np.isinf(k[:, :, 0]), k[:, :, 0], 0)
    mask[1:] = False
    for cuts in ([], [100], [50, 51, 699]):
        out, lse = stream(q, k, v, cuts, mask=mask)
        expected = sa.attention(q, k, v, mask=mask, return_lse=True)
        assert same((out, lse), expected)
        assert np.isnan(out[:, 0]).all()
        assert not out[:, 1:].any()
    mask[0, 400] = True
    out, lse = stream(q, k, v, [100, 450], mask=mask)
    assert np.allclose(out[0, 0], v[0, 400])


def test_nothing_at_all(isa: str, normal: Any) -> None:
    for q, k, v in (
        (normal(2, 5, 8), normal(2, 0, 8), normal(2, 0, 3)),
        (normal(2, 0, 8), normal(2, 9, 8), normal(2, 9, 3)),
        (normal(2, 5, 8), normal(2, 9, 8), normal(2, 9, 0)),
        (normal(0, 2, 5, 8), normal(0, 2, 9, 8), normal(0, 2, 9, 3)),
    ):
        assert same(stream(q, k, v), sa.attention(q, k, v, return_lse=True))
    state = sa.AttentionState(normal(2, 5, 8), kv_len=9, sinks=[1.0, 2.0])
    with pytest.raises(ValueError, match=r"AttentionState\.result: nothing was absorbed yet"):
        state.result()
    state.absorb(normal(1, 0, 8), normal(1, 0, 4))
    out, lse = state.result()
    assert out.shape == (2, 5, 4)
    assert not out.any()
    assert np.allclose(lse, [[1.0], [2.0]])


def test_later_changes_of_arguments_do_not_matter(normal: Any) -> None:
    q, k, v = normal(2, 70, 8), *normal(2, 2, 300, 8)
    slopes, sinks, lengths = np.array([0.1, 0.2]), np.array([0.5, -0.5]), np.array(290)
    options = {"alibi_slopes": slopes, "sinks": sinks, "kv_lens": lengths}
    expected = stream(q, k, v, [100], **{name: x.copy() for name, x in options.items()})
    state = sa.AttentionState(q, kv_len=300, **options)
    for x in (q, slopes, sinks, lengths):
        x[...] = 3
    for keys in (slice(0, 100), slice(100, 300)):
        part, values = k[:, keys].copy(), v[:, keys].copy()
        state.absorb(part, values)
        part[...] = values[...] = np.nan
    assert same(state.result(), expected)


@each_type
def test_out(isa: str, normal: Any, dtype: Any) -> None:
    q, k, v = normal(2, 70, 8, dtype=dtype), *normal(2, 2, 300, 8, dtype=dtype)
    state = absorb_all(q, k, v)
    expected = state.result()
    for out in (
        np.zeros((2, 70, 8), dtype),
        np.zeros((2, 8, 70), dtype).swapaxes(1, 2),
        np.zeros((2, 70, 24), dtype)[..., ::3],
    ):
        found, _ = state.result(out)
        assert found is out
        assert same([out], expected[:1])
    with pytest.raises(ValueError, match=r"AttentionState\.result: out has shape \(2, 70, 7\) but"):
        state.result(out=np.zeros((2, 70, 7), dtype))
    with pytest.raises(TypeError, match=r"AttentionState\.result: out has dtype int64, but"):
        state.result(out=np.zeros((2, 70, 8), np.int64))
    assert same(state.result(), expected)


@pytest.mark.one_isa(reason="selects each set itself")
def test_instruction_sets_may_change_in_between(normal: Any) -> None:
    q, k, v = normal(2, 70, 40), *normal(2, 2, 300, 40)
    state = sa.AttentionState(q, kv_len=300, causal=True)
    for i, first in enumerate(range(0, 300, 50)):
        with sa.use_isa(sa.isas()[i % len(sa.isas())]):
            state.absorb(k[:, first : first + 50], v[:, first : first + 50])
    assert np.allclose(state.result()[0], sa.attention(q, k, v, causal=True), rtol=0, atol=1e-6)
