"""Checks of `Group.attention_with_kvcache` and `SplitSelfAttention`, see rank_checks.py."""

from __future__ import annotations

from typing import Any

import numpy as np
from rank_operands import error_of_all, raised, sha

import selfattn as sa
from selfattn.distributed import Group, SplitSelfAttention, SpreadCache

STEPS = [50, 1, 1, 3, 1, 20, 1, 1, 1, 1]


def tokens(step: int, count: int, dtype: Any = np.float32) -> Any:
    rng = np.random.default_rng(step)
    q = rng.standard_normal((2, 4, count, 16)).astype(dtype)
    k, v = rng.standard_normal((2, 2, 2, count, 16)).astype(dtype)
    return q, k, v


def lengths(cache: Any, sequences: Any) -> list[int]:
    return [cache.length(i) for i in sequences] if sequences else [int(n) for n in cache.lengths]


def follow(group: Group, own: Any, alone: Any, sequences: Any = None, dtype: Any = np.float32, **options: Any) -> None:
    """Generate with caches that are spread, and alone; the results are the same on all ranks."""
    own_sequences, alone_sequences = sequences or (None, None)
    for step, count in enumerate(STEPS):
        q, k, v = tokens(step, count, dtype)
        found = group.attention_with_kvcache(q, own, k, v, sequences=own_sequences, return_lse=True, **options)
        expected = sa.attention_with_kvcache(q, alone, k, v, sequences=alone_sequences, return_lse=True, **options)
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == other.dtype
            tolerance = 1e-5 if one.dtype == np.float32 else 4e-3
            np.testing.assert_allclose(one.astype(float), other.astype(float), rtol=0, atol=tolerance)
        assert len(set(group._link.exchange("test", sha(*found)))) == 1
    found = group._link.exchange("test", lengths(own, own_sequences))
    assert np.array_equal(np.sum(found, axis=0), lengths(alone, alone_sequences))
    assert group.size == 1 or np.all(np.max(found, axis=0) < sum(STEPS))
    # The cache is only read: one query, or several that see all tokens.
    for count, more in ((1, {}), (3, {"causal": False})):
        q, _, _ = tokens(77, count, dtype)
        found = group.attention_with_kvcache(q, own, sequences=own_sequences, **options, **more)
        expected = sa.attention_with_kvcache(q, alone, sequences=alone_sequences, **options, **more)
        np.testing.assert_allclose(found.astype(float), expected.astype(float), rtol=0, atol=4e-3)


def check_caches(group: Group) -> None:
    for dtype in ("float32", "float16", "bfloat16"):
        follow(group, sa.KVCache(2, 2, 16, 100, dtype=dtype), sa.KVCache(2, 2, 16, 100, dtype=dtype))
    follow(group, sa.KVCache(2, 2, 16, 100), sa.KVCache(2, 2, 16, 100), rope=True, scale=0.3, softcap=5.0)
    coordinates = sa.RoPE(axes=[0, 1] * 4)  # equal ones, the places in the whole sequence
    follow(group, sa.KVCache(2, 2, 16, 100), sa.KVCache(2, 2, 16, 100), rope=coordinates)
    follow(group, sa.KVCache(2, 2, 16, 100), sa.KVCache(2, 2, 16, 100), sinks=np.ones(4))
    narrow = np.float16
    follow(group, sa.KVCache(2, 2, 16, 100, dtype=narrow), sa.KVCache(2, 2, 16, 100, dtype=narrow), dtype=narrow)
    codes = [sa.KVCache(2, 2, 16, 100, dtype="int8") for _ in range(2)]
    follow(group, *codes)


def check_pages(group: Group) -> None:
    caches = [sa.PagedKVCache(30, 8, 2, 16) for _ in range(2)]
    for _ in range(group.rank):
        caches[0].allocate()  # ids of sequences may differ between ranks
    sequences = [[cache.allocate(), cache.allocate()] for cache in caches]
    follow(group, *caches, sequences=sequences, rope=sa.RoPE(base=500.0))


def check_layout_and_mask(group: Group) -> None:
    own, alone = sa.KVCache(2, 2, 16, 100), sa.KVCache(2, 2, 16, 100)
    for step in range(3):
        q, k, v = tokens(step, 4)
        mask = np.tril(np.random.default_rng(step).random((4, 4)) < 0.7) | np.eye(4, dtype=bool)
        expected = sa.attention_with_kvcache(q, alone, k, v, mask=mask, causal=False)
        swapped = [x.swapaxes(1, 2) for x in (q, k, v)]
        found = group.attention_with_kvcache(
            swapped[0], own, *swapped[1:], mask=mask, causal=False, layout="bshd", num_threads=1
        )
        np.testing.assert_allclose(found.swapaxes(1, 2), expected, rtol=0, atol=1e-5)


def check_distances(group: Group) -> None:
    """What depends on positions, with caches that know them; also caches with a window, and a prompt in two parts."""
    rng = np.random.default_rng(4)
    slopes, t5 = sa.alibi_slopes(4), sa.T5Bias(rng.standard_normal((32, 4)).astype(np.float32))
    cases: list[dict[str, Any]] = [
        {"window": (7, None)},
        {"window": (20, 0), "alibi_slopes": np.stack([slopes, 2 * slopes]), "rope": True},
        {"t5": t5, "sinks": np.ones(4)},
        {"window": (2, None), "sinks": np.ones(4)},
        {"bias": rng.standard_normal((2, 1, 1, 100)).astype(np.float32)},
        {"window": (25, None), "alibi_slopes": slopes},
    ]
    for case, options in enumerate(cases):
        ring = 25 if case in (0, 3, 5) else None
        alone = sa.KVCache(2, 2, 16, 100, window=ring)
        own = SpreadCache(sa.KVCache(2, 2, 16, 100, window=ring))
        for step, count in enumerate([30, 1, 1, 3, 1, 20, 1, 1, 1, 1] * (1 + 2 * (ring is not None))):
            q, k, v = tokens(step, count)
            given = dict(options)
            if "bias" in given:
                given["bias"] = given["bias"][..., : int(alone.lengths[0]) + count]
            found = group.attention_with_kvcache(q, own, k, v, return_lse=True, **given)
            expected = sa.attention_with_kvcache(q, alone, k, v, return_lse=True, **given)
            for one, other in zip(found, expected, strict=True):
                np.testing.assert_allclose(one, other, rtol=0, atol=1e-5, err_msg=str((step, sorted(options))))
            if step == 4:  # sequences of different lengths
                ends = np.array([int(alone.lengths[0]), int(alone.lengths[1]) - 2])
                alone.truncate(ends)
                rows = [own.rows(b)[own.rows(b) < end] for b, end in enumerate(ends)]
                own.cache.truncate([len(x) for x in rows])
                for b, x in enumerate(rows):
                    own.place(b, x)
        q, _, _ = tokens(3, 1)
        if "bias" not in options:
            expected = sa.attention_with_kvcache(q, alone, **options)
            np.testing.assert_allclose(group.attention_with_kvcache(q, own, **options), expected, rtol=0, atol=1e-5)


def check_prompt(group: Group) -> None:
    """A prompt that was computed together, then a paged cache with a window."""
    q, k, v = tokens(1, 40)
    rows = group.rows(40)
    pages, alone = sa.PagedKVCache(30, 8, 2, 16, window=9), sa.KVCache(2, 2, 16, 100, window=9)
    own = SpreadCache(pages)
    sequences = [pages.allocate(), pages.allocate()]
    for b, sequence in enumerate(sequences):
        pages.append(sequence, k[b][:, rows], v[b][:, rows])
        own.place(sequence, rows)
    alone.append(k, v)
    for step, count in enumerate((1, 5, 1, 1)):
        q, k, v = tokens(step, count)
        options = {"window": (9, None), "softcap": 3.0}
        found = group.attention_with_kvcache(q, own, k, v, sequences=sequences, **options)
        expected = sa.attention_with_kvcache(q, alone, k, v, **options)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert all(len(own.rows(sequence)) == pages.length(sequence) for sequence in sequences)


def check_errors(group: Group) -> dict[str, str]:
    cache = sa.KVCache(2, 2, 16, 10 if group.rank == 0 else 5)
    q, k, v = tokens(0, 4)
    group.attention_with_kvcache(q, cache, k, v)
    before = lengths(cache, None)
    odd = group.rank == group.size - 1
    pages = sa.PagedKVCache(4, 8, 2, 16)

    def error(*arrays: Any, **options: Any) -> str:
        text = error_of_all(group, lambda: group.attention_with_kvcache(*arrays, **options))
        assert lengths(cache, None) == before
        return text

    window = sa.KVCache(2, 2, 16, 10, window=4)
    full = sa.KVCache(2, 2, 16, 10)
    full.append(k, v)
    empty = sa.KVCache(2, 2, 16, 10)
    many_q, many_k, many_v = tokens(1, 6)
    return {
        "full": error(many_q, cache, many_k, many_v),
        "missing": error(q, cache),
        "v": error(q, cache, k),
        "mask": error(q, cache, mask=np.eye(4, dtype=bool), causal=False),
        "cache": error(q, [] if odd else cache, k, v),
        "window_of_cache": error(q, window, k, v),
        "sequences": error(q, pages, k, v),
        "window": error(q, cache, k, v, window=(3, 0)),
        "positions": error(q, SpreadCache(cache), k, v, window=(3, 0)),
        "rows": raised(lambda: SpreadCache(cache, [1, 0])),
        "overlap": error(q, SpreadCache(full, range(4)), k, v, window=(3, 0)),
        "gap": error(q, SpreadCache(full, range(5 * group.rank, 5 * group.rank + 4)), k, v, window=(3, 0)),
        "kv_heads": error(q, sa.KVCache(2, 1 if odd else 2, 16, 10), k, v),
        "head_dim": error(q, sa.KVCache(2, 2, 8 if odd else 16, 10, value_dim=16), k, v),
        "value_dim": error(q, sa.KVCache(2, 2, 16, 10, value_dim=8 if odd else 16), k, v),
        "kept": error(q, SpreadCache(sa.KVCache(2, 2, 16, 10, window=3 + odd)), k, v, window=(3, 0)),
        "kind": error(q, SpreadCache(full, range(4)) if odd else full, k, v),
        "kv_starts": error(q, cache, k, v, kv_starts=3),
        "chunk": error(q, cache, k, v, chunk=100),
        "prefix_lens": error(q, cache, k, v, prefix_lens=3),
        "batch": error(q[:1], cache, k[:1], v[:1]),
        "unknown": error(q, cache, k, v, cache_seqlens=3),
        "bias_too_wide": error(q, SpreadCache(empty), k, v, bias=np.zeros((1, 5), np.float32)),
        "bias_too_narrow": error(q, SpreadCache(empty), k, v, bias=np.zeros((1, 3), np.float32)),
        "bias_of_batch": error(q, SpreadCache(empty), k, v, bias=np.zeros((3, 1, 1, 4), np.float32)),
        "heads_of_t5": error(q, SpreadCache(empty), k, v, t5=sa.T5Bias(np.ones((32, 1)))),
        "heads_of_slopes": error(q, SpreadCache(empty), k, v, alibi_slopes=np.ones(3)),
    }


def weights_of_layer(rng: np.random.Generator, dtype: Any = np.float32) -> tuple[Any, dict[str, Any]]:
    w_q, w_o = rng.standard_normal((2, 80, 80)).astype(dtype) / 9
    w_k, w_v = rng.standard_normal((2, 80, 40)).astype(dtype) / 9
    b_q, b_o = rng.standard_normal((2, 80)).astype(dtype)
    b_k, b_v = rng.standard_normal((2, 40)).astype(dtype)
    settings = {"num_heads": 10, "num_kv_heads": 5, "rope": True, "b_q": b_q, "b_k": b_k, "b_v": b_v, "b_o": b_o}
    return (w_q, w_k, w_v, w_o), settings


def check_layer(group: Group) -> None:
    rng = np.random.default_rng(0)
    weights, settings = weights_of_layer(rng)
    settings |= {"norm": sa.RMSNorm(np.ones(80)), "post_norm": sa.LayerNorm(np.linspace(1, 2, 80))}
    split, alone = SplitSelfAttention(group, *weights, **settings), sa.SelfAttention(*weights, **settings)
    x = rng.standard_normal((2, 9, 80), dtype=np.float32)
    cases: list[dict[str, Any]] = [
        {},
        {"causal": True, "residual": x},
        {"alibi_slopes": sa.alibi_slopes(10), "sinks": np.ones(10), "num_threads": 1},
        {"alibi_slopes": np.ones((2, 1)), "dropout": 0.4, "seed": 3},
        {"t5": sa.T5Bias(rng.standard_normal((32, 10))), "scale": 1.0},
        {"mask": rng.random((10, 9, 9)) < 0.8, "bias": rng.standard_normal((1, 9, 9))},
        {"kv_lens": [9, 4], "causal": True},
    ]
    for options in cases:
        out = np.empty_like(x)
        assert split(x, **options, out=out) is out
        np.testing.assert_allclose(out, alone(x, **options), rtol=0, atol=2e-5, err_msg=str(sorted(options)))
        assert len(set(group._link.exchange("test", sha(out)))) == 1
    count = split.kv_heads.stop - split.kv_heads.start
    for window in (4, None):
        own, whole = (sa.KVCache(2, heads, 8, 20, window=window) for heads in (count, 5))
        for part in (x[:, :6], x[:, 6:7], x[:, 7:]):
            options = {} if window is None else {"window": (window, 0)}
            found, expected = split(part, cache=own, **options), alone(part, cache=whole, **options)
            np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)
    full = sa.KVCache(2, count, 8, 9)
    full.append(*np.ones((2, 2, count, 9, 8), np.float32))
    text = error_of_all(group, lambda: split(x, cache=own if group.rank else full))
    assert "capacity" in text or "full" in text, text
    assert lengths(own, None) == [9, 9]


def check_layer_gradients(group: Group) -> None:
    rng = np.random.default_rng(1)
    weights, settings = weights_of_layer(rng, np.float64)
    split = SplitSelfAttention(group, *weights, **settings)
    x, context = rng.standard_normal((2, 9, 80)), rng.standard_normal((2, 7, 80))
    terms = {"sinks": np.ones(10), "alibi_slopes": rng.random((2, 1)), "t5": sa.T5Bias(rng.standard_normal((32, 10)))}
    cases: list[tuple[dict[str, Any], tuple[str, ...]]] = [
        ({"causal": True}, ("x", "w_q", "w_k", "w_v", "w_o")),
        ({"context": context, "dropout": 0.4, "seed": 3}, ("w_o", "context", "b_q", "b_k", "b_v", "x")),
        ({**terms, "bias": rng.standard_normal((10, 9, 9))}, ("b_o", "bias", *terms, "scale")),
        ({"bias": rng.standard_normal((9, 9)), "positions": np.arange(9)}, ("bias",)),
    ]
    for options, wrt in cases:
        expected_y, expected_vjp = sa.self_attention_vjp(x, *weights, **settings, **options, wrt=wrt)
        y, vjp = split.vjp(x, wrt=wrt, **options)
        np.testing.assert_allclose(y, expected_y, rtol=0, atol=1e-12)
        grad = rng.standard_normal(y.shape)
        expected, found = expected_vjp(grad), vjp(grad)
        assert list(found) == list(wrt)
        for name, value in expected.items():
            if name[:2] in ("w_", "b_") and name != "b_o":
                heads = split.heads if name[2] in "qo" else split.kv_heads
                columns = slice(heads.start * 8, heads.stop * 8)
                value = value[columns] if name == "w_o" else value[..., columns]
            else:
                assert len(set(group._link.exchange("test", sha(found[name])))) == 1
            np.testing.assert_allclose(found[name], value, rtol=1e-10, atol=1e-10, err_msg=name)
