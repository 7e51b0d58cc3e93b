"""alibi_slopes, t5_bias."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import selfattn as sa


@pytest.mark.one_isa
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
    @pytest.mark.one_isa
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

    @pytest.mark.one_isa
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

    @pytest.mark.one_isa
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
