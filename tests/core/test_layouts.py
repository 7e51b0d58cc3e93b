"""Any memory layout gives a result bit-identical to that of contiguous arrays."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from array_layouts import misaligned

import selfattn as sa

pytestmark = pytest.mark.dtypes("float32", "float64")


def negative(x: Any) -> Any:
    return np.ascontiguousarray(x[..., ::-1, ::-1])[..., ::-1, ::-1]


def spread(x: Any) -> Any:
    wide = np.full((*x.shape[:-1], 3 * x.shape[-1]), np.nan).astype(x.dtype)
    wide[..., ::3] = x
    return wide[..., ::3]


def far_rows(x: Any) -> Any:
    wide = np.zeros((*x.shape[:-1], 1024), x.dtype)
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


def packed_record(x: Any) -> Any:
    records = np.zeros(x.shape, np.dtype([("pad", "u1"), ("x", x.dtype)]))
    records["x"] = x
    return records["x"]


def fortran(x: Any) -> Any:
    return np.asfortranarray(x)


def columns(x: Any) -> Any:
    return np.ascontiguousarray(x.swapaxes(-1, -2)).swapaxes(-1, -2) if x.ndim > 1 else x


def heads_last(x: Any) -> Any:
    return np.ascontiguousarray(x.swapaxes(-2, -3)).swapaxes(-2, -3) if x.ndim > 2 else x


def read_only(x: Any) -> Any:
    x = x.copy()
    x.flags.writeable = False
    return x


def swapped(x: Any) -> Any:
    return x.astype(x.dtype.newbyteorder())


LAYOUTS = [
    negative,
    spread,
    far_rows,
    misaligned,
    packed_record,
    fortran,
    columns,
    heads_last,
    read_only,
    swapped,
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("q_len", [2, 70])
def test_layouts_of_q_k_v(isa: str, normal: Any, layout: Any, dtype: Any, q_len: int) -> None:
    q, k, v = (
        normal(2, 4, q_len, 20, dtype=dtype),
        normal(2, 2, 150, 20, dtype=dtype),
        normal(2, 2, 150, 9, dtype=dtype),
    )
    expected = sa.attention(q, k, v, causal=True)
    for operands in ((layout(q), k, v), (q, layout(k), v), (q, k, layout(v)), tuple(map(layout, (q, k, v)))):
        assert np.array_equal(sa.attention(*operands, causal=True), expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("q_len", [2, 70])
def test_rows_at_odd_distances(isa: str, normal: Any, dtype: Any, q_len: int) -> None:
    # One head of contiguous elements whose row stride is not a multiple of the element size.
    def records(x: Any) -> Any:
        rows = np.zeros(len(x), np.dtype([("x", dtype, x.shape[1:]), ("pad", "u1")]))
        rows["x"] = x
        return rows["x"]

    q, k, v = normal(q_len, 20, dtype=dtype), normal(150, 20, dtype=dtype), normal(150, 9, dtype=dtype)
    expected = sa.attention(q, k, v)
    for operands in ((records(q), k, v), (q, records(k), v), (q, k, records(v))):
        assert np.array_equal(sa.attention(*operands), expected)
    out = records(np.zeros_like(expected))
    assert np.array_equal(sa.attention(q, k, v, out=out), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("q_len", [2, 70])
def test_layouts_of_options(isa: str, normal: Any, rng: Any, layout: Any, q_len: int) -> None:
    q, k, v = normal(2, 4, q_len, 8), normal(2, 2, 150, 8), normal(2, 2, 150, 8)
    mask = rng.random((2, 4, q_len, 150)) < 0.7
    bias = normal(4, q_len, 150)
    mask_layout = layout if layout not in (spread, swapped, misaligned) else negative
    expected = sa.attention(q, k, v, mask=mask, bias=bias)
    assert np.array_equal(sa.attention(q, k, v, mask=mask_layout(mask), bias=layout(bias)), expected)
    slopes, lengths = normal(2, 4), np.array([[100], [150]])
    expected = sa.attention(q, k, v, alibi_slopes=slopes, kv_lens=lengths[:, 0], q_offset=lengths[:, 0])
    if layout is not spread:
        found = sa.attention(
            q, k, v, alibi_slopes=layout(slopes), kv_lens=layout(lengths)[:, 0], q_offset=layout(lengths)[:, 0]
        )
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("q_len", [2, 70])
def test_transposed_biases(isa: str, normal: Any, rng: Any, dtype: Any, q_len: int) -> None:
    # Without groups, the biases of adjacent rows are adjacent numbers.
    q, k, v = normal(2, 4, q_len, 8), normal(2, 4, 150, 8), normal(2, 4, 150, 8)
    bias = normal(4, q_len, 150).astype(dtype)
    bias[rng.random(bias.shape) < 0.3] = -np.inf
    for options in ({}, {"mask": rng.random((q_len, 150)) < 0.7}, {"causal": True}):
        expected = sa.attention(q, k, v, bias=bias, **options)
        assert np.array_equal(sa.attention(q, k, v, bias=columns(bias), **options), expected)
        # The numbers of a 16-bit bias are exact in float32.
        if np.dtype(dtype).itemsize == 2:
            assert np.array_equal(sa.attention(q, k, v, bias=bias.astype(np.float32), **options), expected)


def test_zero_strides_are_not_expanded(isa: str, normal: Any) -> None:
    k, v = normal(1, 1, 80, 8), normal(1, 1, 80, 8)
    q = normal(3, 4, 50, 8)
    wide = [np.broadcast_to(x, (3, 4, 80, 8)) for x in (k, v)]
    assert np.array_equal(sa.attention(q, *wide), sa.attention(q, *(x.copy() for x in wide)))
    rows = np.broadcast_to(k[..., :1, :], k.shape)
    assert np.array_equal(sa.attention(q, rows, v), sa.attention(q, rows.copy(), v))
    columns = np.broadcast_to(k[..., :1], k.shape)
    assert np.array_equal(sa.attention(q, columns, columns), sa.attention(q, columns.copy(), columns.copy()))


def test_more_keys_than_int32_counts(isa: str) -> None:
    # Stride 0 along the keys: no memory, and every key is the same; a window keeps it short.
    kv_len = (1 << 31) + 64
    key = np.ones((1, 1), np.float32)
    k, v = (np.lib.stride_tricks.as_strided(x, (kv_len, 1), (0, 4)) for x in (key, 3 * key))
    for q_len in (1, 40):
        q = np.ones((q_len, 1), np.float32)
        assert np.array_equal(sa.attention(q, k, v, causal=True, window=(1000, 0)), np.full((q_len, 1), 3, np.float32))


def test_inputs_are_left_alone(isa: str, normal: Any, rng: Any) -> None:
    q, k, v, bias = normal(2, 60, 8), normal(2, 90, 8), normal(2, 90, 8), normal(60, 90)
    mask = rng.random((60, 90)) < 0.5
    copies = [x.copy() for x in (q, k, v, bias, mask)]
    sa.attention(q, k, v, bias=bias, mask=mask, causal=True)
    assert all(np.array_equal(a, b) for a, b in zip((q, k, v, bias, mask), copies, strict=True))
