"""Layers, rope and merging with 16-bit numbers: all steps in float32, rounded once at the end."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from array_layouts import misaligned

import selfattn as sa

pytestmark = pytest.mark.matrix

TYPES = [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
HALF_ULP = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
types = pytest.mark.parametrize("dtype", TYPES, ids=str)

# d_model, heads, kv heads, head_dim, value_dim, d_out
SHAPES = [(33, 4, 2, 8, 12, 21), (96, 6, 1, 16, 16, None), (7, 1, 1, 5, 3, 2), (256, 8, 8, 32, 32, 256)]
OPTIONS: dict[str, Any] = {"causal": True, "softcap": 4.0, "return_lse": True, "return_weights": True}


def weights(rng: Any, shape: Any, dtype: Any, d_context: int | None = None) -> dict[str, Any]:
    d_model, heads, kv_heads, head_dim, value_dim, d_out = shape

    def normal(*size: int) -> Any:
        return (rng.standard_normal(size) / np.sqrt(size[0])).astype(dtype)

    matrices = {
        "w_q": normal(d_model, heads * head_dim),
        "w_k": normal(d_context or d_model, kv_heads * head_dim),
        "w_v": normal(d_context or d_model, kv_heads * value_dim),
    }
    if d_out is not None:
        matrices["w_o"] = normal(heads * value_dim, d_out)
    return matrices | {"b" + name[1:]: normal(w.shape[1]) for name, w in matrices.items()}


def widened(given: dict[str, Any], wide: Any = np.float64) -> dict[str, Any]:
    return {name: x.astype(wide) for name, x in given.items()}


def between_steps(dtype: Any) -> float:
    """Return what rounding between a layer's steps may add, relative to the largest result."""
    many = np.zeros((60, 8), dtype)
    rounds = dtype.name == "bfloat16" and sa.explain(many, many, many)["unit"] != "fma"
    return 2.0**-6 if rounds else 0.0


def assert_rounded_once(found: Any, exact: Any, dtype: Any, steps: float = 0.0) -> None:
    assert found.dtype == dtype
    assert found.shape == exact.shape
    # The error of three successive products in float32, then half an ulp.
    error = (3e-6 + steps) * max(1, float(np.max(abs(exact), initial=0)))
    bound = (abs(exact) + error) * HALF_ULP[dtype.name] + error
    assert np.all(abs(found.astype(np.float64) - exact) <= bound)


def same(a: Any, b: Any) -> bool:
    return bool(a.dtype == b.dtype and np.ascontiguousarray(a).tobytes() == np.ascontiguousarray(b).tobytes())


@types
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rope", [None, True])
def test_layer(isa: str, rng: Any, normal: Any, shape: Any, rope: Any, dtype: Any) -> None:
    if rope and shape[3] % 2:
        rope = sa.RoPE(rotary_dim=4)
    params = weights(rng, shape, dtype)
    heads: dict[str, Any] = {"num_heads": shape[1], "num_kv_heads": shape[2], "rope": rope}
    layer = sa.SelfAttention(**params, **heads)
    assert layer.dtype == dtype
    for leading, length in (((), 1), ((2,), 19), ((3, 1), 100)):
        x = normal(*leading, length, shape[0], dtype=dtype)
        y, lse, attended = layer(x, **OPTIONS)
        exact, exact_lse, exact_weights = sa.self_attention(x.astype(np.float64), **widened(params), **heads, **OPTIONS)
        steps = between_steps(dtype)
        assert_rounded_once(y, exact, dtype, steps)
        assert lse.dtype == attended.dtype == np.float32
        assert np.max(abs(lse - exact_lse)) < 1e-5 + steps
        assert np.max(abs(attended - exact_weights)) < 1e-5 + steps
        assert same(sa.self_attention(x, **params, **heads, causal=True, softcap=4.0), y)


@types
def test_context_and_out(isa: str, rng: Any, normal: Any, dtype: Any) -> None:
    for d_out in (21, None):
        params = weights(rng, (33, 4, 2, 8, 12, d_out), dtype, d_context=17)
        layer = sa.SelfAttention(**params, num_heads=4, num_kv_heads=2)
        x, context = normal(2, 30, 33, dtype=dtype), normal(2, 40, 17, dtype=dtype)
        found = layer(x, context=context)
        exact = sa.self_attention(
            x.astype(np.float64), **widened(params), num_heads=4, num_kv_heads=2, context=context.astype(np.float64)
        )
        assert_rounded_once(found, exact, dtype, between_steps(dtype))
        for out in (np.zeros_like(found), np.zeros((*found.shape[:-1], 3 * found.shape[-1]), dtype)[..., ::3]):
            assert layer(x, context=context, out=out) is out
            assert same(out, found)
        with pytest.raises(TypeError, match=f"out has dtype float32, but the result is {dtype.name}"):
            layer(x, context=context, out=np.zeros(found.shape, np.float32))


@types
@pytest.mark.parametrize("d_out", [33, None])
def test_strides_threads_and_batch_do_not_matter(isa: str, rng: Any, normal: Any, d_out: Any, dtype: Any) -> None:
    layer = sa.SelfAttention(**weights(rng, (33, 4, 2, 8, 8, d_out), dtype), num_heads=4, num_kv_heads=2)
    x = normal(3, 40, 33, dtype=dtype)
    expected = layer(x, num_threads=1)
    apart = np.full((3, 40, 99), np.nan).astype(dtype)
    apart[..., ::3] = x
    for given in (apart[..., ::3], misaligned(x), np.asfortranarray(x), x[:, ::-1].copy()[:, ::-1]):
        assert same(layer(given, num_threads=2), expected)
    for b in range(3):
        assert same(layer(x[b]), expected[b])


@types
def test_weights_of_any_strides(isa: str, rng: Any, normal: Any, dtype: Any) -> None:
    params = weights(rng, SHAPES[0], dtype)
    x = normal(9, 33, dtype=dtype)
    expected = sa.self_attention(x, **params, num_heads=4, num_kv_heads=2)
    transposed = {name: np.asfortranarray(w) for name, w in params.items()}
    assert same(sa.self_attention(x, **transposed, num_heads=4, num_kv_heads=2), expected)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("added", "result"), [(223, 65504), (239, 65504), (240, np.inf), (5e3, np.inf), (6e4, np.inf)])
def test_float16_overflows_where_it_rounds_beyond(isa: str, sign: int, added: float, result: float) -> None:
    one, none = np.ones((1, 1), np.float16), np.zeros((1, 1), np.float16)
    layer = sa.SelfAttention(none, none, 255 * one, sign * 256 * one, b_o=sign * one[0] * added, num_heads=1)
    assert layer(one) == sign * result  # 255 · 256 is 224 less than the largest float16


@pytest.mark.one_isa
@types
def test_types_must_agree(rng: Any, normal: Any, dtype: Any) -> None:
    other = TYPES[1 - TYPES.index(dtype)]
    params = weights(rng, SHAPES[0], dtype)
    x = normal(9, 33, dtype=dtype)
    for wrong in (other, np.dtype(np.float32)):
        for name in ("w_k", "w_v", "w_o", "b_q", "b_o"):
            with pytest.raises(TypeError, match=f"{name} has dtype {wrong.name} but w_q has {dtype.name}"):
                sa.SelfAttention(**{**params, name: params[name].astype(wrong)}, num_heads=4, num_kv_heads=2)
        with pytest.raises(TypeError, match=f"x has dtype {wrong.name}, but w_q has {dtype.name}"):
            sa.self_attention(x.astype(wrong), **params, num_heads=4, num_kv_heads=2)
        with pytest.raises(TypeError, match=f"context has dtype {wrong.name}, but w_q has {dtype.name}"):
            sa.self_attention(x, **params, num_heads=4, num_kv_heads=2, context=x.astype(wrong))


@pytest.mark.one_isa(reason="rotation is scalar code")
@types
@pytest.mark.parametrize("rope", [sa.RoPE(), sa.RoPE(interleaved=True), sa.RoPE(100.0, 4, True)], ids=str)
def test_apply_rope(normal: Any, rng: Any, rope: sa.RoPE, dtype: Any) -> None:
    x = normal(2, 3, 20, 8, dtype=dtype)
    for positions in (None, np.arange(20) * 7, rng.integers(0, 1 << 20, (2, 20))):
        found = sa.apply_rope(x, positions, rope)
        assert_rounded_once(found, sa.apply_rope(x.astype(np.float64), positions, rope), dtype)
        swapped = sa.apply_rope(x.swapaxes(1, 2), positions, rope, layout="bshd")
        assert same(swapped.swapaxes(1, 2), found)
        held = x.copy()
        assert sa.apply_rope(held, positions, rope, out=held) is held
        assert same(held, found)
    with pytest.raises(TypeError, match=f"apply_rope: out has dtype float32, but the result is {dtype.name}"):
        sa.apply_rope(x, out=np.zeros(x.shape, np.float32))


@types
def test_merge_states(isa: str, normal: Any, dtype: Any) -> None:
    q, k, v = normal(3, 9, 8, dtype=dtype), normal(3, 60, 8, dtype=dtype), normal(3, 60, 5, dtype=dtype)
    parts = [sa.attention(q, k[:, s], v[:, s], return_lse=True) for s in (slice(0, 7), slice(7, 50), slice(50, 60))]
    out, lse = sa.merge_states(*zip(*parts, strict=True))
    assert out.dtype == dtype
    assert lse.dtype == np.float32
    exact, exact_lse = sa.attention(*(x.astype(np.float64) for x in (q, k, v)), return_lse=True)
    # Each part's out has been rounded as well; all values are below 4.
    assert np.max(abs(out.astype(np.float64) - exact)) <= 2 * 4 * HALF_ULP[dtype.name]
    assert np.max(abs(lse - exact_lse)) < 1e-5
    with pytest.raises(TypeError, match=rf"lses\[0\] has dtype {dtype.name} but needs float32"):
        sa.merge_states([parts[0][0]], [parts[0][1].astype(dtype)])
    other = parts[1][0].astype(np.float32)
    with pytest.raises(TypeError, match=rf"outs\[1\] has dtype float32 but needs {dtype.name}"):
        sa.merge_states([parts[0][0], other], [parts[0][1], parts[1][1]])
