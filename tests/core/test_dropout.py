"""Dropout: which weights are kept, and what becomes of the results."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import selfattn as sa
from selfattn import reference

TYPES = ["float32", "float64", "float16", "bfloat16"]
SEED = 0x0123456789ABCDEF


def philox(counter: tuple[int, ...], key: tuple[int, ...]) -> list[int]:
    """Philox4x32-10 as in the paper, for one counter."""
    c, k = list(counter), list(key)
    for i in range(10):
        if i > 0:
            k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
        high0, low0 = divmod(0xD2511F53 * c[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
    return c


def kept(batch: int, heads: int, q_len: int, kv_len: int, rate: float, seed: int, first: int = 0) -> Any:
    """Which weights are kept, (batch, heads, q_len, kv_len), one block of four keys at a time."""
    key, threshold = (seed % 2**32, seed >> 32), round(rate * 2**32)
    words = [
        philox((first + b, h, i, block), key)
        for b in range(batch) for h in range(heads) for i in range(q_len) for block in range(-(-kv_len // 4))
    ]  # fmt: skip
    return np.array(words).reshape(batch, heads, q_len, -(-kv_len // 4) * 4)[..., :kv_len] >= threshold


def hexadecimal(text: str) -> tuple[int, ...]:
    return tuple(int(word, 16) for word in text.split())


KNOWN = [  # counter, key and result, from the test vectors of Random123
    ("0 0 0 0", "0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.one_isa(reason="calls the reference alone")
@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_known_answers(counter: str, key: str, result: str) -> None:
    words, (low, high) = hexadecimal(counter), hexadecimal(key)
    assert tuple(philox(words, (low, high))) == hexadecimal(result)
    assert tuple(reference.philox(np.array(words, np.uint64), low | high << 32).tolist()) == hexadecimal(result)


@pytest.mark.dtypes(*TYPES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(2, 3, 19, 37), (1, 2, 1, 131), (1, 1, 70, 6)])
def test_which_weights_are_kept(isa: str, dtype: str, shape: tuple[int, ...]) -> None:
    pytest.importorskip("ml_dtypes")
    batch, heads, q_len, kv_len = shape
    q, k = np.zeros((batch, heads, q_len, 4), dtype), np.zeros((batch, heads, kv_len, 4), dtype)
    v = np.broadcast_to(np.eye(kv_len), (batch, heads, kv_len, kv_len)).astype(dtype)
    out, weights = sa.attention(q, k, v, dropout=0.25, seed=SEED, return_weights=True)
    expected = kept(*shape, 0.25, SEED)
    assert np.array_equal(weights != 0, expected)
    assert np.array_equal(out != 0, expected)  # v is the identity
    assert np.allclose(weights[expected], 1 / kv_len / 0.75, rtol=1e-5)
    assert np.array_equal(reference.dropout_factors(shape, 0.25, SEED) != 0, expected)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (30, 3)},
    "lengths": {"causal": True, "kv_lens": [77, 41], "q_lens": [33, 40], "kv_starts": [3, 5]},
    "terms": {"softcap": 4.0, "alibi_slopes": np.array([0.5, 0.1, 0.2, 0.0]), "sinks": np.array([0.0, 1.0, -1.0, 3.0])},
    "mask": {"mask": np.arange(77) % 5 != 1, "bias": np.linspace(-1, 1, 41)[:, None] * np.linspace(0, 1, 77)},
}


@pytest.mark.dtypes(*TYPES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_results(isa: str, check: Any, rng: Any, dtype: str, name: str) -> None:
    pytest.importorskip("ml_dtypes")
    q, k, v = (rng.standard_normal((2, heads, n, 9)).astype(dtype) for heads, n in ((4, 41), (2, 77), (2, 77)))
    check(q, k, v, dropout=0.3, seed=SEED, **OPTIONS[name])


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_results_of_lower_precision(isa: str, check: Any, normal: Any, precision: str) -> None:
    q, k, v = normal(1, 2, 50, 32), normal(1, 2, 133, 32), normal(1, 2, 133, 32)
    check(q, k, v, dropout=0.5, seed=1, causal=True, precision=precision)


@pytest.mark.parametrize("q_len", [1, 3, 200])
def test_long_keys(isa: str, check: Any, normal: Any, q_len: int) -> None:
    # Ranges of keys are merged; few rows use the tile kernel, too.
    check(normal(1, 2, q_len, 8), normal(1, 1, 4500, 8), normal(1, 1, 4500, 8), dropout=0.1, seed=7)


def test_batches_have_any_number_of_axes(isa: str, check: Any, normal: Any) -> None:
    check(normal(2, 1, 2, 9, 8), normal(3, 1, 23, 8), normal(3, 1, 23, 8), dropout=0.4, seed=2)
    check(normal(9, 8), normal(23, 8), normal(23, 8), dropout=0.4, seed=2)
    q, k, v = normal(2, 9, 4, 8), normal(2, 23, 2, 8), normal(2, 23, 2, 8)
    check(q, k, v, dropout=0.4, seed=2, layout="bshd")


def test_hidden_keys_stay_inert(isa: str, check: Any, normal: Any) -> None:
    q, k, v = normal(1, 2, 40, 8), normal(1, 2, 61, 8), normal(1, 2, 61, 8)
    options: dict[str, Any] = {"dropout": 0.4, "seed": 3, "mask": np.arange(61) != 11, "window": (20, 3)}
    expected = check(q, k, v, **options)
    k[:, :, 11] = np.nan
    v[:, :, 11] = np.inf
    assert np.array_equal(check(q, k, v, **options), expected)


def test_visible_nan_and_infinity_propagate(isa: str, check: Any, normal: Any) -> None:
    q, k, v = normal(1, 2, 20, 8), normal(1, 2, 61, 8), normal(1, 2, 61, 8)
    v[:, :, 30, 2] = np.inf  # 0 * inf is NaN: a weight that is dropped is 0, not hidden
    check(q, k, v, dropout=0.4, seed=3)
    k[:, :, 50, 2] = np.nan  # row 9 is the first that sees it
    out = sa.attention(q, k, v, dropout=0.4, seed=3, causal=True)
    assert np.array_equal(np.isnan(out[..., 0]), np.broadcast_to(np.arange(20) >= 9, (1, 2, 20)))


def test_bits_depend_on_nothing_else(isa: str, normal: Any) -> None:
    q, k, v = normal(3, 4, 150, 16), normal(3, 2, 300, 16), normal(3, 2, 300, 16)
    options: dict[str, Any] = {"dropout": 0.3, "seed": SEED, "return_weights": True}
    out, weights = sa.attention(q, k, v, num_threads=1, **options)
    for threads in (2, 5):
        assert all(map(np.array_equal, sa.attention(q, k, v, num_threads=threads, **options), (out, weights)))
    others = [x.copy() for x in (q, k, v)]
    for x in others:
        x[[0, 2]] = 1
    assert np.array_equal(sa.attention(*others, **options)[0][1], out[1])
    spread = [np.repeat(x, 2, axis=-1)[..., ::2] for x in (q, k, v)]
    assert np.array_equal(sa.attention(*spread, **options)[0], out)
    # The coordinates in the arrays decide, not those in a block.
    late = sa.attention(q, k, v, mask=np.arange(300) >= 101, **options)[1]
    assert np.array_equal(late[..., 101:] == 0, weights[..., 101:] == 0)
    few = sa.attention(q[:, :, :7], k[:, :, :131], v[:, :, :131], **options)[1]
    assert np.array_equal(few == 0, weights[:, :, :7, :131] == 0)


def test_lse_is_not_changed(isa: str, normal: Any) -> None:
    q, k, v = normal(2, 2, 30, 8), normal(2, 2, 40, 8), normal(2, 2, 40, 8)
    _, lse = sa.attention(q, k, v, causal=True, return_lse=True)
    _, dropped = sa.attention(q, k, v, causal=True, return_lse=True, dropout=0.9, seed=0)
    assert np.array_equal(lse, dropped)


def test_every_bit_of_the_seed_counts() -> None:
    shape = (1, 1, 40, 50)
    masks = [kept(*shape, 0.5, 0), *(reference.dropout_factors(shape, 0.5, 1 << bit) != 0 for bit in range(64))]
    q, k, v = (np.zeros((1, n, 2), np.float32) for n in (40, 50, 50))
    for bit, mask in enumerate(masks[1:]):
        weights = sa.attention(q, k, v, dropout=0.5, seed=1 << bit, return_weights=True)[1]
        assert np.array_equal(weights[0] != 0, mask[0, 0])
    assert len({mask.tobytes() for mask in masks}) == 65


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_the_rate_is_met(rate: float) -> None:
    q, k, v = (np.zeros((4, n, 2), np.float32) for n in (200, 400, 400))
    v += 1
    out, weights = sa.attention(q, k, v, dropout=rate, seed=11, return_weights=True)
    deviation = np.sqrt(rate * (1 - rate) / weights.size)
    assert abs(np.mean(weights == 0) - rate) < 4 * deviation
    assert abs(out.mean() - 1) < 4 * deviation / (1 - rate)


def test_extreme_rates(isa: str, check: Any, normal: Any) -> None:
    q, k, v = normal(1, 2, 9, 8), normal(1, 2, 20, 8), normal(1, 2, 20, 8)
    plain = sa.attention(q, k, v)
    assert np.array_equal(sa.attention(q, k, v, dropout=0, seed=5), plain)
    assert np.allclose(sa.attention(q, k, v, dropout=1e-12, seed=5), plain, rtol=0, atol=1e-6)  # threshold 0
    nearly_all = check(q, k, v, dropout=1 - 2**-53, seed=5, trivial=True)
    assert not nearly_all.any()
    assert not check(q[:, :, :0], k, v, dropout=0.5, seed=5, trivial=True).size
    assert not check(q, k[:, :, :0], v[:, :, :0], dropout=0.5, seed=5, trivial=True).any()


def test_sequences_count_as_batch_entries(isa: str, normal: Any) -> None:
    lengths, starts = [3, 0, 40, 21], [0, 3, 3, 43, 64]
    q, k, v = normal(64, 4, 8), normal(64, 2, 8), normal(64, 2, 8)
    options: dict[str, Any] = {"causal": True, "dropout": 0.3, "seed": SEED}
    out, weights = sa.attention_varlen(q, k, v, starts, return_weights=True, **options)
    for i, n in enumerate(lengths):
        rows = slice(starts[i], starts[i + 1])
        alone = [np.zeros((i + 1, *x[rows].shape), np.float32) for x in (q, k, v)]
        for x, part in zip(alone, (q, k, v), strict=True):
            x[i] = part[rows]
        assert np.array_equal(sa.attention(*alone, layout="bshd", **options)[i], out[rows])
        assert np.array_equal((weights[i] != 0), np.tri(n, dtype=bool) & kept(1, 4, n, n, 0.3, SEED, i)[0])


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("q_len", [1, 5])
def test_caches(isa: str, normal: Any, dtype: str, q_len: int) -> None:
    q, k, v = normal(2, 4, q_len, 8), normal(2, 2, 75, 8), normal(2, 2, 75, 8)
    options: dict[str, Any] = {"dropout": 0.3, "seed": SEED, "return_weights": True}
    cache = sa.KVCache(2, num_kv_heads=2, head_dim=8, capacity=80, dtype=dtype)
    cache.append(k, v)
    out, weights = sa.attention_with_kvcache(q, cache, **options)
    plain, all_weights = sa.attention_with_kvcache(q, cache, return_weights=True)
    assert not np.array_equal(out, plain)
    mask = kept(2, 4, q_len, 75, 0.3, SEED)
    assert np.allclose(weights[..., :75], all_weights[..., :75] * mask / 0.7, rtol=1e-5, atol=1e-7)
    if dtype == "float32":
        assert np.array_equal(out, sa.attention(q, k, v, causal=True, **options)[0])
    pages = sa.PagedKVCache(40, 4, num_kv_heads=2, head_dim=8, dtype=dtype)
    sequences = [pages.allocate() for _ in range(2)]
    for b, sequence in enumerate(sequences):
        pages.append(sequence, k[b], v[b])
    for cascade in (False, True):
        paged = sa.attention_with_kvcache(q, pages, sequences=sequences, cascade=cascade, **options)[0]
        assert np.array_equal(paged, out)


def test_a_cascade_drops_the_same_weights(isa: str, normal: Any) -> None:
    pages = sa.PagedKVCache(40, 4, num_kv_heads=2, head_dim=8)
    first = pages.allocate()
    pages.append(first, normal(2, 30, 8), normal(2, 30, 8))
    sequences = [first, pages.fork(first)]
    q = normal(2, 4, 1, 8)
    found = [
        sa.attention_with_kvcache(q, pages, sequences=sequences, cascade=x, dropout=0.3, seed=1) for x in (False, True)
    ]
    assert np.array_equal(*found)


def test_layers_and_relative_attention(isa: str, normal: Any) -> None:
    mask = kept(2, 4, 13, 13, 0.3, SEED)
    weights_of: list[Any] = []
    x, w = normal(2, 13, 32), normal(3, 32, 32)
    for options in ({"dropout": 0.3, "seed": SEED}, {}):
        weights_of.append(sa.self_attention(x, *w, num_heads=4, return_weights=True, **options)[1])
    assert np.allclose(weights_of[0], weights_of[1] * mask / 0.7, rtol=1e-5, atol=1e-7)
    q, r, u = normal(2, 4, 13, 8), normal(13, 8), normal(4, 8)
    exact = reference.attention(q, q, q, causal=True, q_offset=0, relative=(r, u, u, 0), dropout=0.3, seed=SEED)
    found = sa.relative_attention(q, q, q, r, u, u, dropout=0.3, seed=SEED)
    assert np.allclose(found, exact.out, rtol=0, atol=1e-5)


def test_explain_tells_why_few_rows_use_tiles(normal: Any) -> None:
    q, k = normal(1, 2, 1, 8), normal(1, 2, 90, 8)
    assert sa.explain(q, k, k)["kernel"] == "row"
    told = sa.explain(q, k, k, dropout=0.5, seed=1)
    assert told["kernel"] == "tile"
    assert "dropout" in told["reason"]


ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"dropout": 0.1}, ValueError, "dropout is 0.1 without a seed: pass an integer in 0..18446744073709551615"),
    ({"dropout": 1.0, "seed": 1}, ValueError, "dropout is 1, but it must be at least 0 and less than 1"),
    ({"dropout": -0.1, "seed": 1}, ValueError, "dropout is -0.1, but it must be"),
    ({"dropout": np.nan, "seed": 1}, ValueError, "dropout is nan, but it must be finite"),
    ({"dropout": "a", "seed": 1}, TypeError, "dropout is 'a', but a real number is needed"),
    ({"dropout": True, "seed": 1}, TypeError, "dropout is True"),
    ({"dropout": None, "seed": 1}, TypeError, "dropout is None"),
    ({"dropout": np.ones(2), "seed": 1}, TypeError, "but a real number is needed"),
    ({"dropout": 0.1, "seed": -1}, ValueError, "seed is -1, but it must be in 0..18446744073709551615"),
    ({"dropout": 0.1, "seed": 1 << 64}, ValueError, "seed is 18446744073709551616"),
    ({"dropout": 0.1, "seed": 1.0}, TypeError, "seed is 1.0, but an integer is needed"),
    ({"seed": "a"}, TypeError, "seed is 'a'"),
]


@pytest.mark.one_isa
@pytest.mark.parametrize(("options", "error", "message"), ERRORS, ids=lambda x: str(x)[:40])
def test_errors(options: dict[str, Any], error: type[Exception], message: str) -> None:
    x, out = np.ones((2, 3, 4), np.float32), np.full((2, 3, 4), 7, np.float32)
    calls = {
        "attention": lambda: sa.attention(x, x, x, out=out, **options),
        "attention_varlen": lambda: sa.attention_varlen(x, x, x, [0, 2], out=out, **options),
        "relative_attention": lambda: sa.relative_attention(x, x, x, x, x[0, :2], x[0, :2], out=out, **options),
        "explain": lambda: sa.explain(x, x, x, **options),
        "attention_vjp": lambda: sa.attention_vjp(x, x, x, **options),
        "attention_backward": lambda: sa.attention_backward(x, x, x, x, x, x[..., 0], **options),
        "self_attention": lambda: sa.self_attention(x, *np.ones((3, 4, 4), np.float32), num_heads=2, **options),
        "attention_with_kvcache": lambda: sa.attention_with_kvcache(
            x[None], sa.KVCache(1, 2, 4, capacity=9), **options
        ),
    }
    for name, call in calls.items():
        with pytest.raises(error) as caught:
            call()
        assert str(caught.value).startswith(f"{name}: "), caught.value
        assert message in str(caught.value)
    assert (out == 7).all()


def test_a_numpy_integer_is_a_seed() -> None:
    x, seed = np.ones((2, 3, 4), np.float32), np.uint64(2**64 - 1)
    found = sa.attention(x, x, x, dropout=np.float32(0.5), seed=seed)  # type: ignore[arg-type]
    assert np.array_equal(found, sa.attention(x, x, x, dropout=0.5, seed=2**64 - 1))
