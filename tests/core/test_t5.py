"""T5's bias by distance, looked up inside the kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import selfattn as sa

# batch, heads, kv heads, q_len, kv_len: tile kernel, row kernel, several blocks, split keys.
SHAPES = [(2, 4, 2, 50, 70), (2, 4, 2, 3, 70), (1, 2, 2, 130, 300), (2, 4, 1, 1, 2500), (1, 1, 1, 60, 4500)]


@pytest.fixture
def arrays(rng: np.random.Generator) -> Any:
    def make(shape: Any, dtype: Any = np.float32) -> Any:
        batch, heads, kv_heads, q_len, kv_len = shape
        sizes = ((heads, q_len), (kv_heads, kv_len), (kv_heads, kv_len))
        return tuple(rng.standard_normal((batch, h, n, 8)).astype(dtype) for h, n in sizes)

    return make


@pytest.fixture
def table(rng: np.random.Generator) -> Any:
    return lambda heads, buckets=32: rng.standard_normal((buckets, heads))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_against_float64(
    isa: str, check: Any, arrays: Any, table: Any, shape: Any, dtype: Any, bidirectional: bool
) -> None:
    t5 = sa.T5Bias(table(shape[1]), bidirectional)
    check(*arrays(shape, dtype), t5=t5, scale=1.0, causal=not bidirectional)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("offset", [None, 0, 5, -3, 10_000, "array"])
def test_places_follow_offset_and_lengths(
    isa: str, check: Any, arrays: Any, table: Any, rng: np.random.Generator, shape: Any, offset: Any
) -> None:
    if offset == "array":
        offset = rng.integers(-5, shape[4], shape[0])
    t5 = sa.T5Bias(table(shape[1], 6), max_distance=20)
    check(*arrays(shape), t5=t5, q_offset=offset, trivial=True)
    lengths = {"q_lens": rng.integers(0, shape[3] + 1, shape[0]), "kv_lens": rng.integers(0, shape[4] + 1, shape[0])}
    check(*arrays(shape), t5=t5, q_offset=offset, **lengths, trivial=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_with_a_bias_masks_and_limits(
    isa: str, check: Any, arrays: Any, table: Any, rng: np.random.Generator, shape: Any
) -> None:
    _, heads, _, q_len, kv_len = shape
    bias = rng.standard_normal((heads, q_len, kv_len)).astype(np.float32)
    bias[rng.random(bias.shape) < 0.3] = -np.inf
    options = {"bias": bias, "mask": rng.random((q_len, kv_len)) < 0.7, "window": (40, None), "softcap": 3.0}
    t5 = sa.T5Bias(table(heads))
    check(*arrays(shape), t5=t5, **options, trivial=True)
    for name, value in options.items():
        check(*arrays(shape), t5=t5, **{name: value}, trivial=True)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rows_of_one_head(isa: str, check: Any, arrays: Any, table: Any, dtype: Any) -> None:
    # Around whole vectors and strips of rows, which share one line of biases.
    values = table(2)
    values[5] = -np.inf
    for q_len in (*range(4, 37), 47, 48, 49, 63, 64, 65, 95, 96, 97):
        check(*arrays((1, 2, 2, q_len, 70), dtype), t5=sa.T5Bias(values), window=(40, None), trivial=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_buckets_of_minus_infinity_hide(isa: str, arrays: Any, table: Any, shape: Any) -> None:
    values = table(shape[1])
    values[3:, 0] = -np.inf  # keys three or more positions before, and every key after
    q, k, v = arrays(shape)
    hidden, lse = sa.attention(q, k, v, t5=sa.T5Bias(values), return_lse=True)
    open_heads = sa.attention(q, k, v, t5=sa.T5Bias(np.where(np.isneginf(values), 0, values)))
    values[3:, 0] = 0.0
    near = sa.attention(q, k, v, t5=sa.T5Bias(values), window=(2, 0))
    assert np.allclose(hidden[:, 0], near[:, 0], rtol=0, atol=1e-6)
    assert np.array_equal(hidden[:, 1:], open_heads[:, 1:])
    assert np.isfinite(lse).all()
    everything = sa.T5Bias(np.full_like(values, -np.inf))
    out, lse = sa.attention(q, k, v, t5=everything, return_lse=True)
    assert not out.any()
    assert np.isneginf(lse).all()


def test_varlen_and_caches_count_from_their_own_ends(isa: str, arrays: Any, table: Any) -> None:
    q, k, v = arrays((2, 4, 4, 40, 40))
    t5 = sa.T5Bias(table(4), bidirectional=False)
    whole = sa.attention(q, k, v, t5=t5, causal=True)
    cache = sa.KVCache(2, num_kv_heads=4, head_dim=8, capacity=64)
    parts = [
        sa.attention_with_kvcache(q[:, :, i:j], cache, k[:, :, i:j], v[:, :, i:j], t5=t5)
        for i, j in ((0, 20), (20, 33), *((n, n + 1) for n in range(33, 40)))
    ]
    assert np.allclose(np.concatenate(parts, axis=2), whole, rtol=0, atol=2e-6)
    packed = [np.concatenate([x[0].swapaxes(0, 1)[:11], x[1].swapaxes(0, 1)]) for x in (q, k, v)]
    ragged = sa.attention_varlen(*packed, [0, 11, 51], t5=t5, causal=True)
    assert np.array_equal(ragged[11:], whole[1].swapaxes(0, 1))
    alone = sa.attention(*(x[:1, :, :11] for x in (q, k, v)), t5=t5, causal=True)
    assert np.array_equal(ragged[:11], alone[0].swapaxes(0, 1))


def test_layer_takes_it(isa: str, rng: np.random.Generator, table: Any) -> None:
    x = rng.standard_normal((2, 30, 16), dtype=np.float32)
    w = rng.standard_normal((4, 16, 16), dtype=np.float32)
    values = table(4)
    layer = sa.SelfAttention(*w, num_heads=4)
    wanted = layer(x, bias=sa.t5_bias(values, 30, 30), scale=1.0)
    assert np.allclose(layer(x, t5=sa.T5Bias(values), scale=1.0), wanted, rtol=1e-5, atol=1e-4)


def test_bits_depend_on_neither_threads_nor_neighbours(isa: str, arrays: Any, table: Any) -> None:
    q, k, v = arrays((3, 4, 4, 150, 450))
    values = table(4)
    out = sa.attention(q, k, v, t5=sa.T5Bias(values), num_threads=1)
    assert np.array_equal(sa.attention(q, k, v, t5=sa.T5Bias(values), num_threads=3), out)
    one = sa.attention(q[1, 2], k[1, 2], v[1, 2], t5=sa.T5Bias(values[:, 2:3]))
    assert np.array_equal(one, out[1, 2])


@pytest.mark.one_isa
@pytest.mark.parametrize("bidirectional", [False, True])
def test_buckets_are_those_of_transformers(bidirectional: bool) -> None:
    torch = pytest.importorskip("torch")
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    distance = np.arange(-300, 301)
    buckets = t5.T5Attention._relative_position_bucket(torch.from_numpy(-distance), bidirectional, 32, 128).numpy()
    table = np.arange(32.0)[:, None]
    by_distance, origin = sa.T5Bias(table, bidirectional).for_core()
    found = by_distance[0, np.clip(distance + origin, 0, by_distance.shape[1] - 1)]
    assert np.array_equal(found, buckets)


@pytest.mark.one_isa
@pytest.mark.parametrize(
    ("t5", "exception", "message"),
    [
        (lambda: np.zeros((32, 4)), TypeError, r"attention: t5 is a ndarray, but a T5Bias is needed: T5Bias\(table\)"),
        (lambda: sa.T5Bias(np.zeros((32, 3))), ValueError, "attention: t5 has a table for 3 heads, but q has 4"),
        (lambda: sa.T5Bias(np.zeros(32)), ValueError, r"T5Bias: table has shape \(32,\)"),
        (lambda: sa.T5Bias(np.zeros((31, 4))), ValueError, "T5Bias: .* an even number"),
        (lambda: sa.T5Bias(np.zeros((32, 4), int)), TypeError, "T5Bias: table has dtype int64"),
        (lambda: sa.T5Bias(np.zeros((32, 4)), max_distance=8), ValueError, "T5Bias: max_distance is 8"),
        (lambda: sa.T5Bias(np.zeros((32, 4)), max_distance=1 << 21), ValueError, "at most 1048576"),
        (lambda: sa.T5Bias(np.zeros((32, 4)), bidirectional=1), TypeError, "T5Bias: bidirectional is 1"),
    ],
)
def test_errors(arrays: Any, t5: Any, exception: type[Exception], message: str) -> None:
    with pytest.raises(exception, match=message):
        sa.attention(*arrays(SHAPES[0]), t5=t5())


@pytest.mark.one_isa
@pytest.mark.parametrize("offset", [2.7, "a", None, True])
def test_places_are_integers(offset: Any) -> None:
    assert sa.t5_bias(np.zeros((32, 2)), 3, 3, q_offset=-4).shape == (2, 3, 3)
    with pytest.raises(TypeError, match=r"t5_bias: q_offset is .*, but an integer is needed"):
        sa.t5_bias(np.zeros((32, 2)), 3, 3, q_offset=offset)
