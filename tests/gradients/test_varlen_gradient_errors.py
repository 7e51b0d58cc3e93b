"""Gradients of packed sequences: arguments that are refused."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

import selfattn as sa

pytestmark = pytest.mark.one_isa

GIVEN = {"cu_seqlens_q": [0, 3, 5], "cu_seqlens_k": [0, 2, 5], "wrt": ("q",)}


@pytest.mark.parametrize(
    ("changed", "exception", "message"),
    [
        ({"cu_seqlens_q": None}, TypeError, "cu_seqlens_q is missing"),
        ({"cu_seqlens_k": [0, 5]}, ValueError, "cu_seqlens_k has 2 entries but cu_seqlens_q has 3"),
        ({"cu_seqlens_q": [0, 3, 6]}, ValueError, "cu_seqlens_q goes from 0 to 6, but q has the rows 0 to 5"),
        ({"grad_out": np.zeros((5, 2, 4))}, ValueError, "grad_out has shape (5, 2, 4) but (5, 2, 8) is needed"),
        ({"grad_out": np.zeros((5, 2, 8), "f4")}, TypeError, "grad_out has dtype float32, but float64 is needed"),
        ({"out": np.zeros((4, 2, 8))}, ValueError, "out has shape (4, 2, 8) but (5, 2, 8) is needed"),
        ({"lse": np.zeros((5, 2))}, ValueError, "lse has shape (5, 2) but (2, 5) is needed"),
        ({"lse": None}, TypeError, "lse is of type NoneType, but an array is needed"),
        ({"into": 3}, TypeError, "into is of type int, but Gradients or a mapping is needed"),
        ({"into": []}, TypeError, "into is of type list, but Gradients or a mapping is needed"),
        ({"grad_lse": np.zeros(5)}, ValueError, "grad_lse has shape (5,) but (2, 5) is needed"),
        (
            {"k": np.zeros((5, 3, 8))},
            ValueError,
            "q has 2 heads, which is not a multiple of the 3 heads of k (sequence 0)",
        ),
        ({"wrt": "q"}, TypeError, "wrt is 'q', but a sequence of names is needed"),
        ({"wrt": ("bias",)}, ValueError, "wrt names 'bias', but there is no bias"),
        ({"wrt": ("x",)}, ValueError, "wrt names 'x', but it must be one of "),
        ({"bias": [None]}, ValueError, "bias has 1 entries, but there are 2 sequences"),
        ({"bias": [None, np.zeros((3, 3))]}, ValueError, "bias has shape (3, 3)"),
        ({"accumulate": True}, ValueError, "accumulate is True, but there is no into to add to"),
        ({"into": {"k": np.zeros((5, 2, 8))}}, ValueError, "into has 'k', which wrt does not name"),
        (
            {"into": {"q": np.zeros((5, 2, 7))}},
            ValueError,
            "into['q'] has shape (5, 2, 7) and dtype float64, but the gradient has (5, 2, 8) and float64",
        ),
        (
            {"wrt": ("bias",), "bias": [None, np.zeros((2, 1))], "into": {"bias": [None, np.zeros((2, 3))]}},
            ValueError,
            "into['bias[1]'] has shape (2, 3) and dtype float64, but the gradient has (2, 1) and float64",
        ),
        ({"kv_lens": [3]}, TypeError, "unexpected keyword argument 'kv_lens' (did you mean 'cu_seqlens_k'?)"),
        ({"return_weights": True}, TypeError, "unexpected keyword argument 'return_weights'"),
    ],
)
def test_errors(changed: dict[str, Any], exception: type[Exception], message: str) -> None:
    zeros = {name: np.zeros((5, 2, 8)) for name in ("grad_out", "q", "k", "v", "out")}
    given = {**zeros, "lse": np.zeros((2, 5)), **GIVEN, **changed}
    with pytest.raises(exception, match="^attention_varlen_backward: " + re.escape(message)):
        sa.attention_varlen_backward(**given)


def test_errors_of_lists() -> None:
    x = [np.zeros((3, 2, 8)), np.zeros((2, 2, 8))]
    given = {"grad_out": x, "q": x, "k": x, "v": x, "out": x, "lse": [np.zeros((2, 3)), np.zeros((2, 2))]}
    for name, value in (("grad_out", None), ("out", 3), ("lse", 3.0), ("grad_lse", np.zeros((2, 5)))):
        text = rf"^attention_varlen_backward: {name} is of type {type(value).__name__}, but a list is needed, as for q$"
        with pytest.raises(TypeError, match=text):
            sa.attention_varlen_backward(**{**given, name: value})
    with pytest.raises(TypeError, match="lse is of type NoneType, but an array is needed"):
        sa.attention_varlen_backward(**{**given, "lse": None})
    _, vjp = sa.attention_varlen_vjp(x, x, x)
    with pytest.raises(ValueError, match=r"^attention_varlen_vjp: grad_out has lengths \[2 3\] but q has \[3 2\]"):
        vjp(x[::-1])
    with pytest.raises(ValueError, match=r"grad_lse has shapes \[\(2, 3\)\], but \[\(2, 3\), \(2, 2\)\] are needed"):
        vjp(x, [np.zeros((2, 3))])
    with pytest.raises(ValueError, match=r"^attention_varlen_vjp: cu_seqlens is given"):
        sa.attention_varlen_vjp(x, x, x, [0, 3, 5])
    with pytest.raises(TypeError, match=r"^attention_varlen_vjp: unexpected keyword argument 'out'"):
        sa.attention_varlen_vjp(x, x, x, out=x)
