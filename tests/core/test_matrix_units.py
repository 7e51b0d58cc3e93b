"""Products on matrix units: bfloat16 in place, and numbers split into or rounded to bfloat16."""

from __future__ import annotations

import itertools
import signal
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import selfattn as sa
from selfattn import reference

pytestmark = pytest.mark.matrix

FLOAT32, FLOAT16, BFLOAT16 = np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
MODES = [(FLOAT32, "highest"), (FLOAT32, "high"), (FLOAT32, "medium"), (FLOAT16, "highest"), (BFLOAT16, "highest")]
# The unit that each set promises to use. Everything else is multiplied by FMA, which other tests cover.
UNITS = {
    "avx512_bf16": {(BFLOAT16, "highest"): "bfloat16 pairs", (FLOAT32, "medium"): "bfloat16 pairs"},
    "amx": dict.fromkeys(MODES[1:], "amx"),
    "amx_emulated": dict.fromkeys(MODES[1:], "amx"),
}
# Around a vector of rows, a strip of two and of three, a tile of 16 and its pairs, and a block of 128 keys.
LENGTHS = [13, 15, 16, 17, 31, 32, 33, 47, 48, 49, 64, 65, 127, 128, 129, 160, 257]


# Types and precisions of calls that run on a matrix unit.
on_units = pytest.mark.parametrize(
    ("isa", "dtype", "precision"),
    [(isa, *mode) for isa, modes in UNITS.items() for mode in modes],
    ids=str,
    indirect=["isa"],
)


def operands(normal: Any, dtype: Any, q_len: int, kv_len: int, head_dim: int, value_dim: int) -> tuple[Any, Any, Any]:
    return (
        normal(2, 2, q_len, head_dim, dtype=dtype),
        normal(2, 1, kv_len, head_dim, dtype=dtype),
        normal(2, 1, kv_len, value_dim, dtype=dtype),
    )


def everything(q: Any, k: Any, v: Any, **options: Any) -> list[bytes]:
    results = sa.attention(q, k, v, return_lse=True, return_weights=True, **options)
    return [result.tobytes() for result in results]


@pytest.mark.parametrize(("dtype", "precision"), MODES, ids=str)
def test_the_unit_is_the_set_s(isa: str, normal: Any, dtype: Any, precision: str) -> None:
    q, k, v = operands(normal, dtype, 60, 60, 16, 16)
    assert sa.explain(q, k, v, precision=precision)["unit"] == UNITS.get(isa, {}).get((dtype, precision), "fma")
    few = sa.explain(q[:, :, :1], k, v, precision=precision)
    dots = isa == "avx512_bf16" and dtype == BFLOAT16
    assert (few["kernel"], few["unit"]) == ("row", "bfloat16 dots" if dots else "fma")
    wide = q.astype(np.float64)
    assert sa.explain(wide, wide, wide, precision=precision)["unit"] == "fma"


@on_units
@pytest.mark.parametrize("kv_len", LENGTHS)
def test_every_end_of_a_tile(dtype: Any, precision: str, check: Any, normal: Any, kv_len: int) -> None:
    for q_len, (head_dim, value_dim) in zip(
        LENGTHS[kv_len % 3 :: 3],
        itertools.cycle([(1, 17), (31, 16), (32, 33), (33, 1), (64, 15), (65, 64), (96, 32)]),
        strict=False,
    ):
        q, k, v = operands(normal, dtype, q_len, kv_len, head_dim, value_dim)
        check(q, k, v, precision=precision, causal=kv_len % 2 == 0, trivial=True)


@on_units
def test_masks_that_empty_tiles(dtype: Any, precision: str, check: Any, normal: Any, rng: Any) -> None:
    q, k, v = operands(normal, dtype, 100, 300, 40, 24)
    mask = np.zeros((100, 300), bool)
    mask[:33, 128:160] = True
    mask[50:70, ::37] = True
    mask[70:, 31:33] = True
    bias = np.where(rng.random((100, 300)) < 0.5, -np.inf, 0.5).astype(np.float32)
    for options in (
        {"mask": mask},
        {"bias": bias},
        {"mask": mask, "bias": bias, "causal": True},
        {"window": (5, 0), "q_offset": 150},
        {"window": (40, 3), "q_offset": np.array([90, 201])},
        {"kv_lens": np.array([0, 129]), "q_lens": np.array([100, 17])},
        {"alibi_slopes": np.array([0.1, 0.5]), "sinks": np.array([1.0, -2.0])},
        {"softcap": 4.0},
        {"scale": -0.2},
        {"scale": 0.0},
    ):
        check(q, k, v, precision=precision, trivial=True, **options)


@on_units
@pytest.mark.parametrize("sigma", [30, 300])
def test_large_logits(dtype: Any, precision: str, check: Any, normal: Any, sigma: int) -> None:
    q, k, v = operands(normal, dtype, 60, 700, 64, 64)
    check(q, k, v, precision=precision, scale=float(sigma / reference.attention(q, k, v, scale=1.0).sigma))


@on_units
def test_threads_and_batch_do_not_matter(dtype: Any, precision: str, normal: Any) -> None:
    q, k, v = operands(normal, dtype, 150, 333, 48, 40)
    whole = sa.attention(q, k, v, causal=True, precision=precision, num_threads=1)
    for threads in (2, 3, 7):
        again = sa.attention(q, k, v, causal=True, precision=precision, num_threads=threads)
        assert again.tobytes() == whole.tobytes()
    for batch in range(2):
        alone = sa.attention(q[batch], k[batch], v[batch], causal=True, precision=precision)
        assert alone.tobytes() == whole[batch].tobytes()


GARBAGE = [np.nan, np.inf, -np.inf, 3.4e38, 1e-39, -2e-35]


@on_units
@pytest.mark.parametrize("garbage", GARBAGE)
def test_what_is_hidden_is_inert(dtype: Any, precision: str, normal: Any, garbage: float) -> None:
    q, k, v = operands(normal, dtype, 90, 200, 33, 20)
    mask = np.ones((90, 200), bool)
    mask[:, 77] = mask[:, 130:] = False
    lower = np.tri(90, 200, 50, dtype=bool)
    for options in ({"mask": mask}, {"mask": lower, "q_offset": 1}, {"kv_lens": [140, 140]}):
        hidden = ~np.broadcast_to(options.get("mask", np.arange(200) < 140), (90, 200)).any(axis=0)
        clean = everything(q, k, v, precision=precision, **options)
        with np.errstate(over="ignore"):
            for operand in (k, v):
                operand[..., hidden, 3:5] = garbage
        assert everything(q, k, v, precision=precision, **options) == clean


@on_units
@pytest.mark.parametrize("head_dim", [32, 33])
def test_what_lies_between_rows_is_inert(dtype: Any, precision: str, normal: Any, head_dim: int) -> None:
    # Rows start and end at odd places of memory, and numbers that are not theirs follow them.
    q, k, v = operands(normal, dtype, 60, 141, head_dim, 20)
    together = everything(q, k, v, precision=precision)
    for before, after in itertools.product(range(3), range(3)):
        apart = []
        for x in (k, v):
            memory = np.full((*x.shape[:2], x.shape[2] + 1, before + x.shape[3] + after), np.nan, dtype)
            apart.append(memory[:, :, :-1, before : before + x.shape[3]])
            apart[-1][...] = x
        assert everything(q, *apart, precision=precision) == together


@on_units
@pytest.mark.parametrize("value", GARBAGE)
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_what_is_visible_counts(check: Any, normal: Any, dtype: Any, precision: str, name: str, value: float) -> None:
    q, k, v = operands(normal, dtype, 70, 150, 40, 20)
    place = {"q": q, "k": k, "v": v}[name]
    if dtype == BFLOAT16 and np.isfinite(value):
        value = min(value, 3.3e38)  # else it rounds to Inf, which times a subnormal number, counted as 0, is NaN
    with np.errstate(over="ignore"):
        place[..., 33, 5] = value
        place[1, :, 34, 6] = -np.asarray(value).astype(dtype)
    if name != "v" and np.isfinite(value) and value > 1:
        for other in (x for x in (q, k) if x is not place):  # keeps the scores within the range of float32
            other[..., 5:7] *= np.asarray(1e-36 if dtype != FLOAT16 else 1e-4).astype(dtype)
    with np.errstate(invalid="ignore", over="ignore"):
        exact = reference.attention(q, k, v, causal=True)
        out = sa.attention(q, k, v, causal=True, precision=precision).astype(np.float64)
    assert np.array_equal(np.isnan(out), np.isnan(exact.out))
    error = {"high": 2.0**-10, "medium": 2.0**-3}.get(precision, 2.0**-6)  # sigma is below 50
    with np.errstate(invalid="ignore"):
        near = abs(out - exact.out) <= error * exact.magnitude
    assert np.all(near | (out == exact.out) | np.isnan(out))


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_unsplittable_numbers(isa: str, check: Any, normal: Any, precision: str) -> None:
    # Numbers so small or so large that their split terms would be subnormal or infinite.
    q, k, v = operands(normal, FLOAT32, 50, 90, 32, 24)
    check(q, k, v * np.float32(1e-37), precision=precision)
    check(q * np.float32(1e-30), k * np.float32(1e-8), v, scale=1e37, precision=precision)
    v[..., 7, 2] = np.finfo(np.float32).max
    check(q, k, v, precision=precision)


@pytest.mark.parametrize(("precision", "least", "most"), [("high", 0, 2.0**-13), ("medium", 2.0**-13, 2.0**-5)])
def test_a_mode_errs_as_its_name_says(isa: str, normal: Any, precision: str, least: float, most: float) -> None:
    q, k, v = operands(normal, FLOAT32, 200, 500, 64, 64)
    exact = reference.attention(q, k, v)
    error = np.max(abs(sa.attention(q, k, v, precision=precision) - exact.out) / exact.magnitude)
    assert error < most
    if sa.explain(q, k, v, precision=precision)["unit"] != "fma":
        assert error > least


@on_units
@pytest.mark.parametrize("scale", [1e-46, 1e-40, -1e-46])
def test_a_scale_that_float32_does_not_hold(check: Any, normal: Any, dtype: Any, precision: str, scale: float) -> None:
    q, k, v = operands(normal, dtype, 60, 60, 16, 16)
    check(q, k, v, precision=precision, causal=True, scale=scale)


@on_units
@pytest.mark.parametrize("size", [1e-36, 1e-37])
def test_products_that_are_subnormal(check: Any, normal: Any, dtype: Any, precision: str, size: float) -> None:
    if dtype == FLOAT16:
        pytest.skip("float16 holds no such number")
    q, k, v = operands(normal, dtype, 60, 60, 32, 16)
    check(q, k, (v.astype(np.float32) * np.float32(size)).astype(dtype), scale=1.0, precision=precision)


@pytest.mark.parametrize("q_len", [1, 2, 60])
def test_infinity_times_subnormal(isa: str, check: Any, normal: Any, q_len: int) -> None:
    q, k, v = (normal(1, n, 16, dtype=BFLOAT16) for n in (q_len, 60, 60))
    q[..., 3], k[..., 3] = 1e-39, 0
    k[:, 7, 3] = -np.inf
    with np.errstate(invalid="ignore"):
        exact = reference.attention(q, k, v)
        out = sa.attention(q, k, v).astype(np.float64)
    assert np.all(np.isfinite(exact.out))
    assert np.all(abs(out - exact.out) <= 0.02 * exact.magnitude)


def test_terms_that_overflow_with_both_signs(isa: str, normal: Any) -> None:
    q, k, v = operands(normal, FLOAT32, 60, 60, 16, 16)
    q[..., 5], k[..., 5] = 1.01e30, 0
    k[:, :, 3, 5], k[:, :, 7, 5] = -1.013e25, -1.003e25
    for precision in ("highest", "high", "medium"):
        out = sa.attention(q, k, v, precision=precision)
        assert np.all(np.isfinite(out)), precision


def test_strides_of_wide_heads_do_not_matter(isa: str, normal: Any) -> None:
    for precision in ("highest", "high", "medium"):
        for q_len, width in ((97, 1536), (97, 1024), (65, 1280)):
            q, k, v = normal(1, q_len, width), normal(1, 2200, width), normal(1, 2200, width)
            whole = sa.attention(q, k, v, precision=precision)
            apart = [np.repeat(x, 2, axis=-1)[..., ::2] for x in (q, k, v)]
            out = np.repeat(np.zeros_like(whole), 2, axis=-1)[..., ::2]
            assert sa.attention(*apart, precision=precision, out=out).tobytes() == whole.tobytes()
            plan = sa.explain(q, k, v, precision=precision)
            assert plan["ranges"] == sa.explain(*apart, precision=precision)["ranges"]
            assert "out" not in plan["copied_blockwise"]


@on_units
def test_a_signal_handler_may_attend(normal: Any, dtype: Any, precision: str) -> None:
    q, k = normal(1, 300, 64, dtype=dtype), normal(1, 9000, 64, dtype=dtype)
    small = normal(1, 64, 64, dtype=dtype)
    expected = sa.attention(q, k, k, precision=precision, num_threads=1)
    calls = []

    def handler(*_: Any) -> None:
        calls.append(sa.attention(small, small, small, precision=precision))

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.005, 0.005)
    try:
        for _ in range(50):
            assert np.array_equal(sa.attention(q, k, k, precision=precision, num_threads=1), expected)
            if len(calls) > 3:
                break
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert calls
