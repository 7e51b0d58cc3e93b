"""float16 and bfloat16: computed as in float32, then rounded by at most half an ulp of the output."""

from __future__ import annotations

import itertools
import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from array_layouts import misaligned
from narrow_cases import (
    RANGES,
    ROW,
    TILE,
    TILE_RANGES,
    TYPES,
    backwards,
    columns,
    columns_apart,
    every_second,
    everything,
    mixtures,
    operands,
    same,
    shapes,
    types,
)

import selfattn as sa

pytestmark = pytest.mark.matrix


def every_option(rng: Any, shape: Any, dtype: Any) -> list[dict[str, Any]]:
    batch, heads, _, q_len, kv_len = shape[:5]
    bias = rng.standard_normal((heads, q_len, kv_len)).astype(dtype)
    bias[rng.random(bias.shape) < 0.3] = -np.inf
    return [
        {},
        {"mask": rng.random((q_len, kv_len)) < 0.7},
        {"bias": bias},
        {"bias": bias.astype(np.float32)[:, :1]},
        {"causal": True},
        {"window": (kv_len // 2, 3), "q_offset": kv_len // 2},
        {"kv_lens": rng.integers(kv_len // 2, kv_len, batch), "q_lens": rng.integers(q_len // 2, q_len + 1, batch)},
        {"softcap": 3.0, "scale": -0.3},
        {"alibi_slopes": rng.random(heads).astype(dtype), "sinks": rng.standard_normal(heads).astype(dtype)},
    ]


def heads_last(x: Any) -> Any:
    return np.ascontiguousarray(x.swapaxes(-2, -3)).swapaxes(-2, -3) if x.ndim > 2 else x


@types
@shapes
def test_every_option(isa: str, check: Any, normal: Any, rng: Any, shape: Any, dtype: Any) -> None:
    q, k, v = operands(normal, shape, dtype)
    plan = sa.explain(q, k, v)
    assert plan["kernel"] == shape[-1]
    assert (plan["ranges"] > 1) == (shape in (RANGES, TILE_RANGES))
    for options in every_option(rng, shape, dtype):
        out = check(q, k, v, trivial="q_lens" in options, **options)
        assert out.dtype == dtype


@mixtures
@shapes
def test_narrower_keys_and_values(
    isa: str, check: Any, normal: Any, rng: Any, shape: Any, wide: Any, narrow: Any
) -> None:
    q, k, v = operands(normal, shape, wide, narrow)
    for options in every_option(rng, shape, narrow):
        assert check(q, k, v, trivial="q_lens" in options, **options).dtype == wide
    # Every number of the narrower type is one of the wider.
    assert np.allclose(sa.attention(q, k, v), sa.attention(q, k.astype(wide), v.astype(wide)), rtol=0, atol=1e-5)


@types
@pytest.mark.parametrize("kv_len", [1, 2, 15, 16, 17, 127, 128, 129])
def test_lengths_and_head_sizes(isa: str, check: Any, normal: Any, dtype: Any, kv_len: int) -> None:
    for q_len, size in itertools.product((1, 3, 12, 33), (1, 3, 8, 15, 31, 64, 72, 129)):
        check(
            normal(2, q_len, size, dtype=dtype),
            normal(2, kv_len, size, dtype=dtype),
            normal(2, kv_len, size + 1, dtype=dtype),
            trivial=True,
        )


@types
@shapes
def test_layout_and_out(isa: str, normal: Any, shape: Any, dtype: Any) -> None:
    q, k, v = operands(normal, shape, dtype)
    expected = everything(q, k, v, causal=True)
    assert [x.dtype for x in expected] == [dtype, np.float32, np.float32]
    tokens = [np.ascontiguousarray(x.swapaxes(1, 2)) for x in (q, k, v)]
    found = everything(*tokens, causal=True, layout="bshd")
    assert same((found[0].swapaxes(1, 2), *found[1:]), expected)
    for make in (
        np.zeros_like,
        lambda x: columns_apart(np.zeros_like(x)),
        lambda x: heads_last(np.zeros_like(x)),
        misaligned,
    ):
        out = make(expected[0])
        out[...] = 3
        assert sa.attention(q, k, v, causal=True, out=out) is out
        assert same((out,), expected[:1])


@types
def test_out_may_be_an_operand(isa: str, normal: Any, dtype: Any) -> None:
    for which in range(3):
        qkv = [normal(2, 40, 8, dtype=dtype) for _ in range(3)]
        expected = sa.attention(*qkv)
        assert same((sa.attention(*qkv, out=qkv[which]),), (expected,))


@pytest.mark.one_isa
@types
def test_out_of_another_type_is_refused(normal: Any, dtype: Any) -> None:
    q, k, v = operands(normal, ROW, dtype)
    other = TYPES[1 - TYPES.index(dtype)]
    for wrong in (other, np.dtype(np.float32), np.dtype(np.int16)):
        out = np.full((2, 4, 2, 17), 5).astype(wrong)
        with pytest.raises(TypeError, match=f"attention: out has dtype {wrong.name}, but the result is {dtype.name}"):
            sa.attention(q, k, v, out=out)
        assert np.all(out == 5)
    with pytest.raises(TypeError, match=f"out has dtype {dtype.name}, but the result is float32"):
        sa.attention(q.astype(np.float32), k, v, out=np.zeros((2, 4, 2, 17), dtype))


@pytest.mark.one_isa
@pytest.mark.parametrize(
    ("q", "k", "v", "message"),
    [
        ("float16", "float32", "float32", "k has dtype float32, but q has float16"),
        ("bfloat16", "float32", "float32", "k has dtype float32, but q has bfloat16"),
        ("float16", "bfloat16", "bfloat16", "k has dtype bfloat16, but q has float16"),
        ("bfloat16", "float16", "float16", "k has dtype float16, but q has bfloat16"),
        ("float32", "float64", "float64", "k has dtype float64, but q has float32"),
        ("float32", "float16", "bfloat16", "v has dtype bfloat16, but k has float16"),
        ("float32", "float16", "float32", "v has dtype float32, but k has float16"),
        ("float32", "float32", "float16", "v has dtype float16, but q has float32"),
        ("float16", "int16", "float16", "k has dtype int16, but float16, bfloat16, float32 and float64 are accepted"),
        ("float8_e5m2", "float16", "float16", "q has dtype float8_e5m2, but float16, bfloat16, float32"),
        ("float32", "int4", "int4", "k has dtype int4, but float16, bfloat16, float32"),
    ],
)
def test_mixtures_that_are_refused(q: str, k: str, v: str, message: str) -> None:
    given = [np.zeros((5, 8)).astype(getattr(ml_dtypes, name, name)) for name in (q, k, v)]
    with pytest.raises(TypeError, match=re.escape(f"attention: {message}")):
        sa.attention(*given)


@types
@pytest.mark.parametrize("layout", [backwards, columns, columns_apart, every_second, heads_last, misaligned])
@pytest.mark.parametrize("shape", [TILE, ROW, RANGES], ids=str)
def test_strides_do_not_matter(isa: str, normal: Any, rng: Any, layout: Any, shape: Any, dtype: Any) -> None:
    q, k, v = operands(normal, shape, dtype)
    bias = normal(*shape[3:5], dtype=dtype)
    for wide in (q, q.astype(np.float32), q.astype(np.float64)):
        expected = everything(wide, k, v, bias=bias)
        for given in ((layout(wide), k, v), (wide, layout(k), v), (wide, k, layout(v))):
            assert same(everything(*given, bias=bias), expected)
        assert same(everything(wide, k, v, bias=layout(bias)), expected)


def test_foreign_byte_order(isa: str, normal: Any) -> None:
    q, k, v = operands(normal, ROW, np.float16)
    assert same((sa.attention(*(x.astype(">f2") for x in (q, k, v))),), (sa.attention(q, k, v),))


@types
@shapes
def test_threads_and_batch_do_not_matter(isa: str, normal: Any, rng: Any, shape: Any, dtype: Any) -> None:
    for wide in (dtype, np.float32, np.float64):
        q, k, v = operands(normal, (3, *shape[1:]), wide, dtype)
        lengths = rng.integers(shape[4] // 2, shape[4] + 1, 3)
        expected = everything(q, k, v, kv_lens=lengths, num_threads=1)
        for threads in (2, 3, 7):
            assert same(everything(q, k, v, kv_lens=lengths, num_threads=threads), expected)
        for b in range(3):
            one = slice(b, b + 1)
            alone = everything(q[one], k[one], v[one], kv_lens=lengths[one])
            assert same(alone, [x[one] for x in expected])


@types
def test_empty(isa: str, dtype: Any) -> None:
    def zeros(*shape: int) -> Any:
        return np.zeros(shape, dtype)

    out, lse = sa.attention(zeros(2, 3, 8), zeros(2, 0, 8), zeros(2, 0, 5), return_lse=True)
    assert out.dtype == dtype
    assert out.shape == (2, 3, 5)
    assert np.all(out == 0)
    assert np.all(np.isneginf(lse))
    assert sa.attention(zeros(0, 3, 8), zeros(0, 4, 8), zeros(0, 4, 8)).dtype == dtype


@pytest.mark.one_isa
def test_bfloat16_is_known_without_importing_its_package(run_python: Any) -> None:
    code = """
        import sys
        import numpy as np
        import selfattn as sa
        x = np.ones((3, 8), np.float16)
        sa.attention(x, x, x)
        for other in (np.int16, np.bool_):
            try:
                sa.attention(x.astype(other), x, x)
            except TypeError as error:
                print(error)
        print("ml_dtypes" in sys.modules)
        import ml_dtypes
        print(sa.attention(*[x.astype(ml_dtypes.bfloat16)] * 3).dtype)
    """
    lines = run_python(code).splitlines()
    assert lines[0].startswith("attention: q has dtype int16, but float16, bfloat16, float32 and float64 are accepted")
    assert lines[1].startswith("attention: q has dtype bool, but")
    assert lines[2:] == ["False", "bfloat16"]
