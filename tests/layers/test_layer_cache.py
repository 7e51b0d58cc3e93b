"""SelfAttention(..., cache=): a decoder layer in one call per step."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import selfattn as sa

HEADS, KV_HEADS, HEAD_DIM, VALUE_DIM, WIDTH = 4, 2, 8, 6, 24
TYPES = [np.dtype(t) for t in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)]
# Relative to the largest output: a step uses other kernels than the whole, and 16-bit results are rounded at the end.
TOLERANCE = {"float32": 3e-6, "float64": 1e-14, "float16": 2e-3, "bfloat16": 2e-2}


def make_layer(rng: Any, dtype: Any = np.float32, **options: Any) -> Any:
    def weights(*shape: int) -> Any:
        return (rng.standard_normal(shape) / np.sqrt(shape[0])).astype(dtype)

    return sa.SelfAttention(
        weights(WIDTH, HEADS * HEAD_DIM),
        weights(WIDTH, KV_HEADS * HEAD_DIM),
        weights(WIDTH, KV_HEADS * VALUE_DIM),
        weights(HEADS * VALUE_DIM, WIDTH),
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        **options,
    )


def make_cache(batch: int, dtype: str = "float32", **options: Any) -> Any:
    return sa.KVCache(batch, KV_HEADS, HEAD_DIM, 40, value_dim=VALUE_DIM, dtype=dtype, **options)


def make_pages(batch: int, dtype: str = "float32") -> tuple[Any, list[int]]:
    cache = sa.PagedKVCache(60, 3, KV_HEADS, HEAD_DIM, value_dim=VALUE_DIM, dtype=dtype)
    return cache, [cache.allocate() for _ in range(batch)]


def close(a: Any, b: Any, dtype: Any) -> bool:
    a, b = (x.astype(np.float64) for x in (a, b))
    return bool(np.max(abs(a - b)) <= TOLERANCE[dtype.name] * np.max(abs(b)))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("rope", [None, sa.RoPE(base=100.0)], ids=["plain", "rope"])
def test_steps_give_what_the_whole_gives(isa: str, rng: Any, dtype: Any, rope: Any) -> None:
    layer, x = make_layer(rng, dtype, rope=rope), rng.standard_normal((3, 20, WIDTH)).astype(dtype)
    storage = "float64" if dtype == np.float64 else "float32"
    cache, (pages, ids) = make_cache(3, storage), make_pages(3, storage)
    whole, first = layer(x, causal=True), 0
    for tokens in (7, 1, 1, 4, 7):
        piece = x[:, first : first + tokens]
        y = layer(piece, cache=cache)
        assert y.dtype == dtype
        assert close(y, whole[:, first : first + tokens], dtype)
        assert layer(piece, cache=pages, sequences=ids).tobytes() == y.tobytes()
        first += tokens
    assert cache.lengths.tolist() == [20] * 3
    assert [pages.length(i) for i in ids] == [20] * 3


@pytest.mark.parametrize("storage", ["float16", "bfloat16", "int8"])
def test_narrow_storage_is_that_of_the_same_tokens(isa: str, rng: Any, storage: str) -> None:
    layer, x = make_layer(rng), rng.standard_normal((2, 12, WIDTH), dtype=np.float32)
    cache, wide = make_cache(2, storage), make_cache(2)
    for first in range(0, 12, 4):
        y, exact = (layer(x[:, first : first + 4], cache=c) for c in (cache, wide))
    assert 0 < np.max(abs(y - exact)) < 0.05 * np.max(abs(exact))
    other = make_cache(2, storage)
    other.append(wide.k[:, :, :12], wide.v[:, :, :12])
    assert other.k[:, :, :12].tobytes() == cache.k[:, :, :12].tobytes()
    assert other.v[:, :, :12].tobytes() == cache.v[:, :, :12].tobytes()


def test_a_sequence_does_not_depend_on_the_batch(isa: str, rng: Any) -> None:
    layer, (pages, ids) = make_layer(rng, rope=True), make_pages(3)
    for length, i in zip((1, 9, 17), ids, strict=True):
        layer(rng.standard_normal((1, length, WIDTH), dtype=np.float32), cache=pages, sequences=[i])
    x = rng.standard_normal((3, 2, WIDTH), dtype=np.float32)
    alone = []
    for b, i in enumerate(ids):
        twin = pages.fork(i)
        alone.append(layer(x[b : b + 1], cache=pages, sequences=[twin]))
        pages.free(twin)
    assert np.array_equal(layer(x, cache=pages, sequences=ids), np.concatenate(alone))


def test_options_and_positions(isa: str, rng: Any) -> None:
    layer, x = make_layer(rng, rope=True), rng.standard_normal((2, 9, WIDTH), dtype=np.float32)
    cache = make_cache(2)
    layer(x[:, :5], cache=cache)
    # A tree: the last four tokens are two branches of two, at places 5, 6, 5, 6.
    tree = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]], bool)
    mask = np.concatenate([np.ones((4, 5), bool), tree], axis=1)
    options = {"softcap": 3.0, "sinks": rng.standard_normal(HEADS), "scale": 0.3}
    y, lse, weights = layer(
        x[:, 5:], cache=cache, mask=tree, positions=[5, 6, 5, 6], return_lse=True, return_weights=True, **options
    )
    places = np.array([0, 1, 2, 3, 4, 5, 6, 5, 6])
    full = np.tril(np.ones((9, 9), bool))
    full[5:] = mask
    exact = layer(x, mask=full, positions=places, return_lse=True, return_weights=True, **options)
    assert np.allclose(y, exact[0][:, 5:], atol=1e-5)
    assert np.allclose(lse, exact[1][..., 5:], atol=1e-5)
    assert np.allclose(weights, exact[2][:, :, 5:], atol=1e-5)


def test_window(isa: str, rng: Any) -> None:
    layer, x = make_layer(rng), rng.standard_normal((2, 30, WIDTH), dtype=np.float32)
    ring = sa.KVCache(2, KV_HEADS, HEAD_DIM, 8, value_dim=VALUE_DIM, window=4)
    parts = [layer(x[:, i : i + 3], cache=ring, window=(4, 0)) for i in range(0, 30, 3)]
    assert np.allclose(np.concatenate(parts, axis=1), layer(x, causal=True, window=(4, 0)), atol=1e-5)
    with pytest.raises(ValueError, match="SelfAttention: window is 5 to the left"):
        layer(x[:, :1], cache=ring, window=(5, 0))


def test_out_may_be_x(isa: str, rng: Any) -> None:
    layer, x = make_layer(rng), rng.standard_normal((2, 3, WIDTH), dtype=np.float32)
    expected = layer(x, cache=make_cache(2))
    out = np.empty_like(expected)
    assert layer(x, cache=make_cache(2), out=out) is out
    assert np.array_equal(out, expected)
    assert np.array_equal(layer(x, cache=make_cache(2), out=x), expected)


@pytest.mark.one_isa
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"cache": object()}, TypeError, "SelfAttention: cache is a object"),
        ({"context": np.zeros((2, 3, WIDTH), np.float32)}, ValueError, "context and cache are given"),
        ({"kv_lens": [1, 1]}, ValueError, "kv_lens is given, but a cache knows"),
        ({"sequences": [0, 1]}, ValueError, "sequences is for a PagedKVCache"),
        ({"x": np.zeros((3, 1, WIDTH), np.float32)}, ValueError, r"x has shape \(3, 1, 24\), but the cache has 2"),
        ({"x": np.zeros((1, WIDTH), np.float32)}, ValueError, r"x has shape \(1, 24\), but a cache needs"),
        ({"x": np.zeros((2, 41, WIDTH), np.float32)}, ValueError, "41 more exceed the capacity 40"),
        ({"x": np.zeros((2, 1, WIDTH))}, TypeError, "x has dtype float64"),
        ({"cache": sa.KVCache(2, 4, HEAD_DIM, 8, value_dim=VALUE_DIM)}, ValueError, "_heads 4, but the layer has 2"),
        ({"cache": sa.KVCache(2, KV_HEADS, 9, 8, value_dim=VALUE_DIM)}, ValueError, "head_dim 9, but the layer has 8"),
        ({"cache": sa.KVCache(2, KV_HEADS, HEAD_DIM, 8)}, ValueError, "value_dim 8, but the layer has 6"),
        ({"cache": make_cache(2, "float64")}, TypeError, "the cache holds float64, but the layer computes in float32"),
        ({"mask": np.ones((3, 3), bool)}, ValueError, r"mask has shape \(3, 3\)"),
        ({"positions": [[1]]}, ValueError, "positions is given, but the layer has no rope"),
    ],
)
def test_refused_calls_leave_the_cache_as_it_was(rng: Any, change: Any, error: Any, message: str) -> None:
    layer, cache = make_layer(rng), make_cache(2)
    layer(rng.standard_normal((2, 3, WIDTH), dtype=np.float32), cache=cache)
    before = cache.k.tobytes(), cache.lengths.tolist()
    arguments = {"x": rng.standard_normal((2, 1, WIDTH), dtype=np.float32), "cache": cache, **change}
    with pytest.raises(error, match=message):
        layer(arguments.pop("x"), **arguments)
    assert (cache.k.tobytes(), cache.lengths.tolist()) == before


@pytest.mark.one_isa
def test_sequences_without_a_cache(rng: Any) -> None:
    with pytest.raises(ValueError, match="sequences is given without a cache"):
        make_layer(rng)(np.zeros((1, 2, WIDTH), np.float32), sequences=[0])
