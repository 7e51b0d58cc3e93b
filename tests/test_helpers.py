"""merge_states, alibi_slopes, t5_bias."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import selfattn as sa


class TestMergeStates:
    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_parts_of_a_softmax(self, rng: Any, dtype: Any) -> None:
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

    def test_parts_that_showed_nothing_are_no_ops(self) -> None:
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

    def test_large_lse_do_not_overflow(self) -> None:
        out, lse = sa.merge_states([np.array([[1.0]]), np.array([[3.0]])], [np.array([2000.0]), np.array([2000.0])])
        assert out == 2.0
        assert np.isclose(lse, 2000 + math.log(2))

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


class TestAlibiSlopes:
    def test_powers_of_two(self) -> None:
        assert sa.alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
        assert np.allclose(sa.alibi_slopes(16), 2.0 ** (-np.arange(1, 17) / 2))
        assert sa.alibi_slopes(1).tolist() == [2.0**-8]

    def test_other_numbers_interleave(self) -> None:
        # The paper's code: the slopes of 8 heads, then every other slope of 16.
        assert np.allclose(
            sa.alibi_slopes(12), [2.0**-i for i in range(1, 9)] + [2.0**-i for i in (0.5, 1.5, 2.5, 3.5)]
        )
        assert sa.alibi_slopes(12).dtype == np.float32

    @pytest.mark.parametrize("bad", [0, -1])
    def test_refuses_no_heads(self, bad: int) -> None:
        with pytest.raises(ValueError, match=f"alibi_slopes: num_heads is {bad}"):
            sa.alibi_slopes(bad)

    def test_refuses_other_types(self) -> None:
        with pytest.raises(TypeError, match=r"alibi_slopes: num_heads is 2.5"):
            sa.alibi_slopes(2.5)  # type: ignore[arg-type]


def t5_bucket(distance: int, bidirectional: bool, buckets: int, max_distance: int) -> int:
    """The bucket of key - query, one at a time, as the paper describes it."""
    start = 0
    if bidirectional:
        buckets //= 2
        start = buckets if distance > 0 else 0
        size = abs(distance)
    else:
        size = max(-distance, 0)
    exact = buckets // 2
    if size < exact:
        return start + size
    far = exact + int(math.log(size / exact) / math.log(max_distance / exact) * (buckets - exact))
    return start + min(far, buckets - 1)


class TestT5Bias:
    @pytest.mark.parametrize("bidirectional", [True, False])
    @pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (16, 50), (8, 300)])
    def test_against_the_scalar_rule(self, rng: Any, bidirectional: bool, buckets: int, max_distance: int) -> None:
        table = rng.standard_normal((buckets, 3)).astype(np.float32)
        bias = sa.t5_bias(table, 9, 400, bidirectional=bidirectional, max_distance=max_distance, q_offset=200)
        assert bias.shape == (3, 9, 400)
        assert bias.dtype == np.float32
        for i in range(9):
            for j in range(400):
                bucket = t5_bucket(j - i - 200, bidirectional, buckets, max_distance)
                assert np.array_equal(bias[:, i, j], table[bucket]), (i, j)

    @pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
    def test_result_has_the_tables_dtype(self, normal: Any, dtype: Any) -> None:
        table = normal(32, 2, dtype=dtype)
        bias = sa.t5_bias(table, 30, 50)
        assert bias.dtype == dtype
        assert np.array_equal(bias.astype(float), sa.t5_bias(table.astype(np.float64), 30, 50))

    @pytest.mark.parametrize("dtype", [np.float32, np.float16])
    def test_in_attention(self, check: Any, normal: Any, dtype: Any) -> None:
        bias = sa.t5_bias(normal(32, 2, dtype=dtype), 30, 50)
        check(normal(1, 2, 30, 8), normal(1, 2, 50, 8), normal(1, 2, 50, 8), bias=bias, scale=1.0)

    @pytest.mark.parametrize(
        ("arguments", "exception", "message"),
        [
            ({"table": np.zeros((32, 2), int)}, TypeError, "table has dtype int64"),
            ({"table": np.zeros(32)}, ValueError, r"table has shape \(32,\)"),
            ({"table": np.zeros((31, 2))}, ValueError, r"table has shape \(31, 2\).*an even number"),
            ({"table": np.zeros((2, 2))}, ValueError, ".*at least 4"),
            ({"q_len": -1}, ValueError, "q_len is -1"),
            ({"kv_len": 1.5}, TypeError, "kv_len is 1.5"),
            ({"max_distance": 8}, ValueError, "max_distance is 8, but it must be greater than 8"),
        ],
    )
    def test_errors(self, arguments: Any, exception: Any, message: str) -> None:
        good = {"table": np.zeros((32, 2)), "q_len": 3, "kv_len": 4}
        with pytest.raises(exception, match="t5_bias: " + message):
            sa.t5_bias(**{**good, **arguments})


def test_merging_minds_no_error_state() -> None:
    outs, lses = [np.ones((2, 3)), np.full((2, 3), np.inf)], [np.zeros(2), np.full(2, -np.inf)]
    with np.errstate(all="raise"):
        out, lse = sa.merge_states([outs[0], outs[0] * 2], [np.zeros(2), np.full(2, -800.0)])  # exp underflows
        assert np.array_equal(out, outs[0])
        assert not lse.any()
        assert np.array_equal(sa.merge_states(outs, lses)[0], outs[0])
        assert np.isneginf(sa.merge_states(outs[:1], lses[1:])[1]).all()
