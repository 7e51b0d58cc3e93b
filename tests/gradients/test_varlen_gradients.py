"""Gradients of packed sequences: those of each sequence alone, and sums over sequences."""

from __future__ import annotations

import itertools
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import selfattn as sa

HEADS, KV_HEADS, DIM, VALUE_DIM = 4, 2, 8, 5
Q_LENS, KV_LENS = [3, 0, 70, 1, 5, 100], [9, 4, 133, 600, 0, 100]
COUNT = len(Q_LENS)
Q_ENDS, K_ENDS = np.cumsum([0, *Q_LENS]), np.cumsum([0, *KV_LENS])
DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]


def parts(x: Any, ends: Any, axis: int = 0) -> list[Any]:
    return np.split(x, ends[1:-1], axis)


def operands(rng: Any, dtype: Any = np.float32) -> tuple[Any, ...]:
    """grad_out, q, k, v."""
    shapes = (Q_ENDS, HEADS, VALUE_DIM), (Q_ENDS, HEADS, DIM), (K_ENDS, KV_HEADS, DIM), (K_ENDS, KV_HEADS, VALUE_DIM)
    return tuple(rng.standard_normal((ends[-1], heads, dim)).astype(dtype) for ends, heads, dim in shapes)


def every_option(rng: Any) -> dict[str, tuple[dict[str, Any], tuple[str, ...]]]:
    """Options by name, and the arguments besides q, k and v that get gradients."""
    shapes = list(zip(Q_LENS, KV_LENS, strict=True))
    masks = [rng.random(shape) < 0.7 for shape in shapes]
    biases = [rng.standard_normal((HEADS, *shape)).astype(np.float32) for shape in shapes]
    small = [None, biases[1][0], biases[2][:, :1], biases[3][..., :1], biases[4].astype(np.float64), biases[5][0]]
    own_slopes = rng.random((COUNT, HEADS))
    return {
        "none": ({}, ()),
        "causal": ({"causal": True}, ()),
        "mask": ({"mask": [masks[0], None, masks[2], masks[3], None, masks[5][:1]]}, ()),
        "bias": ({"bias": [None, *biases[1:]], "scale": 0.4}, ("bias", "scale")),
        "small bias": ({"bias": small, "softcap": 3.0}, ("bias",)),
        "q_offset": ({"causal": True, "q_offset": [0, 1, 50, 599, -3, 7]}, ("scale",)),
        "window": ({"window": (20, 3), "softcap": 2.0}, ()),
        "slopes": ({"alibi_slopes": rng.random(HEADS), "sinks": rng.standard_normal(HEADS)}, ("alibi_slopes", "sinks")),
        "own slopes": ({"alibi_slopes": own_slopes, "causal": True}, ("alibi_slopes",)),
        "t5": ({"t5": sa.T5Bias(rng.standard_normal((8, HEADS)), max_distance=20)}, ("t5",)),
    }


def options_of(n: int, options: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `attention` for sequence n."""
    own = {**options, "layout": "bshd"}
    for name in ("mask", "bias", "q_offset"):
        if isinstance(own.get(name), list):
            own[name] = own[name][n]
    if np.ndim(own.get("alibi_slopes")) == 2:
        own["alibi_slopes"] = own["alibi_slopes"][n]
    return own


def alone(n: int, arrays: tuple[Any, ...], grad_lse: Any, options: dict[str, Any], wrt: tuple[str, ...]) -> Any:
    """Return what `attention_vjp` computes for sequence n: out and the gradients."""
    grad_out, q, k, v = (parts(x, ends)[n] for x, ends in zip(arrays, (Q_ENDS, Q_ENDS, K_ENDS, K_ENDS), strict=True))
    own = options_of(n, options)
    own_wrt = [name for name in wrt if name != "bias" or own["bias"] is not None]
    out, vjp = sa.attention_vjp(q, k, v, wrt=own_wrt, **own)
    return out, vjp(grad_out, parts(grad_lse, Q_ENDS, 1)[n])


NAMES = list(every_option(np.random.default_rng(0)))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: x.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_each_sequence_has_the_bits_that_it_has_alone(isa: str, rng: Any, name: str, dtype: Any) -> None:
    arrays = operands(rng, dtype)
    grad_lse = rng.standard_normal((HEADS, sum(Q_LENS)))
    options, others = every_option(rng)[name]
    wrt = ("q", "k", "v", *others)
    out, vjp = sa.attention_varlen_vjp(*arrays[1:], Q_ENDS, K_ENDS, wrt=wrt, **options)
    found = vjp(arrays[0], grad_lse)
    wanted = [alone(n, arrays, grad_lse, options, wrt) for n in range(COUNT)]
    assert np.array_equal(out, np.concatenate([own_out for own_out, _ in wanted]))
    for field in wrt:
        own = [getattr(grads, field) for _, grads in wanted]
        together = getattr(found, field)
        if field in ("q", "k", "v"):
            assert (together.dtype, together.shape) == (dtype, arrays["gqkv".index(field)].shape)
            assert np.array_equal(together, np.concatenate(own))
        elif field == "bias":
            assert [None if x is None else x.dtype for x in together] == [None if x is None else x.dtype for x in own]
            assert all(map(np.array_equal, together, own))
        else:
            total = own if name == "own slopes" else sum(x.astype(np.float64) for x in own)
            assert together.dtype == (np.float64 if dtype == np.float64 else np.float32)
            assert np.allclose(together, total, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("wide", "narrow"), [(np.float32, np.float16), (np.float64, np.float32)])
def test_keys_may_be_narrower_than_queries(isa: str, rng: Any, wide: Any, narrow: Any) -> None:
    grad_out, q, k, v = operands(rng, wide)
    arrays = (grad_out, q, k.astype(narrow), v.astype(narrow))
    grad_lse = rng.standard_normal((HEADS, sum(Q_LENS)))
    _, vjp = sa.attention_varlen_vjp(*arrays[1:], Q_ENDS, K_ENDS, causal=True)
    found = vjp(grad_out, grad_lse)
    wanted = [alone(n, arrays, grad_lse, {"causal": True}, ("q", "k", "v"))[1] for n in range(COUNT)]
    for name, dtype in (("q", wide), ("k", narrow), ("v", narrow)):
        assert getattr(found, name).dtype == dtype
        assert np.array_equal(getattr(found, name), np.concatenate([getattr(own, name) for own in wanted]))


@pytest.mark.dtypes("float32")
@pytest.mark.parametrize("name", ["slopes", "bias", "t5"])
def test_threads_and_strides_do_not_change_bits(isa: str, rng: Any, name: str) -> None:
    grad_out, q, k, v = operands(rng)
    options, others = every_option(rng)[name]
    wrt = ("q", "k", "v", *others)

    def gradients(threads: int, *arrays: Any) -> Any:
        _, vjp = sa.attention_varlen_vjp(*arrays[1:], Q_ENDS, K_ENDS, wrt=wrt, num_threads=threads, **options)
        return vjp(arrays[0])

    expected = gradients(1, grad_out, q, k, v)
    spread = [np.repeat(x, 2, axis=1)[:, ::2] for x in (grad_out, q, k, v)]
    for found in (gradients(2, grad_out, q, k, v), gradients(7, grad_out, q, k, v), gradients(3, *spread)):
        for field in wrt:
            one, other = getattr(expected, field), getattr(found, field)
            assert all(map(np.array_equal, one, other)) if field == "bias" else np.array_equal(one, other)


@pytest.mark.dtypes("float32")
def test_long_sequences_with_one_head(isa: str, rng: Any) -> None:
    """Ranges of keys wait for those before, whatever the order of the sequences."""
    lens = [10, 1500, 40, 1200]
    ends = np.cumsum([0, *lens])
    grad_out, q, k, v = rng.standard_normal((4, sum(lens), 1, 4)).astype(np.float32)
    _, vjp = sa.attention_varlen_vjp(q, k, v, ends, causal=True, num_threads=4)
    found = vjp(grad_out)
    for n, (a, b) in enumerate(itertools.pairwise(ends)):
        _, own = sa.attention_vjp(q[a:b], k[a:b], v[a:b], causal=True, layout="bshd", num_threads=1)
        for mine, wanted in zip(found[:3], own(grad_out[a:b])[:3], strict=True):
            assert np.array_equal(mine[a:b], wanted), n


@pytest.mark.dtypes("float64")
def test_sums_over_sequences_are_the_derivatives(isa: str, rng: Any) -> None:
    _, q, k, v = operands(rng, np.float64)
    weight = rng.standard_normal((sum(Q_LENS), HEADS, VALUE_DIM))
    table = rng.standard_normal((8, HEADS))
    numbers = {"sinks": rng.standard_normal(HEADS), "alibi_slopes": rng.random(HEADS), "scale": np.array(0.3)}

    def loss(**changed: Any) -> float:
        given = {**numbers, "table": table, **changed}
        t5, given["scale"] = sa.T5Bias(given.pop("table"), max_distance=20), float(given["scale"])
        return float(np.vdot(weight, sa.attention_varlen(q, k, v, Q_ENDS, K_ENDS, t5=t5, **given)))

    options = {**numbers, "scale": 0.3, "t5": sa.T5Bias(table, max_distance=20)}
    _, vjp = sa.attention_varlen_vjp(q, k, v, Q_ENDS, K_ENDS, wrt=(*numbers, "t5"), **options)
    found = vjp(weight)
    for name, value in {**numbers, "table": table}.items():
        direction, step = rng.standard_normal(value.shape), 1e-5
        slope = (loss(**{name: value + step * direction}) - loss(**{name: value - step * direction})) / (2 * step)
        assert np.isclose(np.vdot(getattr(found, "t5" if name == "table" else name), direction), slope, rtol=1e-6)


@pytest.mark.dtypes("float32")
@pytest.mark.parametrize("dim", [8, 16])
def test_what_memory_held_before_does_not_matter(isa: str, rng: Any, dim: int) -> None:
    """Vectors of 5 numbers are padded to 8 or 16, where another call of this form had its own numbers."""
    _, q, k, v = operands(rng)
    out, vjp = sa.attention_varlen_vjp(q[..., :5], k[..., :5], v, Q_ENDS, K_ENDS, wrt=("scale",), num_threads=1)
    expected = vjp(np.ones_like(out)).scale
    wide_q, wide_k = (np.full((len(x), x.shape[1], dim), np.nan, np.float32) for x in (q, k))
    _, vjp_of_nan = sa.attention_varlen_vjp(wide_q, wide_k, v, Q_ENDS, K_ENDS, wrt=("scale",), num_threads=1)
    vjp_of_nan(np.ones_like(out))
    assert vjp(np.ones_like(out)).scale == expected


@pytest.mark.dtypes("float64")
def test_from_results(isa: str, rng: Any) -> None:
    grad_out, q, k, v = operands(rng, np.float64)
    out, lse = sa.attention_varlen(q, k, v, Q_ENDS, K_ENDS, return_lse=True)
    found = sa.attention_varlen_backward(grad_out, q, k, v, out, lse, Q_ENDS, K_ENDS, wrt=("k", "q"))
    _, vjp = sa.attention_varlen_vjp(q, k, v, Q_ENDS, K_ENDS, wrt=("q", "k"))
    assert found.v is None
    for one, other in zip(found[:2], vjp(grad_out)[:2], strict=True):
        assert np.array_equal(one, other)


@pytest.mark.dtypes("float32")
def test_lists_are_packed_arrays(isa: str, rng: Any) -> None:
    arrays = operands(rng)
    lists = [parts(x, ends) for x, ends in zip(arrays, (Q_ENDS, Q_ENDS, K_ENDS, K_ENDS), strict=True)]
    grad_lse = rng.standard_normal((HEADS, sum(Q_LENS)))
    (out, lse), vjp = sa.attention_varlen_vjp(*arrays[1:], Q_ENDS, K_ENDS, return_lse=True)
    (outs, lses), vjp_of_lists = sa.attention_varlen_vjp(*lists[1:], return_lse=True)
    assert all(map(np.array_equal, outs, parts(out, Q_ENDS)))
    assert all(map(np.array_equal, lses, parts(lse, Q_ENDS, 1)))
    expected = vjp(arrays[0], grad_lse)
    grads_lse = parts(grad_lse, Q_ENDS, 1)
    into = {"k": [np.empty_like(x) for x in lists[2]]}
    found = sa.attention_varlen_backward(*lists, outs, lses, grad_lse=grads_lse, into=into)
    for name, ends in (("q", Q_ENDS), ("k", K_ENDS), ("v", K_ENDS)):
        wanted = parts(getattr(expected, name), ends)
        assert all(map(np.array_equal, getattr(vjp_of_lists(lists[0], grads_lse), name), wanted))
        assert all(np.allclose(x, y, rtol=0, atol=1e-4) for x, y in zip(getattr(found, name), wanted, strict=True))
    assert all(map(np.array_equal, into["k"], found.k))
    assert all(x is y for x, y in zip(into["k"], found.k, strict=True))


@pytest.mark.dtypes("float32")
def test_into_and_accumulate(isa: str, rng: Any) -> None:
    grad_out, q, k, v = operands(rng)
    bias = every_option(rng)["bias"][0]["bias"]
    out, lse = sa.attention_varlen(q, k, v, Q_ENDS, K_ENDS, bias=bias, return_lse=True)
    call = (grad_out, q, k, v, out, lse, Q_ENDS, K_ENDS)
    expected = sa.attention_varlen_backward(*call, wrt=("q", "bias"), bias=bias)
    into = sa.Gradients(q=np.ones_like(q), bias=[None if x is None else np.ones_like(x) for x in bias])
    found = sa.attention_varlen_backward(*call, wrt=("q", "bias"), bias=bias, into=into, accumulate=True)
    assert found.q is into.q
    assert np.array_equal(into.q, expected.q + 1)
    for mine, wanted in zip(into.bias[1:], expected.bias[1:], strict=True):
        assert np.array_equal(mine, wanted + 1)
    assert found.bias[0] is None
    sa.attention_varlen_backward(*call, wrt=("q", "bias"), bias=bias, into=into)
    assert np.array_equal(into.q, expected.q)
    assert all(map(np.array_equal, into.bias, expected.bias))


@pytest.mark.dtypes("float32")
@pytest.mark.parametrize("value", [1 / 3, 1e300])
def test_arrays_wider_than_the_computation_keep_their_digits(isa: str, rng: Any, value: float) -> None:
    _, *arrays = operands(rng)
    bias = [np.zeros((HEADS, *lens)) for lens in zip(Q_LENS, KV_LENS, strict=True)]
    out, lse = sa.attention_varlen(*arrays, Q_ENDS, K_ENDS, bias=bias, return_lse=True)
    into = {"bias": [np.full_like(x, value) for x in bias]}
    call = (np.zeros_like(out), *arrays, out, lse, Q_ENDS, K_ENDS)
    sa.attention_varlen_backward(*call, wrt=("bias",), bias=bias, into=into, accumulate=True)
    assert all(np.all(x == value) for x in into["bias"])


@pytest.mark.dtypes("float64")
@pytest.mark.parametrize("lens", [[], [0], [0, 0], [0, 3, 0]])
def test_nothing_at_all(isa: str, rng: Any, lens: list[int]) -> None:
    ends = np.cumsum([0, *lens])
    q, k, v = rng.standard_normal((3, ends[-1], HEADS, DIM))
    sinks = np.zeros(HEADS)
    out, vjp = sa.attention_varlen_vjp(q, k, v, ends, sinks=sinks, wrt=("q", "k", "v", "sinks", "scale"))
    found = vjp(np.ones_like(out))
    assert [x.shape for x in found[:3]] == [q.shape] * 3
    assert (found.sinks.shape, found.scale.shape) == ((HEADS,), ())
