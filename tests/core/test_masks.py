"""What is hidden: every kind of limit, alone and together; hidden values are inert, visible ones propagate."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from mask_cases import SHAPES, arrays

import selfattn as sa
from selfattn import reference

pytestmark = pytest.mark.dtypes("float32", "float64")


@pytest.mark.parametrize("axes", [a for n in range(5) for a in itertools.combinations(range(4), n)])
def test_mask_broadcasts(isa: str, check: Any, rng: Any, axes: Any) -> None:
    shape = (2, 4, 2, 20, 37)
    full = (2, 4, 20, 37)
    mask = rng.random([1 if axis in axes else n for axis, n in enumerate(full)]) < 0.6
    check(*arrays(rng, shape), mask=mask, trivial=True)
    if axes[: len(axes)] == tuple(range(len(axes))):  # leading axes may be missing
        check(*arrays(rng, shape), mask=mask.reshape(mask.shape[len(axes) :]), trivial=True)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_bias(isa: str, check: Any, rng: Any, shape: Any, dtype: Any) -> None:
    _, heads, _, q_len, kv_len = shape
    bias = rng.standard_normal((heads, q_len, kv_len)).astype(dtype)
    bias[rng.random(bias.shape) < 0.3] = -np.inf
    check(*arrays(rng, shape), bias=bias)
    check(*arrays(rng, shape), bias=bias, mask=rng.random((q_len, kv_len)) < 0.7)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("offset", [None, 0, 5, -3, -200, 10_000, "array"])
@pytest.mark.parametrize("window", [None, (4, None), (None, 2), (40, 3), (0, 0)])
@pytest.mark.parametrize("causal", [False, True])
def test_causal_window_offset(
    isa: str, check: Any, rng: Any, shape: Any, offset: Any, window: Any, causal: bool
) -> None:
    if offset == "array":
        offset = rng.integers(-5, shape[4], shape[0])
    check(*arrays(rng, shape, 4), causal=causal, q_offset=offset, window=window, trivial=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_lengths(isa: str, check: Any, rng: Any, shape: Any) -> None:
    batch, _, _, q_len, kv_len = shape
    for kv, q in ((kv_len, q_len), (0, q_len), (kv_len // 2, q_len // 2), (1, 1), (kv_len, 0)):
        options = {
            "kv_lens": np.linspace(kv, kv_len, batch).astype(int),
            "q_lens": np.linspace(q, q_len, batch).astype(int),
        }
        for causal, sinks in itertools.product((False, True), (None, np.linspace(-1, 1, shape[1]))):
            check(*arrays(rng, shape), causal=causal, sinks=sinks, trivial=True, **options)
    check(*arrays(rng, shape), kv_lens=kv_len // 3, q_lens=q_len, causal=True, trivial=True)


@pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        {"window": (2, 1)},
        {"window": (None, 0)},
        {"alibi_slopes": np.array([0.5, 0.1])},
        {"t5": sa.T5Bias(np.linspace(-1, 1, 64).reshape(32, 2))},
    ],
    ids=lambda options: "-".join(options),
)
@pytest.mark.parametrize("q_len", [6, 60])
def test_right_padded_rows_are_as_if_alone(isa: str, check: Any, normal: Any, options: Any, q_len: int) -> None:
    q, k, v = normal(2, 2, q_len, 8), normal(2, 2, q_len, 8), normal(2, 2, q_len, 8)
    lengths = [q_len, q_len - 2]
    out = check(q, k, v, q_lens=lengths, kv_lens=lengths, **options)
    for b, length in enumerate(lengths):
        alone = sa.attention(*(x[b, :, :length] for x in (q, k, v)), **options)
        assert np.allclose(out[b, :, :length], alone, rtol=0, atol=1e-6)
    for call in (sa.attention, sa.explain, reference.attention):
        with pytest.raises(ValueError, match=r"kv_lens holds .*q_lens.*q_offset"):
            call(q, k, v, kv_lens=lengths, **options)
    check(q, k, v, kv_lens=lengths)  # where positions do not count, lengths of keys are enough
    check(q, k, v, kv_lens=lengths, q_offset=0, **options)
    check(q[:, :, :3], k, v, kv_lens=lengths, **options)  # the newest queries of longer sequences


@pytest.mark.parametrize("shape", SHAPES)
def test_left_padded_rows(isa: str, check: Any, rng: Any, shape: Any) -> None:
    batch, heads, _, q_len, kv_len = shape
    starts = np.linspace(kv_len // 3, kv_len, batch).astype(int)
    q, k, v = arrays(rng, shape)
    for options in ({}, {"causal": True}, {"window": (kv_len // 4, 0)}, {"sinks": np.linspace(-1, 1, heads)}):
        out = check(q, k, v, kv_starts=starts, trivial=True, **options)
        for b, start in enumerate(starts):  # as if alone: the newest queries are aligned with the last keys
            alone = sa.attention(q[b], k[b, :, start:], v[b, :, start:], **options)
            assert np.allclose(out[b], alone, rtol=0, atol=1e-6)
    check(q, k, v, kv_starts=starts // 2, kv_lens=np.maximum(kv_len // 4, 1), q_lens=q_len, causal=True, trivial=True)
    k[:, :, : starts[0]] = v[:, :, : starts[0]] = np.nan  # what is hidden never matters
    check(q, k, v, kv_starts=starts[0], causal=True, q_offset=kv_len - q_len, trivial=True)
    swapped = [x.swapaxes(1, 2) for x in (q, k, v)]
    check(*swapped, kv_starts=starts, layout="bshd", trivial=True)


def test_starts_beyond_the_lengths_leave_nothing(isa: str, normal: Any) -> None:
    q, k, v = normal(3, 2, 5, 8), normal(3, 2, 9, 8), normal(3, 2, 9, 8)
    lens = {"kv_starts": [4, 9, 6], "kv_lens": [4, 9, 5]}
    out, lse, weights = sa.attention(q, k, v, return_lse=True, return_weights=True, **lens)
    assert not out.any()
    assert not weights.any()
    assert np.isneginf(lse).all()
    out = np.ones((3, 2, 5, 8), np.float32)
    with pytest.raises(ValueError, match=r"^attention: kv_starts holds 10, which is outside 0\.\.9"):
        sa.attention(q, k, v, kv_starts=10, out=out)
    assert (out == 1).all()


@pytest.mark.dtypes("float32", "float64", "float16", "bfloat16")
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("q_len", [1, 40])
def test_left_padding_in_every_type(isa: str, check: Any, rng: Any, dtype: str, q_len: int) -> None:
    pytest.importorskip("ml_dtypes")
    q, k, v = (rng.standard_normal((2, h, n, 8)).astype(dtype) for h, n in ((4, q_len), (2, 90), (2, 90)))
    check(q, k, v, kv_starts=[70, 11], causal=True, trivial=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_everything_at_once(isa: str, check: Any, rng: Any, shape: Any) -> None:
    batch, heads, _, q_len, kv_len = shape
    parts: dict[str, Any] = {
        "mask": rng.random((batch, 1, q_len, kv_len)) < 0.8,
        "bias": rng.standard_normal((heads, 1, kv_len)).astype(np.float32),
        "causal": True,
        "window": (kv_len // 2, 1),
        "kv_lens": rng.integers(kv_len // 2, kv_len + 1, batch),
        "kv_starts": rng.integers(0, kv_len // 2, batch),
        "alibi_slopes": rng.random((batch, heads)) / 10,
        "softcap": 3.0,
        "sinks": rng.standard_normal(heads),
    }
    for count in range(1, len(parts) + 1):
        for names in itertools.islice(itertools.combinations(parts, count), 0, None, 3):
            options = {name: parts[name] for name in names}
            if "kv_lens" in options:  # keys may be fewer than queries, but then q_lens is needed as well
                options["q_lens"] = np.minimum(options["kv_lens"], q_len)
            check(*arrays(rng, shape, 4), trivial=True, **options)


@pytest.mark.parametrize("q_len", [1, 20, 130])
@pytest.mark.parametrize("first", [0, 1, 127, 128, 129, 256, 300])
def test_masks_that_empty_tiles(isa: str, check: Any, normal: Any, q_len: int, first: int) -> None:
    q, k, v = normal(1, 2, q_len, 8), normal(1, 2, 300, 8), normal(1, 2, 300, 8)
    keys = np.arange(300)
    for mask in (keys >= first, keys < first, (keys // 64) % 2 == 1, keys == min(first, 299)):
        check(q, k, v, mask=mask, trivial=True)
    rows = np.ones((q_len, 300), bool)
    rows[: q_len // 2] = False
    check(q, k, v, mask=rows & (keys < 250), trivial=True)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("how", ["mask", "bias", "kv_lens", "causal", "window"])
def test_rows_that_see_nothing(isa: str, rng: Any, shape: Any, how: str) -> None:
    q, k, v = arrays(rng, shape)
    q_len, kv_len = shape[3:]
    options: dict[str, Any] = {
        "mask": {"mask": np.zeros((q_len, kv_len), bool)},
        "bias": {"bias": np.full((q_len, kv_len), -np.inf)},
        "kv_lens": {"kv_lens": np.zeros(shape[0], int)},
        "causal": {"causal": True, "q_offset": -q_len},
        "window": {"window": (0, 0), "q_offset": kv_len},
    }[how]
    out, lse, weights = sa.attention(q, k, v, return_lse=True, return_weights=True, **options)
    assert not out.any()
    assert not weights.any()
    assert np.isneginf(lse).all()
    sinks = np.linspace(-2, 3, shape[1]).astype(np.float32)
    out, lse = sa.attention(q, k, v, return_lse=True, sinks=sinks, **options)
    assert not out.any()
    assert np.allclose(lse, sinks[:, None], rtol=1e-6)


@pytest.mark.one_isa(reason="calls the reference alone")
def test_reference_sees_what_the_definition_says() -> None:
    seen = reference.visibility(3, 5, (), 1, causal=True, window=(2, None))[0]
    assert seen.astype(int).tolist() == [[1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]


LARGEST = (1 << 63) - 1


@pytest.mark.parametrize("q_len", [3, 50])
def test_limits_at_the_ends_of_int64(isa: str, normal: Any, q_len: int) -> None:
    q, k, v = normal(q_len, 8), normal(70, 8), normal(70, 8)
    everything, nothing = sa.attention(q, k, v), np.zeros((q_len, 8), np.float32)
    for offset in (-5, 0, 60):
        unlimited = {"window": (LARGEST, LARGEST), "q_offset": offset}
        assert np.array_equal(sa.attention(q, k, v, **unlimited), everything)
        causal = sa.attention(q, k, v, causal=True, q_offset=offset)
        assert np.array_equal(sa.attention(q, k, v, causal=True, **unlimited), causal)
    for offset, wanted in ((-LARGEST - 1, nothing), (LARGEST, everything)):
        assert np.array_equal(sa.attention(q, k, v, causal=True, q_offset=offset), wanted)
        assert not sa.attention(q, k, v, window=(70, 70), q_offset=offset).any()


@pytest.mark.parametrize("q_len", [3, 50])
@pytest.mark.parametrize("value_dim", [5, 11, 16])
def test_limits_of_narrow_and_wide_values(isa: str, check: Any, normal: Any, q_len: int, value_dim: int) -> None:
    q, k, v = normal(1, q_len, 8), normal(1, 300, 8), normal(1, 300, value_dim)
    for options in ({"window": (20, 0)}, {"causal": True, "q_offset": 100}, {"window": (0, 30), "q_offset": 5}):
        check(q, k, v, trivial=True, **options)


@pytest.mark.parametrize("q_len", [2, 40])
def test_windows_and_offsets_beyond_any_length_do_not_cancel(isa: str, normal: Any, q_len: int) -> None:
    x = normal(1, q_len, 8)
    far = {"window": (1 << 60, None), "q_offset": LARGEST}
    assert not sa.attention(x, x, x, **far).any()  # every key is more than 2**60 to the left
    near = {"window": (LARGEST, None), "q_offset": LARGEST - q_len}
    assert np.array_equal(sa.attention(x, x, x, **near), sa.attention(x, x, x))


@pytest.mark.parametrize("q_len", [1, 3, 50])
def test_a_bias_of_nan_hides_no_key(isa: str, normal: Any, q_len: int) -> None:
    q, k, v = normal(1, q_len, 8), normal(1, 300, 8), normal(1, 300, 8)
    bias = np.zeros((1, q_len, 300), np.float32)
    bias[:, :, 40:] = -np.inf
    expected = sa.attention(q, k, v, bias=bias)
    for key in (41, 250, 299):  # the only key of its block, or of many keys, that is not hidden
        bias[0, q_len // 2, key] = np.nan
        out = sa.attention(q, k, v, bias=bias)
        assert np.isnan(out[0, q_len // 2]).all()
        others = np.arange(q_len) != q_len // 2
        assert np.array_equal(out[0, others], expected[0, others])
        bias[0, q_len // 2, key] = -np.inf
