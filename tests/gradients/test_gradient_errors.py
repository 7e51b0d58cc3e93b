"""Bad calls: the exception names function, argument, value and rule; `into` is untouched. And what `into` does."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

import selfattn as sa

Q = np.random.default_rng(0).standard_normal((2, 4, 5, 8)).astype(np.float32)
K = np.random.default_rng(1).standard_normal((2, 2, 7, 8)).astype(np.float32)
OUT, LSE = sa.attention(Q, K, K, return_lse=True)
GOOD: dict[str, Any] = {"grad_out": Q, "q": Q, "k": K, "v": K, "out": OUT, "lse": LSE}
READ_ONLY = np.zeros_like(Q)
READ_ONLY.flags.writeable = False
FLOATS = "float16, bfloat16, float32 and float64 are accepted"
KNOWN = "it must be one of 'q', 'k', 'v', 'bias', 'sinks', 'alibi_slopes', 't5', 'scale'"


def array(*shape: int, dtype: Any = np.float32) -> Any:
    return np.zeros(shape, dtype)


# arguments that replace good ones, exception, message
CASES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"grad_out": array(2, 4, 5, 7)}, ValueError, "grad_out has shape (2, 4, 5, 7) but (2, 4, 5, 8) is needed"),
    ({"grad_out": array(4, 5, 8)}, ValueError, "grad_out has shape (4, 5, 8) but (2, 4, 5, 8) is needed"),
    ({"grad_out": Q.astype(np.float64)}, TypeError, "grad_out has dtype float64, but float32 is needed"),
    ({"grad_out": Q.astype(np.float16)}, TypeError, "grad_out has dtype float16, but float32 is needed"),
    ({"grad_out": Q.astype(int)}, TypeError, f"grad_out has dtype int64, but {FLOATS}"),
    ({"grad_out": None}, TypeError, f"grad_out of type NoneType is not an array of numbers: {FLOATS}"),
    ({"grad_out": np.ma.masked_less(Q, 0)}, TypeError, "grad_out is a MaskedArray"),
    ({"out": OUT[:1]}, ValueError, "out has shape (1, 4, 5, 8) but (2, 4, 5, 8) is needed"),
    ({"out": OUT.astype(np.float64)}, TypeError, "out has dtype float64, but float32 is needed"),
    ({"lse": LSE[..., :4]}, ValueError, "lse has shape (2, 4, 4) but (2, 4, 5) is needed"),
    ({"lse": LSE.astype(np.float16)}, TypeError, "lse has dtype float16, but float32 or float64 is needed"),
    ({"lse": LSE.astype(complex)}, TypeError, f"lse has dtype complex128, but {FLOATS}"),
    ({"grad_lse": array(4, 5)}, ValueError, "grad_lse has shape (4, 5) but (2, 4, 5) is needed"),
    ({"grad_lse": 3}, TypeError, f"grad_lse has dtype int64, but {FLOATS}"),
    (
        {"grad_lse": array(5), "grad_weights": array(2, 4, 5, 7)},
        ValueError,
        "grad_lse has shape (5,) but (2, 4, 5) is needed",
    ),
    ({"grad_weights": array(5, 7)}, ValueError, "grad_weights has shape (5, 7) but (2, 4, 5, 7) is needed"),
    ({"grad_weights": array(2, 4, 5, 7, dtype=complex)}, TypeError, f"grad_weights has dtype complex128, but {FLOATS}"),
    ({"grad_weights": array(2, 4, 5, 7, dtype=int)}, TypeError, f"grad_weights has dtype int64, but {FLOATS}"),
    ({"wrt": "q"}, TypeError, "wrt is 'q', but a sequence of names is needed"),
    ({"wrt": None}, TypeError, "wrt is None, but a sequence of names is needed"),
    ({"wrt": {"q"}}, TypeError, "wrt is {'q'}, but a sequence of names is needed"),
    ({"wrt": ("q", "mask")}, ValueError, f"wrt names 'mask', but {KNOWN}"),
    ({"wrt": (1,)}, ValueError, f"wrt names 1, but {KNOWN}"),
    ({"wrt": ("q", "bias")}, ValueError, "wrt names 'bias', but there is no bias"),
    ({"wrt": ("t5",)}, ValueError, "wrt names 't5', but there is no t5"),
    ({"into": 3}, TypeError, "into is of type int, but Gradients or a mapping is needed"),
    ({"into": [Q]}, TypeError, "into is of type list, but Gradients or a mapping is needed"),
    ({"into": {"q": [1.0]}}, TypeError, "into['q'] is of type list, but an ndarray is needed"),
    ({"into": {"q": READ_ONLY}}, ValueError, "into['q'] is read-only"),
    ({"into": {"q": np.ma.zeros(Q.shape, Q.dtype)}}, TypeError, "into['q'] is of type MaskedArray, but an ndarray is"),
    ({"into": dict.fromkeys("kv", array(2, 2, 7, 8))}, ValueError, "into['k'] and ['v'] share memory"),
    (
        {"into": {"q": np.lib.stride_tricks.as_strided(array(1), Q.shape, (0,) * 4, writeable=True)}},
        ValueError,
        "into['q'] has stride 0 along axis ",
    ),
    ({"wrt": [np.zeros(2), np.zeros(2)]}, ValueError, "wrt names array([0., 0.]), but it must be one of"),
    ({"into": {"lse": LSE}}, ValueError, "into has 'lse', which wrt does not name"),
    ({"into": {"v": array(2, 2, 7, 8)}, "wrt": ("q",)}, ValueError, "into has 'v', which wrt does not name"),
    (
        {"into": {"q": array(4, 5, 8)}},
        ValueError,
        "into['q'] has shape (4, 5, 8) and dtype float32, but the gradient has (2, 4, 5, 8) and float32",
    ),
    (
        {"into": {"q": array(2, 4, 5, 8), "k": K.astype(np.float64)}},
        ValueError,
        "into['k'] has shape (2, 2, 7, 8) and dtype float64, but the gradient has (2, 2, 7, 8) and float32",
    ),
    ({"into": None, "accumulate": True}, ValueError, "accumulate is True, but there is no into to add to"),
    ({"accumulate": 1}, TypeError, "accumulate is 1, but True or False is needed"),
    ({"k": K[..., :3]}, ValueError, "k has head_dim 3 but q has 8"),
    ({"v": K[:, :1]}, ValueError, "v has 1 heads but k has 2"),
    ({"mask": array(5, 6, dtype=bool)}, ValueError, "mask has shape (5, 6), which does not broadcast to (2, 4, 5, 7)"),
    ({"kv_lens": [8, 1]}, ValueError, "kv_lens holds 8, which is outside 0..7 (the length of k)"),
    ({"scale": np.nan}, ValueError, "scale is nan, but it must be finite"),
    ({"num_threads": 0}, ValueError, "num_threads is 0, but it must be in 1..4096"),
    ({"return_lse": True}, TypeError, "unexpected keyword argument 'return_lse'"),
    ({"is_causal": True}, TypeError, "unexpected keyword argument 'is_causal' (did you mean 'causal'?)"),
]


@pytest.mark.one_isa
@pytest.mark.parametrize(("changed", "exception", "message"), CASES, ids=lambda x: str(x)[:40])
def test_bad_input(changed: dict[str, Any], exception: type[Exception], message: str) -> None:
    into = {name: np.full_like(x, 7) for name, x in (("q", Q), ("k", K), ("v", K))}
    given = {**GOOD, "into": into, **changed}
    with pytest.raises(exception, match="^attention_backward: " + re.escape(message)):
        sa.attention_backward(**given)
    assert all(np.all(x == 7) for x in into.values())
    assert not READ_ONLY.any()


@pytest.mark.one_isa
def test_the_function_that_was_called_is_named() -> None:
    with pytest.raises(ValueError, match=r"^attention_vjp: wrt names 'bias', but there is no bias$"):
        sa.attention_vjp(Q, K, K, wrt=("bias",))
    with pytest.raises(TypeError, match=r"^attention_vjp: unexpected keyword argument 'out'"):
        sa.attention_vjp(Q, K, K, out=OUT)
    with pytest.raises(ValueError, match=r"^attention_vjp: k has head_dim 3 but q has 8"):
        sa.attention_vjp(Q, K[..., :3], K)
    with pytest.raises(TypeError, match=r"^attention_vjp: return_lse is 1, but True or False is needed$"):
        sa.attention_vjp(Q, K, K, return_lse=1)
    vjp = sa.attention_vjp(Q, K, K)[1]
    with pytest.raises(ValueError, match=r"^attention_vjp: grad_out has shape \(5, 8\) but \(2, 4, 5, 8\) is needed$"):
        vjp(Q[0, 0])


def test_into_gets_the_gradients() -> None:
    expected = sa.attention_backward(Q, Q, K, K, OUT, LSE)
    k_target = np.zeros((2, 2, 8, 7), np.float32).swapaxes(-1, -2)  # not contiguous
    v_target = np.zeros((2, 2, 7, 16), np.float32)[..., ::-2]
    found = sa.attention_backward(Q, Q, K, K, OUT, LSE, into={"k": k_target, "v": v_target})
    assert found.k is k_target
    assert found.v is v_target
    assert all(np.array_equal(a, b) for a, b in zip(found[:3], expected[:3], strict=True))
    again = sa.attention_backward(Q, Q, K, K, OUT, LSE, into=found, accumulate=True)
    assert again.q is found.q
    assert all(np.array_equal(a, 2 * b) for a, b in zip(again[:3], expected[:3], strict=True))  # type: ignore[operator]


def test_numbers_accumulate_as_well() -> None:
    options: dict[str, Any] = {"sinks": np.ones(4), "bias": np.zeros((5, 7), np.float16)}
    out, lse = sa.attention(Q, K, K, return_lse=True, **options)
    given = (Q, Q, K, K, out, lse)
    wrt = ("sinks", "scale", "bias")
    first = sa.attention_backward(*given, wrt=wrt, **options)
    kept = [np.array(x) for x in first if x is not None]
    assert [x.dtype for x in kept] == [np.float16, np.float32, np.float32]
    twice = sa.attention_backward(*given, wrt=wrt, into=first, accumulate=True, **options)
    assert all(np.array_equal(a, 2 * b) for a, b in zip([x for x in twice if x is not None], kept, strict=True))


@pytest.mark.parametrize("value", [1 / 3, 1e300, -1e-300])
def test_arrays_wider_than_the_computation_keep_their_digits(value: float) -> None:
    own = np.full((4, 5, 7), value)
    options: dict[str, Any] = {"bias": np.zeros(own.shape), "wrt": ("bias",), "accumulate": True}
    nothing = np.zeros_like(OUT)
    sa.attention_backward(nothing, Q, K, K, OUT, LSE, into={"bias": own}, **options)
    assert np.all(own == value)
    expected = sa.attention_backward(Q, Q, K, K, OUT, LSE, bias=options["bias"], wrt=("bias",)).bias
    assert expected is not None
    sa.attention_backward(Q, Q, K, K, OUT, LSE, into={"bias": own}, **options)
    assert np.allclose(own, value + expected, rtol=1e-15, atol=1e-6)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("name", ["q", "k", "v", "grad_out", "out"])
def test_into_may_overlap_with_the_operands(name: str, accumulate: bool) -> None:
    x = np.random.default_rng(3).standard_normal((1, 2, 150, 9)).astype(np.float32)
    out, lse = sa.attention(x, x, x, causal=True, return_lse=True)
    operands = {name: np.array(out if name == "out" else x) for name in ("grad_out", "q", "k", "v", "out")}
    expected = sa.attention_backward(*operands.values(), lse, causal=True)
    whole = np.empty((1, 2, 153, 9), np.float32)
    whole[...] = 0
    whole[:, :, 3:] = operands[name]
    operands[name] = whole[:, :, 3:]
    target = whole[:, :, :150]  # three rows before
    before = target.copy() if accumulate else 0
    found = sa.attention_backward(*operands.values(), lse, causal=True, into={"k": target}, accumulate=accumulate)
    assert found.k is target
    assert np.array_equal(target, before + expected.k)  # type: ignore[operator]
    assert np.array_equal(found.q, expected.q)  # type: ignore[arg-type]
    assert np.array_equal(found.v, expected.v)  # type: ignore[arg-type]


@pytest.mark.one_isa
def test_random_bad_calls_raise_only_what_is_documented(rng: Any) -> None:
    plain = [None, True, 0, -1, 3, 2.5, np.nan, 1 << 70, "bhsd", b"", (), (1, 2), ("q", "bias"), [1, 2], [[1.0]], {}]
    shapes = [(), (4,), (2, 4, 5, 7), (0, 3), (2, 4, 5, 8), (2, 4, 5), (1,) * 32]
    dtypes = [np.float32, np.float64, np.float16, bool, np.int64, complex, "datetime64[s]", [("x", "f4")], "U1"]
    values: list[Any] = [*plain * 2, object(), *(np.zeros(shape, dtype) for shape in shapes for dtype in dtypes)]
    others = ["wrt", "grad_lse", "grad_weights", "into", "accumulate", "mask", "bias", "sinks", "kv_lens"]
    messages = []
    for _ in range(2000):
        given = dict(GOOD)
        for name in rng.choice([*GOOD, *others], size=rng.integers(1, 4), replace=False):
            given[str(name)] = values[rng.integers(len(values))]
        try:
            sa.attention_backward(**given)
        except (TypeError, ValueError, MemoryError, BufferError) as error:
            messages.append(str(error))
    assert len(messages) > 1000
    assert [x for x in messages if not x.startswith("attention_backward: ")] == []
