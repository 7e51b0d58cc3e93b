"""What keys receive, compared with the sums of the reference's weights."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import selfattn as sa
from selfattn import reference

BFLOAT = np.dtype(ml_dtypes.bfloat16)


def expected(q: Any, k: Any, v: Any, **options: Any) -> Any:
    dropout, seed = options.pop("dropout", 0.0), options.pop("seed", None)
    weights = reference.attention(*(x.astype(np.float64) for x in (q, k, v)), **options).weights
    if dropout:
        weights = weights * reference.dropout_factors(weights.shape, dropout, seed)
    return weights.sum(axis=-2)


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": (5, 0)},
    "top left": {"causal": True, "q_offset": 0},
    "lengths": {"kv_lens": np.array([17, 40]), "q_lens": np.array([11, 0])},
    "starts": {"kv_starts": np.array([3, 41])},
    "sinks": {"sinks": np.linspace(-1, 1, 6)},
    "alibi": {"alibi_slopes": np.linspace(0.1, 1, 6), "causal": True},
    "softcap": {"softcap": 2.0, "scale": 0.7},
    "chunk": {"causal": True, "chunk": 7},
    "prefix": {"causal": True, "prefix_lens": np.array([9, 0])},
    "dropout": {"dropout": 0.3, "seed": 5},
}


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float16), BFLOAT], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_sums_of_weights(isa: str, normal: Any, dtype: Any, case: str) -> None:
    for queries, keys in ((23, 41), (1, 41), (130, 41)):
        options = CASES[case]
        if case == "lengths":
            options = options | {"q_lens": np.minimum(options["q_lens"], queries)}
        q, k, v = (normal(2, *shape, dtype=dtype) for shape in ((6, queries, 16), (2, keys, 16), (2, keys, 5)))
        out, lse, weights, mass = sa.attention(
            q, k, v, **options, return_lse=True, return_weights=True, return_key_mass=True
        )
        plain = sa.attention(q, k, v, **options, return_lse=True, return_weights=True)
        assert all(np.array_equal(a, b) for a, b in zip((out, lse, weights), plain, strict=True))
        assert mass.shape == (2, 6, keys)
        assert mass.dtype == lse.dtype
        exact = expected(q, k, v, **options)
        steps = {"bfloat16": 2.0**-8, "float16": 2.0**-15}.get(dtype.name, 1e-13 if dtype == np.float64 else 4e-6)
        assert np.all(abs(mass - exact) <= steps * (exact + 1e-3 * queries))
        assert np.all(mass[exact == 0] == 0)


def test_shapes_and_layouts(isa: str, normal: Any) -> None:
    q, k = normal(7, 8), normal(9, 8)
    out, mass = sa.attention(q, k, k, return_key_mass=True)
    assert np.array_equal(out, sa.attention(q, k, k))
    assert mass.shape == (9,)
    assert np.allclose(mass, expected(q, k, k), rtol=1e-5)
    q, k = normal(3, 4, 6, 7, 8), normal(4, 2, 9, 8)  # keys are broadcast over the first axis
    mass = sa.attention(q, k, k, return_key_mass=True)[-1]
    assert mass.shape == (3, 4, 6, 9)
    assert np.allclose(mass, expected(q, k, k), rtol=1e-5)
    swapped = [x.swapaxes(-3, -2) for x in (q, k, k)]
    assert np.array_equal(sa.attention(*swapped, layout="bshd", return_key_mass=True)[-1], mass)
    last = sa.attention(q[..., -2:, :], k, k, causal=True, return_key_mass=True)[-1]
    weights = sa.attention(q, k, k, causal=True, return_weights=True)[-1]
    assert np.allclose(last, weights[..., -2:, :].sum(axis=-2), rtol=1e-5)
    for empty in ((0, 2, 9, 8), (1, 2, 0, 8)):
        k = np.zeros(empty, np.float32)
        assert sa.attention(np.zeros((empty[0], 4, 3, 8), np.float32), k, k, return_key_mass=True)[-1].shape == (
            empty[0],
            4,
            empty[2],
        )
    none = sa.attention(
        np.zeros((1, 4, 0, 8), np.float32), *[np.zeros((1, 2, 5, 8), np.float32)] * 2, return_key_mass=True
    )
    assert np.array_equal(none[-1], np.zeros((1, 4, 5)))


def test_out_that_is_an_input(isa: str, normal: Any) -> None:
    q, k = normal(2, 4, 9, 8), normal(2, 4, 9, 8)
    out, mass = sa.attention(q, k, k, causal=True, return_key_mass=True)
    for taken in (q.copy(), k.copy()):
        arguments = (taken, k, k) if np.array_equal(taken, q) else (q, taken, taken)
        found = sa.attention(*arguments, causal=True, return_key_mass=True, out=taken)
        assert found[0] is taken
        assert np.array_equal(taken, out)
        assert np.array_equal(found[1], mass)
    target = np.empty_like(out)
    assert sa.attention(q, k, k, causal=True, return_key_mass=True, out=target)[0] is target
    assert np.array_equal(target, out)


def test_bits_and_hidden_keys(isa: str, normal: Any) -> None:
    q, k = normal(3, 4, 200, 16), normal(3, 2, 200, 16)
    mass = sa.attention(q, k, k, causal=True, return_key_mass=True)[-1]
    for threads in (1, 2, 3):
        assert np.array_equal(sa.attention(q, k, k, causal=True, return_key_mass=True, num_threads=threads)[-1], mass)
    assert np.array_equal(sa.attention(q[1:2], k[1:2], k[1:2], causal=True, return_key_mass=True)[-1], mass[1:2])
    lens = np.array([150, 200, 7])
    clean = sa.attention(q, k, k, kv_lens=lens, return_key_mass=True)[-1]
    k[0, :, 150:] = np.nan
    k[2, :, 7:] = np.inf
    assert np.array_equal(sa.attention(q, k, k, kv_lens=lens, return_key_mass=True)[-1], clean)


def test_large_scores(isa: str, normal: Any) -> None:
    """An error of lse would be a factor of all weights of a row."""
    q, k = normal(1, 4, 30, 8), normal(1, 2, 40, 8)
    for options in (
        {"bias": np.full((1, 1), -1e5, np.float32)},
        {"alibi_slopes": np.full(4, 0.5), "q_offset": 100_000},
    ):
        _, weights, mass = sa.attention(q, k, k, return_weights=True, return_key_mass=True, **options)
        assert np.allclose(mass, weights.sum(axis=-2), rtol=1e-4)


def test_values_with_a_larger_batch(isa: str, normal: Any) -> None:
    q, k, v = normal(1, 4, 5, 8), normal(1, 2, 9, 8), normal(3, 2, 9, 4)
    mass = sa.attention(q, k, v, return_key_mass=True)[1]
    assert mass.shape == (3, 4, 9)
    assert np.allclose(mass, expected(q, k, k), rtol=1e-5)


@pytest.mark.one_isa
def test_refusals(normal: Any) -> None:
    q = normal(2, 3, 8)
    with pytest.raises(TypeError, match="attention: return_key_mass is 1"):
        sa.attention(q, q, q, return_key_mass=1)
    with pytest.raises(ValueError, match="attention: out has shape"):
        sa.attention(q, q, q, return_key_mass=True, out=q[:1].copy())
    for call in (sa.attention_vjp, sa.explain):
        with pytest.raises(TypeError, match="unexpected keyword argument 'return_key_mass'"):
            call(q, q, q, return_key_mass=True)


@pytest.mark.one_isa
def test_one_head_in_either_layout(normal: Any) -> None:
    q, k = normal(5, 8), normal(7, 8)
    out, mass = sa.attention(q, k, k, return_key_mass=True)
    for whole, same in zip((out, mass), sa.attention(q, k, k, layout="bshd", return_key_mass=True), strict=True):
        assert np.array_equal(whole, same)


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), np.dtype(np.float64), BFLOAT], ids=str)
def test_many_row_blocks_and_divided_keys(isa: str, normal: Any, dtype: Any) -> None:
    """A task sums several row blocks, or the keys of a row block are divided between tasks."""
    for queries, keys, kv_heads in ((1100, 70, 1), (1, 4200, 8), (20, 4200, 8)):
        shapes = ((max(kv_heads, 2), queries, 8), (kv_heads, keys, 8), (kv_heads, keys, 3))
        q, k, v = (normal(1, *shape, dtype=dtype) for shape in shapes)
        for options in ({}, {"causal": True, "q_lens": [queries - queries // 3], "kv_lens": [keys - 5]}):
            mass = sa.attention(q, k, v, **options, return_key_mass=True)[-1]
            exact = expected(q, k, v, **options)
            steps = {"bfloat16": 2.0**-8, "float64": 1e-13}.get(dtype.name, 4e-6)
            assert np.all(abs(mass - exact) <= steps * (exact + 1e-3 * queries))
            for threads in (1, 3, 3, 3):
                again = sa.attention(q, k, v, **options, return_key_mass=True, num_threads=threads)[-1]
                assert np.array_equal(again, mass)
