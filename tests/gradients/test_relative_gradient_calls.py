"""Calls of the gradients of relative attention: bits, hidden operands, layouts, targets, errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from array_layouts import misaligned
from relative_cases import Case, Drawn, draw

import selfattn as sa

ALL = ("q", "k", "v", "r", "u", "w", "scale")


def test_alone_or_together(rng: Any) -> None:
    case = Case(batch=2, segment=100, memory=600, heads=4, kv_heads=2, rows=300)
    x = draw(rng, case, np.float32)
    grad_out = draw(rng, case, np.float32).q
    out, lse = sa.relative_attention(*x, mem_len=600, return_lse=True)
    table = sa.T5Bias(rng.standard_normal((32, 4)))
    together = sa.relative_attention_backward(grad_out, *x, out, lse, mem_len=600, wrt=(*ALL, "t5"), t5=table)
    for name in (*ALL, "t5"):
        alone = sa.relative_attention_backward(grad_out, *x, out, lse, mem_len=600, wrt=(name,), t5=table)
        assert np.array_equal(getattr(alone, name), getattr(together, name)), name
        assert sum(gradient is not None for gradient in alone) == 1


def test_t5_bias_together_with_distances(rng: Any) -> None:
    case = Case(segment=70, memory=450)
    x, grad_out = draw(rng, case, np.float64), draw(rng, case, np.float64).q
    weights = rng.standard_normal((32, 2))

    def loss(table: Any) -> Any:
        return (sa.relative_attention(*x, mem_len=450, t5=sa.T5Bias(table)) * grad_out).sum()

    _, vjp = sa.relative_attention_vjp(*x, mem_len=450, t5=sa.T5Bias(weights), wrt=("t5", "r"))
    gradient = vjp(grad_out).t5
    step = 1e-5 * rng.standard_normal(weights.shape)
    assert np.isclose(loss(weights + step) - loss(weights - step), 2 * (gradient * step).sum(), rtol=1e-5)


@pytest.mark.dtypes("float32")
def test_hidden_operands_are_inert(isa: str, rng: Any) -> None:
    case = Case(batch=2, segment=120, memory=480, heads=2, kv_heads=1, rows=600)
    mask = np.ones((2, 1, 120, 600), bool)
    mask[0, 0, 5] = mask[0, 0, :, 550] = False
    options = {"mem_len": 480, "kv_starts": [90, 200], "q_lens": [120, 77], "window": (300, None), "mask": mask}
    x = draw(rng, case, np.float32)
    bad = Drawn(*(a.copy() for a in x))
    bad.q[1, :, 77:] = bad.q[0, :, 5] = bad.k[0, :, 550] = bad.v[0, :, 550] = np.nan
    for entry, start in enumerate((180, 200)):  # in the first one, query 0 sees the keys from 180 on
        bad.k[entry, :, :start] = np.inf
        bad.v[entry, :, :start] = np.nan
    bad.r[:, 301:] = np.nan
    gradients = []
    for operands in (x, bad):
        out, vjp = sa.relative_attention_vjp(*operands, wrt=ALL, **options)
        grad_out = np.ones_like(out)
        grad_out[1, :, 77:] = grad_out[0, :, 5] = np.nan if operands is bad else 1
        gradients.append(vjp(grad_out))
    for name in ALL:
        clean, dirty = (getattr(g, name) for g in gradients)
        assert np.array_equal(clean, dirty), name
    assert not gradients[1].r[:, 301:].any()
    assert not gradients[1].k[1, :, :200].any()


@pytest.mark.parametrize(
    "options", [{}, {"window": (350, 40), "causal": False, "r_origin": 100}, {"q_lens": [700, 333]}], ids=str
)
def test_threads_and_repetition_change_no_bit(isa: str, rng: Any, options: dict[str, Any]) -> None:
    x = draw(rng, Case(batch=2, segment=700, memory=900, heads=2, kv_heads=1, dim=16, rows=500), np.float32)
    grad_out = draw(rng, Case(batch=2, segment=700), np.float32).q
    _, vjp = sa.relative_attention_vjp(*x, mem_len=900, wrt=ALL, num_threads=1, **options)
    expected = vjp(grad_out)
    for threads in (2, 3, 7, 7):
        _, vjp = sa.relative_attention_vjp(*x, mem_len=900, wrt=ALL, num_threads=threads, **options)
        found = vjp(grad_out)
        for name in ALL:
            assert np.array_equal(getattr(found, name), getattr(expected, name)), (name, threads)


def test_strides_and_layouts_change_no_bit(isa: str, rng: Any) -> None:
    case = Case(segment=50, memory=30, heads=2, kv_heads=2, options={})
    x = draw(rng, case, np.float32)
    _, vjp = sa.relative_attention_vjp(*x, mem_len=30)
    expected = vjp(x.q)
    turned = x._replace(r=np.asfortranarray(x.r), u=x.u[:, ::-1].copy()[:, ::-1])
    _, vjp = sa.relative_attention_vjp(*turned, mem_len=30)
    assert all(np.array_equal(a, b) for a, b in zip(vjp(x.q)[-3:], expected[-3:], strict=True))
    shifted = x._replace(r=misaligned(x.r), u=misaligned(x.u.astype(np.float64)), w=misaligned(x.w.astype(np.float64)))
    _, vjp = sa.relative_attention_vjp(*shifted, mem_len=30)
    assert all(np.array_equal(a, b) for a, b in zip(vjp(x.q), expected, strict=True))
    heads_last = x._replace(**{name: getattr(x, name).swapaxes(1, 2) for name in "qkv"})
    _, vjp = sa.relative_attention_vjp(*heads_last, mem_len=30, layout="bshd")
    found = vjp(heads_last.q)
    assert np.array_equal(found.q.swapaxes(1, 2), expected.q)
    assert np.array_equal(found.r, expected.r)


def test_without_axes_of_batch_and_heads(rng: Any) -> None:
    x = draw(rng, Case(heads=1, kv_heads=1, segment=9), np.float64)
    _, vjp = sa.relative_attention_vjp(*x)
    expected = vjp(x.q)
    _, vjp = sa.relative_attention_vjp(x.q[0, 0], x.k[0, 0], x.v[0, 0], *x[3:])
    found = vjp(x.q[0, 0])
    for name in "ruw":
        assert np.array_equal(getattr(found, name), getattr(expected, name))
    assert np.array_equal(found.q, expected.q[0, 0])


def test_backward_writes_and_adds(rng: Any) -> None:
    x = draw(rng, Case(batch=2, segment=20, memory=4), np.float32)
    out, lse = sa.relative_attention(*x, mem_len=4, return_lse=True)
    plain = sa.relative_attention_backward(x.q, *x, out, lse, mem_len=4)
    into = {name: np.ones_like(getattr(plain, name)) for name in "ru"}
    added = sa.relative_attention_backward(x.q, *x, out, lse, mem_len=4, into=into, accumulate=True)
    assert added.r is into["r"]
    assert np.allclose(into["r"], 1 + plain.r)
    assert np.allclose(into["u"], 1 + plain.u)
    narrow = x._replace(r=x.r.astype(np.float16))  # r may have a narrower type than q
    assert sa.relative_attention_backward(x.q, *narrow, out, lse, mem_len=4).r.dtype == np.float16


@pytest.mark.parametrize("value", [1 / 3, 1e300])
def test_arrays_wider_than_the_computation_keep_their_digits(rng: Any, value: float) -> None:
    x = draw(rng, Case(segment=20), np.float32)
    own, bias = np.full((20, 20), value), np.zeros((20, 20))
    out, lse = sa.relative_attention(*x, bias=bias, return_lse=True)
    call = (np.zeros_like(out), *x, out, lse)
    sa.relative_attention_backward(*call, wrt=("bias",), bias=bias, into={"bias": own}, accumulate=True)
    assert np.all(own == value)


def test_empty(rng: Any) -> None:
    x = draw(rng, Case(segment=3), np.float32)
    empty = x._replace(q=x.q[:0], k=x.k[:0], v=x.v[:0])
    _, vjp = sa.relative_attention_vjp(*empty)
    grads = vjp(empty.q)
    assert grads.r.shape == x.r.shape
    assert not grads.r.any()
    assert not grads.u.any()


@pytest.mark.one_isa
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"wrt": ("x",)}, "wrt names 'x', but it must be one of 'q', 'k', 'v', 'r', 'u', 'w', 'bias', "),
        ({"wrt": ("t5",)}, "wrt names 't5', but there is no t5"),
        ({"r_origin": 3}, "r_origin is 3, but r has the rows 0 to 2"),
        ({"mem_len": 1}, "k has length 3, but mem_len 1 and the length of q, 3, make 4"),
        ({"causal": False}, "causal is False, but with r_origin 0 r has no rows for keys ahead of the query"),
        ({"lse": np.zeros((1, 2, 4))}, "lse has shape (1, 2, 4) but (1, 2, 3) is needed"),
        ({"into": {"r": np.zeros((3, 8))}}, "into['r'] has shape (3, 8) and dtype float64"),
    ],
)
def test_errors(rng: Any, change: dict[str, Any], message: str) -> None:
    x = draw(rng, Case(segment=3), np.float32)
    out, lse = sa.relative_attention(*x, return_lse=True)
    arguments = {"lse": lse, **change}
    with pytest.raises(ValueError, match=r"^relative_attention_backward: ") as caught:
        sa.relative_attention_backward(out, *x, out, **arguments)
    assert str(caught.value).partition(": ")[2].startswith(message)


@pytest.mark.one_isa
def test_misspelt_options(rng: Any) -> None:
    x = draw(rng, Case(segment=3), np.float32)
    with pytest.raises(TypeError, match=r"^relative_attention_vjp: .*'memlen' \(did you mean 'mem_len'\?\)$"):
        sa.relative_attention_vjp(*x, memlen=1)  # type: ignore[call-arg]
