"""Results are bit-identical for the same instruction set, shape and options, whatever else differs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import selfattn as sa

SHAPES = [
    # batch, heads, kv heads, q_len, kv_len, dim
    (1, 1, 1, 300, 300, 16),
    (3, 4, 4, 100, 130, 16),
    (2, 6, 2, 65, 200, 24),
    (2, 8, 2, 1, 3000, 16),
    (1, 4, 1, 5, 2500, 16),
    (1, 2, 1, 60, 5000, 8),
    (4, 2, 2, 17, 40, 64),
]
OPTIONS: list[dict[str, Any]] = [{}, {"causal": True}, {"window": (30, 5)}, {"softcap": 4.0}, {"scale": -1.0}]


def make(rng: np.random.Generator, shape: Any, dtype: Any = np.float32) -> list[Any]:
    batch, heads, kv_heads, q_len, kv_len, dim = shape
    return [
        rng.standard_normal((batch, h, n, dim)).astype(dtype)
        for h, n in ((heads, q_len), (kv_heads, kv_len), (kv_heads, kv_len))
    ]


def same(a: Any, b: Any) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_threads_do_not_matter(isa: str, rng: Any, shape: Any, options: Any, dtype: Any) -> None:
    qkv = make(rng, shape, dtype)
    mask = rng.random(shape[3:5]) < 0.8
    asked = {"return_lse": True, "return_weights": True, "mask": mask, **options}
    expected = sa.attention(*qkv, num_threads=1, **asked)
    for threads in (2, 3, 4, 7, 8):
        assert same(sa.attention(*qkv, num_threads=threads, **asked), expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_batch_and_neighbours_do_not_matter(isa: str, rng: Any, shape: Any) -> None:
    batch, heads, kv_heads, q_len, kv_len, _ = shape
    q, k, v = make(rng, shape)
    lengths = rng.integers(kv_len // 2, kv_len + 1, batch)
    queries = np.minimum(lengths, q_len)
    bias = rng.standard_normal((batch, heads, 1, kv_len)).astype(np.float32)
    options: dict[str, Any] = {"causal": True, "return_lse": True, "num_threads": 2}
    out, lse = sa.attention(q, k, v, q_lens=queries, kv_lens=lengths, bias=bias, **options)
    group = heads // kv_heads
    for b in range(batch):
        one = slice(b, b + 1)
        alone = sa.attention(
            q[one], k[one], v[one], q_lens=queries[one], kv_lens=lengths[one], bias=bias[one], **options
        )
        assert same(alone, (out[one], lse[one]))
        for h in range(kv_heads):
            heads_of = slice(h * group, (h + 1) * group)
            kv = slice(h, h + 1)
            part = sa.attention(
                q[one, heads_of],
                k[one, kv],
                v[one, kv],
                q_lens=queries[one],
                kv_lens=lengths[one],
                bias=bias[one, heads_of],
                **options,
            )
            assert same(part, (out[one, heads_of], lse[one, heads_of]))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_entry_alone_gives_the_same_bits_with_every_option(isa: str, rng: Any, shape: Any, dtype: Any) -> None:
    batch, heads, kv_heads, q_len, kv_len, _ = shape
    q, k, v = make(rng, shape, dtype)
    options: dict[str, Any] = {
        "mask": rng.random((batch, heads, q_len, kv_len)) < 0.8,
        "alibi_slopes": rng.random((batch, heads)) / 50,
        "q_lens": rng.integers(q_len // 2, q_len + 1, batch),
        "q_offset": rng.integers(0, kv_len, batch),
    }
    sinks, group = rng.standard_normal(heads), heads // kv_heads
    asked: dict[str, Any] = {"window": (kv_len // 2, 9), "softcap": 5.0, "return_lse": True, "return_weights": True}
    together = sa.attention(q, k, v, sinks=sinks, **options, **asked)
    for b in range(batch):
        for h in range(kv_heads):
            one, kv, members = slice(b, b + 1), slice(h, h + 1), slice(h * group, (h + 1) * group)
            own = {name: x[one, members] if x.ndim > 1 else x[one] for name, x in options.items()}
            alone = sa.attention(q[one, members], k[one, kv], v[one, kv], sinks=sinks[members], **own, **asked)
            assert same(alone, [x[one, members] for x in together])


def test_runs_do_not_matter(isa: str, rng: Any) -> None:
    qkv = make(rng, SHAPES[2])
    expected = sa.attention(*qkv)
    assert all(np.array_equal(sa.attention(*qkv), expected) for _ in range(20))


def test_order_of_the_batch_does_not_matter(isa: str, rng: Any) -> None:
    qkv = make(rng, SHAPES[1])
    lengths = np.array([130, 7, 64])
    expected = sa.attention(*qkv, kv_lens=lengths)
    order = [2, 0, 1]
    assert np.array_equal(sa.attention(*(x[order] for x in qkv), kv_lens=lengths[order]), expected[order])


@pytest.mark.parametrize("kv_len", [300, 5000])
@pytest.mark.parametrize("options", [{"window": (200, 5)}, {"causal": True, "window": (60, None)}], ids=str)
def test_queries_before_and_after_do_not_matter(isa: str, rng: Any, options: Any, kv_len: int) -> None:
    # Their visible keys begin and end elsewhere.
    q, k, v = make(rng, (1, 2, 2, 250, kv_len, 16))
    offset = kv_len - 250
    out = sa.attention(q, k, v, q_offset=offset, **options)
    for first, last in ((30, 250), (0, 190), (77, 200)):
        part = sa.attention(q[:, :, first:last], k, v, q_offset=offset + first, **options)
        assert np.array_equal(part, out[:, :, first:last])
