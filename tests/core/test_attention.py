"""Shapes, heads, layouts and leading dimensions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import selfattn as sa
from selfattn import reference

pytestmark = pytest.mark.dtypes("float32", "float64")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("q", "k", "v"),
    [
        ((3, 4), (5, 4), (5, 4)),
        ((2, 9, 8), (2, 7, 8), (2, 7, 6)),
        ((3, 4, 9, 8), (3, 4, 11, 8), (3, 4, 11, 8)),
        ((3, 4, 9, 8), (3, 2, 11, 8), (3, 2, 11, 8)),
        ((3, 6, 1, 8), (3, 1, 200, 8), (3, 1, 200, 5)),
        ((1, 7, 30, 16), (1, 7, 30, 16), (1, 7, 30, 33)),
        ((2, 1, 3, 4, 9, 8), (2, 1, 3, 2, 11, 8), (2, 1, 3, 2, 11, 8)),
        ((2, 1, 4, 9, 8), (3, 2, 11, 8), (3, 2, 11, 8)),
        ((4, 9, 8), (5, 2, 11, 8), (1, 2, 11, 8)),
        ((9, 8), (3, 1, 11, 8), (11, 8)),
        ((2, 3, 1, 1, 1), (1, 1, 1), (1, 1)),
        ((1, 4, 200, 64), (1, 4, 200, 64), (1, 4, 200, 64)),
        ((1, 20, 5, 16), (1, 4, 300, 16), (1, 4, 300, 16)),
    ],
)
def test_shapes(isa: str, check: Any, normal: Any, dtype: Any, q: Any, k: Any, v: Any) -> None:
    arrays = [normal(*shape, dtype=dtype) for shape in (q, k, v)]
    for options in ({}, {"causal": True, "q_offset": 0}):
        out = check(*arrays, **options)
        assert out.dtype == dtype
        assert out.ndim == max(len(q), len(k), len(v))
        assert out.flags.c_contiguous


@pytest.mark.parametrize(
    ("q", "k"),
    [((10, 4), (12, 4)), ((10, 6, 4), (12, 2, 4)), ((2, 10, 6, 4), (2, 12, 3, 4)), ((2, 1, 10, 6, 4), (5, 12, 3, 4))],
)
def test_layout_with_the_sequence_in_front(isa: str, check: Any, normal: Any, q: Any, k: Any) -> None:
    q, k, v = normal(*q), normal(*k), normal(*k)
    out = check(q, k, v, layout="bshd", causal=True)
    if q.ndim > 2:
        swapped = sa.attention(*(x.swapaxes(-2, -3) for x in (q, k, v)), causal=True)
        assert np.array_equal(out, swapped.swapaxes(-2, -3))


def every_option(rng: np.random.Generator, batch: tuple[int, ...], heads: int, q_len: int, kv_len: int) -> Any:
    """Every option that has a batch or head axis, in full shape."""
    return {
        "mask": rng.random((*batch, heads, q_len, kv_len)) < 0.8,
        "bias": rng.standard_normal((*batch, heads, q_len, kv_len)).astype(np.float32),
        "q_offset": rng.integers(0, kv_len, batch),
        "q_lens": rng.integers(q_len // 2, q_len + 1, batch),
        "kv_lens": rng.integers(kv_len // 2, kv_len + 1, batch),
        "alibi_slopes": rng.random((*batch, heads)) / 20,
        "sinks": rng.standard_normal(heads),
    }


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("q_len", [3, 60])
def test_options_along_several_leading_axes(
    isa: str, check: Any, normal: Any, rng: Any, layout: str, q_len: int
) -> None:
    batch, heads, kv_len = (2, 3), 4, 50
    q, k, v = normal(*batch, heads, q_len, 8), normal(3, 2, kv_len, 8), normal(2, 1, 2, kv_len, 6)
    if layout == "bshd":
        q, k, v = (x.swapaxes(-2, -3) for x in (q, k, v))
    options = every_option(rng, batch, heads, q_len, kv_len)
    check(q, k, v, layout=layout, causal=True, **options)
    for name, value in options.items():
        full = {"q_offset": 0, name: value} if name == "kv_lens" else {name: value}
        check(q, k, v, layout=layout, causal=True, trivial=True, **full)
        if name == "sinks":
            continue
        check(q, k, v, layout=layout, causal=True, trivial=True, **{**full, name: value[0]})  # without its first axis
        check(q, k, v, layout=layout, causal=True, trivial=True, **{**full, name: value[:, :1]})
    out = np.zeros(sa.attention(q, k, v, layout=layout).shape, np.float32)
    assert sa.attention(q, k, v, layout=layout, out=out, **options) is out
    assert np.array_equal(out, sa.attention(q, k, v, layout=layout, **options))


def test_many_leading_axes(isa: str, check: Any, normal: Any) -> None:
    shape = (1,) * 12 + (2, 1, 3)
    check(normal(*shape, 2, 5, 4), normal(*(1,) * 14, 3, 1, 7, 4), normal(2, 1, 1, 1, 7, 4), causal=True)


@pytest.mark.parametrize("axes", [(), (2, 0, 1), (5, 4, 3, 2, 1, 0)])
def test_batch_axes_that_no_single_stride_describes(isa: str, check: Any, normal: Any, rng: Any, axes: Any) -> None:
    batch = (2, 1, 3, 2, 1, 2)
    q, k, v = normal(*batch, 2, 5, 4), normal(2, 1, 1, 2, 1, 1, 1, 7, 4), normal(3, 1, 1, 2, 1, 7, 4)
    lengths = rng.integers(1, 8, batch)
    if axes:  # another order in memory
        axes = (*axes, *range(len(axes), len(batch)))
        q = np.ascontiguousarray(q.transpose(*np.argsort(axes), -3, -2, -1)).transpose(*axes, -3, -2, -1)
        lengths = np.ascontiguousarray(lengths.transpose(np.argsort(axes))).transpose(axes)
    check(q, k, v, causal=True, q_offset=2, kv_lens=lengths)
    lengths[1, 0, 2, 1, 0, 1] = 8
    with pytest.raises(ValueError, match="kv_lens holds 8"):
        sa.attention(q, k, v, q_offset=2, kv_lens=lengths)


@pytest.mark.parametrize("scale", [-0.7, 0, 0.0, 1, 3.5, np.float32(0.25), 1e-20])
def test_scale(isa: str, check: Any, normal: Any, scale: Any) -> None:
    check(normal(2, 9, 8), normal(2, 70, 8), normal(2, 70, 8), scale=scale)


@pytest.mark.parametrize("group", [1, 2, 3, 5, 6, 7, 8, 16])
@pytest.mark.parametrize("q_len", [1, 3, 40])
def test_each_group_size(isa: str, check: Any, normal: Any, group: int, q_len: int) -> None:
    q, k, v = normal(2, 2 * group, q_len, 24), normal(2, 2, 150, 24), normal(2, 2, 150, 24)
    out = check(q, k, v, causal=True)
    repeated = [np.repeat(x, group, axis=1) for x in (k, v)]
    assert np.allclose(out, sa.attention(q, *repeated, causal=True), atol=1e-5)


@pytest.mark.parametrize(
    ("q", "k", "v", "out"),
    [
        ((0, 2, 3, 4), (0, 2, 5, 4), (0, 2, 5, 4), (0, 2, 3, 4)),
        ((2, 0, 3, 4), (2, 0, 5, 4), (2, 0, 5, 4), (2, 0, 3, 4)),
        ((2, 2, 0, 4), (2, 2, 5, 4), (2, 2, 5, 4), (2, 2, 0, 4)),
        ((2, 2, 3, 4), (2, 2, 5, 4), (2, 2, 5, 0), (2, 2, 3, 0)),
        ((2, 2, 3, 4), (2, 2, 0, 4), (2, 2, 0, 6), (2, 2, 3, 6)),
        ((0, 4), (5, 4), (5, 4), (0, 4)),
    ],
)
def test_empty_dimensions(isa: str, normal: Any, q: Any, k: Any, v: Any, out: Any) -> None:
    result, lse, weights = sa.attention(normal(*q), normal(*k), normal(*v), return_lse=True, return_weights=True)
    assert result.shape == out
    assert not result.any()
    assert lse.shape == out[:-1]
    assert weights.shape == (*out[:-1], k[-2])
    if k[-2] == 0:
        assert np.isneginf(lse).all()
    else:
        assert np.isfinite(lse).all()


@pytest.mark.parametrize("q_len", [3, 50])
def test_scores_without_values(isa: str, normal: Any, q_len: int) -> None:
    q, k, v = normal(2, q_len, 8), normal(2, 70, 8), normal(2, 70, 0)
    _, lse = sa.attention(q, k, v, return_lse=True)
    _, weights = sa.attention(q, k, v, return_weights=True)
    _, wanted_lse, wanted_weights = sa.attention(q, k, k, return_lse=True, return_weights=True)
    assert np.array_equal(lse, wanted_lse)
    assert np.array_equal(weights, wanted_weights)


def test_lists_are_arrays() -> None:
    out = sa.attention([[1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]], [[1.0], [3.0]])
    weight = 1 / (1 + np.exp(1 / np.sqrt(2)))
    assert out.dtype == np.float64
    assert np.allclose(out, [[1 - weight + 3 * weight]], rtol=1e-15)


@pytest.mark.one_isa(reason="calls the reference alone")
def test_against_a_loop(normal: Any) -> None:
    # The reference itself, element by element.
    q, k, v = normal(5, 3, dtype=np.float64), normal(6, 3, dtype=np.float64), normal(6, 2, dtype=np.float64)
    exact = reference.attention(q, k, v, causal=True, softcap=1.5, bias=np.arange(30.0).reshape(5, 6) / 10)
    for i in range(5):
        scores = {}
        for j in range(6):
            if j <= i + 1:
                s = sum(q[i, d] * k[j, d] for d in range(3)) / np.sqrt(3)
                scores[j] = 1.5 * np.tanh(s / 1.5) + (6 * i + j) / 10
        total = sum(np.exp(s) for s in scores.values())
        for d in range(2):
            expected = sum(np.exp(s) / total * v[j, d] for j, s in scores.items())
            assert abs(exact.out[i, d] - expected) < 1e-14
        assert abs(exact.lse[i] - np.log(total)) < 1e-14
