"""SelfAttention and self_attention against the same steps in float64 NumPy."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from array_layouts import misaligned
from layer_definition import close, expected

import selfattn as sa

WEIGHTS = ("w_q", "w_k", "w_v", "w_o")
BIASES = ("b_q", "b_k", "b_v", "b_o")


@pytest.fixture
def make(rng: Any) -> Any:
    """Random weights of a layer: make(d_model, heads, kv_heads, head_dim, value_dim, d_out)."""

    def build(
        d_model: int, heads: int, kv_heads: int, head_dim: int, value_dim: int, d_out: int | None,
        *, d_context: int | None = None, biases: bool = True, dtype: Any = np.float32,
    ) -> dict[str, Any]:  # fmt: skip
        def normal(*shape: int) -> Any:
            return (rng.standard_normal(shape) / np.sqrt(shape[0])).astype(dtype)

        inner = d_context or d_model
        params = {
            "w_q": normal(d_model, heads * head_dim),
            "w_k": normal(inner, kv_heads * head_dim),
            "w_v": normal(inner, kv_heads * value_dim),
            "w_o": None if d_out is None else normal(heads * value_dim, d_out),
        }
        if biases:
            params |= {"b" + name[1:]: normal(w.shape[1]) for name, w in params.items() if w is not None}
        return params

    return build


SHAPES = [
    # d_model, heads, kv heads, head_dim, value_dim, d_out
    (32, 4, 4, 8, 8, 32),
    (33, 4, 2, 8, 12, 21),
    (96, 6, 1, 16, 16, None),
    (7, 1, 1, 5, 3, 2),
    (384, 12, 12, 32, 32, 384),
]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("biases", [False, True])
def test_shapes(isa: str, make: Any, normal: Any, shape: Any, biases: bool, dtype: Any) -> None:
    params = make(*shape, biases=biases, dtype=dtype)
    layer = sa.SelfAttention(**params, num_heads=shape[1], num_kv_heads=shape[2])
    assert (layer.d_model, layer.num_heads, layer.num_kv_heads, layer.head_dim, layer.value_dim) == shape[:5]
    assert layer.d_out == (shape[5] or shape[1] * shape[4])
    assert layer.dtype == dtype
    assert layer.isa == isa
    for leading in ((), (2,), (3, 1, 2)):
        for length in (1, 19, 100):
            x = normal(*leading, length, shape[0], dtype=dtype)
            y, lse, weights = layer(x, causal=True, return_lse=True, return_weights=True)
            wanted, result = expected(x, params, shape[1], shape[2], causal=True)
            close(y, wanted)
            close(weights, result.weights)
            close(lse, result.lse)
            once = sa.self_attention(x, **params, num_heads=shape[1], num_kv_heads=shape[2], causal=True)
            assert np.array_equal(once, y)


def test_cross_attention(isa: str, make: Any, normal: Any) -> None:
    params = make(24, 4, 2, 8, 6, 10, d_context=17)
    layer = sa.SelfAttention(**params, num_heads=4, num_kv_heads=2)
    assert layer.d_context == 17
    for leading, inner in (((2,), (2,)), ((2,), (1,)), ((), (3,)), ((3, 2), (2,))):
        x, context = normal(*leading, 9, 24), normal(*inner, 40, 17)
        wanted, _ = expected(x, params, 4, 2, context=context)
        close(layer(x, context=context), wanted)
    close(layer(x, context=context, kv_lens=5), expected(x, params, 4, 2, context=context, kv_lens=[[5, 5]] * 3)[0])


ROPES = [
    sa.RoPE(),
    sa.RoPE(interleaved=True),
    sa.RoPE(500.0, 4),
    sa.RoPE(1e4, 6, True),
    sa.RoPE(inv_freq=[1.0, 0.3, 0.0], attention_scaling=1.2),
]


@pytest.mark.parametrize("rope", ROPES, ids=str)
def test_rope(isa: str, make: Any, normal: Any, rng: Any, rope: sa.RoPE) -> None:
    params = make(24, 4, 2, 8, 8, 24)
    layer = sa.SelfAttention(**params, num_heads=4, num_kv_heads=2, rope=rope)
    x = normal(2, 50, 24)
    close(layer(x, causal=True), expected(x, params, 4, 2, rope=rope, causal=True)[0])
    for positions in (
        np.arange(50) + 1000,
        rng.integers(0, 5000, (2, 50)),
        rng.integers(0, 9, (2, 50)).astype(np.int8),
    ):
        found = layer(x, positions=positions)
        close(found, expected(x, params, 4, 2, rope=rope, positions=positions)[0])
    context = normal(2, 30, 24)
    found = layer(x, context=context, positions=np.arange(50) + 7)
    close(found, expected(x, params, 4, 2, rope=rope, context=context, positions=np.arange(50) + 7)[0])


def test_positions_with_coordinates(isa: str, make: Any, normal: Any, rng: Any) -> None:
    params, rope = make(24, 4, 2, 8, 8, 24), sa.RoPE(100.0, axes=[0, 1, 2, 1])
    layer = sa.SelfAttention(**params, num_heads=4, num_kv_heads=2, rope=rope)
    x, context = normal(2, 20, 24), normal(2, 30, 24)
    for positions in (None, rng.integers(0, 99, (3, 20)), rng.integers(0, 99, (3, 2, 20)), np.arange(20)[None]):
        given = {} if positions is None else {"positions": positions}
        many = np.arange(20) if positions is None else positions[:, None] if positions.ndim == 2 else positions
        close(layer(x, **given), expected(x, params, 4, 2, rope=rope, positions=many)[0])
        close(
            layer(x, context=context, **given), expected(x, params, 4, 2, rope=rope, positions=many, context=context)[0]
        )


def test_rope_true_is_the_default_rope(make: Any, normal: Any) -> None:
    params, x = make(16, 2, 2, 8, 8, None), normal(11, 16)
    layers = [sa.SelfAttention(**params, num_heads=2, rope=rope) for rope in (True, sa.RoPE(), None)]
    assert np.array_equal(layers[0](x), layers[1](x))
    assert not np.array_equal(layers[0](x), layers[2](x))


def test_every_attention_option(isa: str, make: Any, normal: Any, rng: Any) -> None:
    params = make(24, 4, 2, 8, 8, 24)
    layer = sa.SelfAttention(**params, num_heads=4, num_kv_heads=2)
    x = normal(3, 40, 24)
    for options in (
        {"mask": rng.random((3, 1, 40, 40)) < 0.7},
        {"bias": normal(4, 40, 40)},
        {"causal": True, "q_offset": 0},
        {"window": (5, 2)},
        {"q_lens": [40, 3, 0], "kv_lens": [40, 20, 1]},
        {"scale": 0.1, "softcap": 2.0},
        {"alibi_slopes": sa.alibi_slopes(4)},
        {"sinks": normal(4)},
    ):
        close(layer(x, **options), expected(x, params, 4, 2, **options)[0])
    assert np.array_equal(layer(x, num_threads=1), layer(x, num_threads=2))
    assert np.allclose(layer(x, precision="high"), layer(x), rtol=0, atol=1e-3)


def test_out(isa: str, make: Any, normal: Any) -> None:
    layer = sa.SelfAttention(**make(24, 4, 4, 8, 8, 10), num_heads=4)
    x = normal(2, 30, 24)
    wanted = layer(x)
    for out in (
        np.zeros_like(wanted),
        np.zeros((2, 30, 20), np.float32)[..., ::2],
        np.zeros((30, 2, 10), np.float32).swapaxes(0, 1),
    ):
        assert layer(x, out=out) is out
        assert np.array_equal(out, wanted)
    found, weights = layer(x, out=out, return_weights=True)
    assert found is out
    assert weights.shape == (2, 4, 30, 30)
    square = sa.SelfAttention(**make(24, 4, 4, 6, 6, 24), num_heads=4)
    wanted = square(x)
    assert np.array_equal(square(x, out=x), wanted)


def test_strides_do_not_matter(isa: str, make: Any, normal: Any) -> None:
    params = make(24, 4, 2, 8, 8, 24)
    layer = sa.SelfAttention(**params, num_heads=4, num_kv_heads=2)
    x = normal(2, 3, 50, 24)
    wanted = layer(x)
    for other in (
        np.asfortranarray(x),
        x[:, :, ::-1].copy()[:, :, ::-1],
        x.astype(">f4"),
        misaligned(x),
        np.repeat(x, 2, -1)[..., ::2],
    ):
        assert np.array_equal(layer(other), wanted)
    assert np.array_equal(layer(np.broadcast_to(x[:1], x.shape)), layer(np.repeat(x[:1], 2, 0)))
    transposed = {name: w if w is None else np.asfortranarray(w) for name, w in params.items()}
    assert np.array_equal(sa.SelfAttention(**transposed, num_heads=4, num_kv_heads=2)(x), wanted)


def test_batch_and_threads_do_not_matter(isa: str, make: Any, normal: Any) -> None:
    layer = sa.SelfAttention(**make(96, 6, 2, 16, 16, 96), num_heads=6, num_kv_heads=2, rope=True)
    x = normal(5, 120, 96)
    wanted = layer(x, causal=True, num_threads=1)
    for threads in (2, 3, 8):
        assert np.array_equal(layer(x, causal=True, num_threads=threads), wanted)
    for b in range(5):
        assert np.array_equal(layer(x[b], causal=True), wanted[b])
    padded = np.concatenate([x, np.full((5, 30, 96), np.nan, np.float32)], axis=1)
    lengths = np.full(5, 120)
    for options in ({}, {"q_lens": lengths}, {"q_offset": np.zeros(5, int)}):
        assert np.array_equal(layer(padded, kv_lens=lengths, causal=True, **options)[:, :120], wanted)


def test_padded_tokens_of_a_layer_keep_their_positions(isa: str, make: Any, normal: Any) -> None:
    layer = sa.SelfAttention(**make(24, 4, 2, 8, 8, 24), num_heads=4, num_kv_heads=2)
    x, lengths = normal(2, 6, 24), [6, 4]
    table = normal(8, 4)
    for options in (
        {"causal": True}, {"window": (1, 0)}, {"alibi_slopes": sa.alibi_slopes(4)}, {"t5": sa.T5Bias(table)}
    ):  # fmt: skip
        found = layer(x, kv_lens=lengths, **options)
        assert np.array_equal(found, layer(x, kv_lens=lengths, q_lens=lengths, **options))
        for b, length in enumerate(lengths):
            close(found[b, :length], layer(x[b, :length], **options))
    # q_lens without kv_lens: query i is still key i.
    close(layer(x, q_lens=lengths, causal=True)[1, :4], layer(x[1, :4], causal=True))
    with pytest.raises(ValueError, match=r"SelfAttention: kv_lens holds 7, which is outside 0\.\.6"):
        layer(x, kv_lens=[6, 7], causal=True)


def test_left_padded_tokens_of_a_layer_are_hidden(isa: str, make: Any, normal: Any) -> None:
    layer = sa.SelfAttention(**make(24, 4, 2, 8, 8, 24), num_heads=4, num_kv_heads=2)
    x, starts = normal(2, 6, 24), [0, 2]
    for options in ({}, {"causal": True}, {"window": (1, 0)}, {"alibi_slopes": sa.alibi_slopes(4)}):
        found = layer(x, kv_starts=starts, **options)
        for b, start in enumerate(starts):
            close(found[b, start:], layer(x[b, start:], **options))
    with pytest.raises(ValueError, match=r"SelfAttention: kv_starts holds 7, which is outside 0\.\.6"):
        layer(x, kv_starts=[6, 7])
    cache = sa.KVCache(2, num_kv_heads=2, head_dim=8, capacity=9)
    parts = [layer(part, kv_starts=starts, cache=cache) for part in (x[:, :4], x[:, 4:5], x[:, 5:])]
    close(np.concatenate(parts, axis=1)[:, 2:], layer(x, kv_starts=starts, causal=True)[:, 2:])


def test_threads_copy_odd_inputs_for_themselves(isa: str, make: Any, normal: Any) -> None:
    layer = sa.SelfAttention(**make(96, 6, 6, 16, 16, 96), num_heads=6)
    x = normal(2, 700, 96)
    wanted, spread = layer(x), np.repeat(x, 2, -1)[..., ::2]
    for _ in range(5):
        assert np.array_equal(layer(spread, num_threads=4), wanted)


def test_positions_broadcast(isa: str, make: Any, normal: Any) -> None:
    params, x = make(16, 2, 2, 8, 8, None), normal(3, 2, 9, 16)
    layer = sa.SelfAttention(**params, num_heads=2, rope=True)
    rows = np.arange(9) * 5
    for positions in (rows, rows[None], rows[None, None], np.arange(2)[:, None], np.arange(3)[:, None, None] + rows):
        full = np.broadcast_to(positions, x.shape[:-1]).copy()
        wanted, _ = expected(x, params, 2, 2, rope=sa.RoPE(), positions=full)
        close(layer(x, positions=positions), wanted)


def test_weights_are_copied_and_the_layer_is_immutable(make: Any, normal: Any) -> None:
    params, x = make(16, 2, 2, 8, 8, 16), normal(9, 16)
    layer = sa.SelfAttention(**params, num_heads=2)
    before = layer(x)
    for w in params.values():
        w[...] = np.nan
    assert np.array_equal(layer(x), before)
    for name in ("num_heads", "dtype", "anything"):
        with pytest.raises(AttributeError, match="immutable"):
            setattr(layer, name, 3)
        with pytest.raises(AttributeError, match="immutable"):
            delattr(layer, name)
    assert "num_heads=2" in repr(layer)


def test_many_threads_share_a_layer(make: Any, normal: Any) -> None:
    layer = sa.SelfAttention(**make(48, 4, 4, 12, 12, 48), num_heads=4, rope=True)
    inputs = [normal(2, n, 48) for n in (3, 60, 150, 33)]
    wanted = [layer(x, causal=True) for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: layer(inputs[i % 4], causal=True), range(200)))
    assert all(np.array_equal(y, wanted[i % 4]) for i, y in enumerate(found))


def test_empty(isa: str, make: Any, normal: Any) -> None:
    layer = sa.SelfAttention(**make(16, 2, 2, 8, 8, 5), num_heads=2)
    assert layer(normal(0, 9, 16)).shape == (0, 9, 5)
    assert layer(normal(2, 0, 16)).shape == (2, 0, 5)


@pytest.mark.one_isa
def test_positions_must_fit(make: Any, normal: Any) -> None:
    layer = sa.SelfAttention(**make(16, 2, 2, 8, 8, None), num_heads=2, rope=True)
    for positions in ([0, 1], 3, [[0] * 5] * 3):
        with pytest.raises(ValueError, match=r"positions has shape .*, which does not broadcast to \(2, 5\)"):
            layer(normal(2, 5, 16), positions=positions)
    with pytest.raises(TypeError, match="positions has dtype float64"):
        layer(normal(2, 5, 16), positions=np.zeros(5))
