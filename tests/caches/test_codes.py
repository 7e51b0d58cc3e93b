"""Codes: the bound of docs/numerics.md, and numbers that are not finite, in every shape of the row kernel."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cache_model import CODES, Sequence, check_attention

import selfattn as sa

pytestmark = pytest.mark.matrix

LENGTH = 700


@pytest.fixture(params=CODES)
def filled(request: Any) -> Any:
    """Return a function that returns a cache with the tokens (Hkv, length, ·), its model, and its memory."""

    def fill(k: Any, v: Any) -> tuple[sa.KVCache, list[Sequence], Any]:
        shape = (1, k.shape[0], k.shape[2], k.shape[1])
        named: dict[str, Any] = {"value_dim": v.shape[2], "dtype": request.param}
        memory = np.zeros(sa.KVCache.buffer_size(*shape, **named), np.uint8)
        cache = sa.KVCache(*shape, buffer=memory, **named)
        cache.append(k[np.newaxis], v[np.newaxis])
        model = Sequence(k.shape[0], k.shape[2], v.shape[2], request.param)
        model.append(k, v)
        return cache, [model], memory

    return fill


def writable(view: Any, memory: Any) -> Any:
    """Return the same bytes of the cache's memory."""
    offset = view.__array_interface__["data"][0] - memory.__array_interface__["data"][0]
    return np.ndarray(view.shape, view.dtype, memory.data, offset, view.strides)


def answer(q: Any, cache: sa.KVCache, **options: Any) -> tuple[Any, Any]:
    out, lse = sa.attention_with_kvcache(q, cache, return_lse=True, **options)
    return out, lse


@pytest.mark.parametrize(("dim", "value_dim"), [(128, 128), (64, 80), (5, 3), (130, 64), (200, 129)])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 7])
def test_the_bound(
    isa: str, filled: Any, normal: Any, assert_accurate: Any, group: int, dim: int, value_dim: int
) -> None:
    for length in (1, 15, 64, 65, 514, LENGTH):
        k, v = normal(2, length, dim), normal(2, length, value_dim)
        cache, model, _ = filled(k, v)
        for size in (0.1, 1, 4):
            q = size * normal(1, 2 * group, 1, dim)
            check_attention(assert_accurate, model, q, *answer(q, cache))


def test_large_numbers_beside_small_ones(isa: str, filled: Any, normal: Any, assert_accurate: Any) -> None:
    # Where a key has 0, the query's largest number decides how the others are rounded; likewise the largest weight.
    q, k, v = normal(1, 4, 1, 64), normal(1, LENGTH, 64), normal(1, LENGTH, 64)
    q[..., 0], k[..., 0] = 1000, 0
    k[:, 300] = 3 * q[0, 0]
    k[:, 300, 0] = 0
    v[:, 300, ::2] = 0
    cache, model, _ = filled(k, v)
    check_attention(assert_accurate, model, q, *answer(q, cache))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_numbers_of_any_size(isa: str, filled: Any, normal: Any, assert_accurate: Any, scale: float) -> None:
    q, k, v = normal(1, 4, 1, 64) * np.float32(scale), normal(1, LENGTH, 64), normal(1, LENGTH, 64)
    for cache, model, _ in (filled(k / np.float32(scale), v), filled(k / np.float32(scale), v * np.float32(scale))):
        check_attention(assert_accurate, model, q, *answer(q, cache))


def test_subnormal_queries_are_exact(isa: str, filled: Any) -> None:
    q = np.full((1, 1, 1, 4), 3e-45, np.float32)
    cache, _, _ = filled(np.ones((1, 2, 4), np.float32), np.ones((1, 2, 4), np.float32))
    lse = answer(q, cache, scale=1e38)[1]
    assert np.allclose(lse, np.log(2) + 4 * float(q.flat[0]) * 1e38, rtol=1e-6)


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("group", [1, 2, 4, 5])
def test_hidden_tokens_do_not_matter(isa: str, filled: Any, normal: Any, group: int, odd: float) -> None:
    # The first query does not see the odd tokens, the second one does.
    q, k, v = normal(1, group, 2, 40), normal(1, 70, 40), normal(1, 70, 40)
    unlike = np.array([[False, False], [True, True]])
    for hidden, mask in ((slice(69, 70), None), (slice(68, 70), unlike)):
        plain = answer(q, filled(k, v)[0], mask=mask)
        for of_keys, of_values in ((True, False), (False, True), (True, True)):
            cache, _, memory = filled(k, v)
            for change, scales in ((of_keys, cache.k_scales), (of_values, cache.v_scales)):
                if change:
                    writable(scales, memory)[..., hidden] = odd
            out, lse = answer(q, cache, mask=mask)
            assert np.array_equal(out[:, :, 0], plain[0][:, :, 0])
            assert np.array_equal(lse[:, :, 0], plain[1][:, :, 0])
            assert not np.array_equal(out[:, :, 1], plain[0][:, :, 1])


@pytest.mark.parametrize("group", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("odd", [np.nan, np.inf])
def test_a_query_that_is_not_finite_is_alone(isa: str, filled: Any, normal: Any, group: int, odd: float) -> None:
    q, k, v = normal(1, group, 1, 70), normal(1, 130, 70), normal(1, 130, 70)
    cache, _, _ = filled(k, v)
    out, lse = answer(q, cache)
    for row in range(group):
        changed = q.copy()
        changed[0, row, 0, 69] = odd
        found_out, found_lse = answer(changed, cache)
        assert np.isnan(found_out[0, row]).all()
        assert np.array_equal(np.delete(found_out, row, 1), np.delete(out, row, 1))
        assert np.array_equal(np.delete(found_lse, row, 1), np.delete(lse, row, 1))


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf, -0.01])
@pytest.mark.parametrize("group", [1, 4, 5])
def test_scales_of_any_value(isa: str, filled: Any, normal: Any, assert_accurate: Any, group: int, odd: float) -> None:
    q, k, v = normal(1, group, 1, 70), normal(1, 130, 70), normal(1, 130, 70)
    cache, model, memory = filled(k, v)
    model[0].v.scales = model[0].v.scales.copy()
    writable(cache.v_scales, memory)[..., 100] = odd
    model[0].v.scales[..., 100] = odd
    out = answer(q, cache)[0]
    if np.isfinite(odd):
        check_attention(assert_accurate, model, q, out)
    else:
        assert not np.isfinite(out).any()


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5])
def test_rows_of_a_group_are_each_alone(isa: str, filled: Any, normal: Any, group: int) -> None:
    q, k, v = normal(1, group, 1, 100), normal(1, LENGTH, 100), normal(1, LENGTH, 100)
    cache, _, _ = filled(k, v)
    together = answer(q, cache)
    repeated = answer(np.repeat(q, 2, axis=1), cache)
    if isa == "avx512_bf16":  # sums of integers are exact, so their order does not matter
        assert all(np.array_equal(x[:, ::2], y) for x, y in zip(repeated, together, strict=True))
    assert np.allclose(repeated[0][:, ::2], together[0], rtol=1e-4, atol=1e-5)
