"""merge_states, and the same merging at the end of a cascade."""

from __future__ import annotations

import itertools
import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import selfattn as sa
from selfattn import _core

TYPES = [np.dtype(t) for t in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)]
# Half an ulp of 1. For float64 the weights add ulps of the differences of lses below 32.
ROUNDING = {"float32": 2.0**-24, "float64": 48 * 2.0**-53, "float16": 2.0**-11, "bfloat16": 2.0**-8}
each_type = pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: dtype.name)


def make(rng: Any, parts: int, shape: tuple[int, ...], dtype: Any) -> tuple[list[Any], list[Any]]:
    lse_type = np.float64 if dtype == np.float64 else np.float32
    outs = [(rng.standard_normal(shape) * 3).astype(dtype) for _ in range(parts)]
    lses = [(rng.standard_normal(shape[:-1]) * 4).astype(lse_type) for _ in range(parts)]
    return outs, lses


def same(a: Any, b: Any) -> bool:
    return all(
        x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=True)
    )


@each_type
@pytest.mark.parametrize("parts", [1, 3, 7])
@pytest.mark.parametrize("shape", [(2, 5, 64), (3, 1), (2, 3, 4, 17), (5, 255), (7, 257), (2, 600), (8,)], ids=str)
def test_against_the_definition(isa: str, rng: Any, parts: int, shape: tuple[int, ...], dtype: Any) -> None:
    outs, lses = make(rng, parts, shape, dtype)
    out, lse = sa.merge_states(outs, lses)
    assert (out.dtype, out.shape) == (dtype, shape)
    assert (lse.dtype, lse.shape) == (lses[0].dtype, shape[:-1])
    wide_outs = np.stack(outs).astype(np.float64).astype(np.longdouble)
    wide_lses = np.stack(lses).astype(np.longdouble)
    exact_lse = np.log(np.exp(wide_lses).sum(axis=0))
    products = np.exp(wide_lses - exact_lse)[..., None] * wide_outs
    bound = ROUNDING[dtype.name] * 1.001 * abs(products).sum(axis=0) + (2.0**-25 if dtype == np.float16 else 0)
    assert np.all(abs(out.astype(np.float64) - products.sum(axis=0)) <= bound)
    assert np.all(abs(lse - exact_lse) <= 2 * np.spacing(abs(lse)) + 1e-15)


@each_type
def test_strides_do_not_matter(isa: str, rng: Any, dtype: Any) -> None:
    outs, lses = make(rng, 4, (3, 6, 5, 40), dtype)
    expected = sa.merge_states(outs, lses)

    def unaligned(x: Any) -> Any:
        memory = np.empty(x.nbytes + 1, np.uint8)
        memory[1:] = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
        return memory[1:].view(x.dtype).reshape(x.shape)

    def every_third(x: Any) -> Any:
        wide = np.zeros((*x.shape[:-1], 3 * x.shape[-1]), x.dtype)
        wide[..., ::3] = x
        return wide[..., ::3]

    others = [unaligned, every_third, lambda x: x.swapaxes(0, 2).copy().swapaxes(0, 2), lambda x: x[::-1].copy()[::-1]]
    for first in range(4):
        changed = [others[(first + i) % 4](x) for i, x in enumerate(outs)]
        changed_lses = [others[(first + i) % 4](x) for i, x in enumerate(lses)]
        assert same(sa.merge_states(changed, changed_lses), expected)
    rows = [np.broadcast_to(x[:1], x.shape) for x in outs], [np.broadcast_to(x[:1], x.shape) for x in lses]
    assert same(sa.merge_states(*rows), sa.merge_states([x.copy() for x in rows[0]], [x.copy() for x in rows[1]]))


@each_type
def test_threads_do_not_matter(isa: str, rng: Any, dtype: Any) -> None:
    outs, lses = make(rng, 3, (4, 1500, 65), dtype)
    found = []
    before = sa.get_num_threads()
    try:
        for threads in (1, 2, 5):
            sa.set_num_threads(threads)
            found.append(sa.merge_states(outs, lses))
    finally:
        sa.set_num_threads(before)
    assert same(found[1], found[0])
    assert same(found[2], found[0])


@each_type
def test_nothing_to_merge(isa: str, rng: Any, dtype: Any) -> None:
    for shape in ((0, 5, 4), (3, 0, 4), (0,), (2, 0)):
        outs, lses = make(rng, 2, shape, dtype)
        out, lse = sa.merge_states(outs, lses)
        assert (out.shape, lse.shape) == (shape, shape[:-1])
        assert np.allclose(lse, np.logaddexp(*lses), rtol=1e-6)


@each_type
def test_rows_of_undefined_lse(isa: str, rng: Any, dtype: Any) -> None:
    outs, lses = make(rng, 3, (6, 33), dtype)
    expected = sa.merge_states(outs, lses)
    lses[0][1] = np.nan
    lses[2][2] = np.nan
    lses[1][3] = np.inf
    lses[0][4] = lses[1][4] = np.inf
    with np.errstate(all="raise"):
        out, lse = sa.merge_states(outs, lses)
    undefined = np.array([False, True, True, True, True, False])
    assert np.isnan(lse).tolist() == undefined.tolist()
    assert np.isnan(out[undefined].astype(np.float32)).all()
    assert same((out[~undefined], lse[~undefined]), [x[~undefined] for x in expected])


@each_type
def test_the_largest_numbers_do_not_overflow(isa: str, dtype: Any) -> None:
    largest = ml_dtypes.finfo(dtype).max
    lse_type = np.float64 if dtype == np.float64 else np.float32
    out, lse = sa.merge_states([np.full((2, 3), largest, dtype)] * 2, [np.full(2, 1e30, lse_type)] * 2)
    assert np.all(out == largest)
    assert np.all(lse == lse_type(1e30))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16])
def test_small_weights_count(isa: str, dtype: Any) -> None:
    # Only the second part contributes, with a weight below the range of float32.
    lse_type = np.float64 if dtype == np.float64 else np.float32
    outs = [np.zeros((1, 3), dtype), np.full((1, 3), 1e38, dtype)]
    out, _ = sa.merge_states(outs, [np.zeros(1, lse_type), np.full(1, -110, lse_type)])
    exact = outs[1].astype(np.float64) * math.exp(-110)
    assert np.all(abs(out.astype(np.float64) - exact) <= ROUNDING[np.dtype(dtype).name] * 1.001 * exact)


@each_type
def test_into_the_memory_of_a_part(isa: str, rng: Any, dtype: Any) -> None:
    outs, lses = make(rng, 3, (3, 4, 300), dtype)
    expected = sa.merge_states(outs, lses)
    for place in range(3):
        parts, logs = [x.copy() for x in outs], [x.copy() for x in lses]
        _core.merge_states(parts, logs, parts[place], logs[place], 1)
        assert same((parts[place], logs[place]), expected)


@each_type
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_cascade(isa: str, normal: Any, layout: str, dtype: Any) -> None:
    cache = sa.PagedKVCache(40, 4, 2, 8, value_dim=5, dtype=dtype)
    prompt = cache.allocate()
    cache.append(prompt, normal(2, 21, 8, dtype=dtype), normal(2, 21, 5, dtype=dtype))
    forks = [prompt, cache.fork(prompt), cache.fork(prompt)]
    shape = (3, 4, 2, 8) if layout == "bhsd" else (3, 2, 4, 8)
    q = normal(*shape, dtype=dtype)
    options: dict[str, Any] = {"sequences": forks, "layout": layout, "return_lse": True}
    expected, expected_lse = sa.attention_with_kvcache(q, cache, **options)
    out, lse = sa.attention_with_kvcache(q, cache, cascade=True, **options)
    assert (out.dtype, lse.dtype, lse.shape) == (dtype, expected_lse.dtype, expected_lse.shape)
    assert out.flags.c_contiguous
    tolerance = 1e-12 if dtype == np.float64 else 4 * max(ROUNDING[dtype.name], 2.0**-21)
    assert np.allclose(out.astype(np.float64), expected.astype(np.float64), rtol=0, atol=tolerance)
    assert np.allclose(lse, expected_lse, rtol=0, atol=1e-12 if dtype == np.float64 else 1e-5)
    for threads, step in itertools.product((1, 2), (1, 2)):
        given = np.zeros((*shape[:3], 5 * step), dtype)[..., ::step]
        found, _ = sa.attention_with_kvcache(q, cache, cascade=True, out=given, num_threads=threads, **options)
        assert found is given
        assert same([found], [out])
    overlapping = np.zeros((*shape[:3], 8), dtype)
    overlapping[...] = q
    sa.attention_with_kvcache(overlapping, cache, cascade=True, out=overlapping[..., :5], **options)
    assert same([overlapping[..., :5]], [out])


class TestMergeStates:
    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_parts_of_a_softmax(self, isa: str, rng: Any, dtype: Any) -> None:
        scores = rng.standard_normal((3, 5, 12)) * 10
        values = rng.standard_normal((3, 12, 4))
        cuts = [slice(0, 1), slice(1, 7), slice(7, 12)]
        lses = [np.log(np.exp(scores[..., c]).sum(-1)).astype(dtype) for c in cuts]
        outs = [
            (np.exp(scores[..., c] - lse[..., None].astype(float)) @ values[:, c]).astype(dtype)
            for c, lse in zip(cuts, lses, strict=True)
        ]
        out, lse = sa.merge_states(outs, lses)
        assert out.dtype == lse.dtype == dtype
        total = np.exp(scores).sum(-1)
        tolerance = 1e-5 if dtype == np.float32 else 1e-13
        assert np.allclose(out, (np.exp(scores) / total[..., None]) @ values, rtol=0, atol=tolerance)
        assert np.allclose(lse, np.log(total), rtol=0, atol=tolerance)
        stacked = sa.merge_states(np.stack(outs), np.stack(lses))
        assert np.array_equal(stacked[0], out)
        assert np.array_equal(stacked[1], lse)

    def test_parts_that_showed_nothing_are_no_ops(self, isa: str) -> None:
        out, lse = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([0.5, -2.0])
        nothing, never = np.full((2, 2), np.nan), np.full(2, -np.inf)
        for outs, lses in (
            ([out, nothing], [lse, never]),
            ([nothing, out, nothing], [never, lse, never]),
            ([out], [lse]),
        ):
            merged, merged_lse = sa.merge_states(outs, lses)
            assert np.array_equal(merged, out)
            assert np.array_equal(merged_lse, lse)
        merged, merged_lse = sa.merge_states([nothing, nothing], [never, never])
        assert not merged.any()
        assert np.isneginf(merged_lse).all()
        merged, merged_lse = sa.merge_states([out, nothing], [np.array([0.5, -np.inf]), never])
        assert np.array_equal(merged, [[1, 2], [0, 0]])
        assert np.array_equal(merged_lse, [0.5, -np.inf])

    def test_large_lse_do_not_overflow(self, isa: str) -> None:
        out, lse = sa.merge_states([np.array([[1.0]]), np.array([[3.0]])], [np.array([2000.0]), np.array([2000.0])])
        assert out == 2.0
        assert np.isclose(lse, 2000 + math.log(2))

    @pytest.mark.one_isa
    @pytest.mark.parametrize(
        ("outs", "lses", "exception", "message"),
        [
            ([], [], ValueError, "outs is empty"),
            ([np.zeros((2, 3))], [], ValueError, "outs has 1 parts but lses has 0"),
            ([np.zeros((2, 3)), np.zeros((2, 4))], [np.zeros(2)] * 2, ValueError, r"outs\[1\] has shape \(2, 4\)"),
            ([np.zeros((2, 3))], [np.zeros(3)], ValueError, r"lses\[0\] has shape \(3,\)"),
            ([np.zeros((2, 3), np.int16)], [np.zeros(2)], TypeError, r"outs\[0\] has dtype int16"),
            (
                [np.zeros((2, 3), np.float16)],
                [np.zeros(2)],
                TypeError,
                r"lses\[0\] has dtype float64 but needs float32",
            ),
            (
                [np.zeros((2, 3), np.float32)],
                [np.zeros(2)],
                TypeError,
                r"lses\[0\] has dtype float64 but needs float32, as outs\[0\] is float32",
            ),
        ],
    )
    def test_errors(self, outs: Any, lses: Any, exception: Any, message: str) -> None:
        with pytest.raises(exception, match="merge_states: " + message):
            sa.merge_states(outs, lses)


def test_merging_minds_no_error_state() -> None:
    outs, lses = [np.ones((2, 3)), np.full((2, 3), np.inf)], [np.zeros(2), np.full(2, -np.inf)]
    with np.errstate(all="raise"):
        out, lse = sa.merge_states([outs[0], outs[0] * 2], [np.zeros(2), np.full(2, -800.0)])  # exp underflows
        assert np.array_equal(out, outs[0])
        assert not lse.any()
        assert np.array_equal(sa.merge_states(outs, lses)[0], outs[0])
        assert np.isneginf(sa.merge_states(outs[:1], lses[1:])[1]).all()
