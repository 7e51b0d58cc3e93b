"""Bad weights and bad calls of a layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import selfattn as sa

pytestmark = pytest.mark.one_isa

WEIGHTS = ("w_q", "w_k", "w_v", "w_o")


BIASES = ("b_q", "b_k", "b_v", "b_o")


def arguments(**changed: Any) -> dict[str, Any]:
    params: dict[str, Any] = {name: np.zeros((16, 16), np.float32) for name in WEIGHTS}
    return {**params, "num_heads": 4, **changed}


@pytest.mark.parametrize(
    ("changed", "exception", "message"),
    [
        ({"w_q": np.zeros((16, 18), np.float32)}, ValueError, "w_q has 18 columns, which num_heads 4 does not divide"),
        ({"w_q": np.zeros(16, np.float32)}, ValueError, r"w_q has shape \(16,\), but a matrix is needed"),
        ({"w_q": np.zeros((16, 16), np.int64)}, TypeError, "w_q has dtype int64, but float16, bfloat16"),
        ({"w_k": np.zeros((16, 16))}, TypeError, "w_k has dtype float64 but w_q has float32"),
        ({"w_k": np.zeros((16, 12), np.float32)}, ValueError, "w_k has 12 columns, but 4 KV heads of head_dim 4"),
        ({"w_v": np.zeros((15, 16), np.float32)}, ValueError, "w_v has 15 rows but w_k has 16"),
        ({"w_v": np.zeros((16, 18), np.float32)}, ValueError, "w_v has 18 columns, which num_kv_heads 4"),
        ({"w_o": np.zeros((15, 16), np.float32)}, ValueError, "w_o has 15 rows, but 4 heads of value_dim 4 need 16"),
        ({"b_q": np.zeros(15, np.float32)}, ValueError, r"b_q has shape \(15,\) but w_q has 16 columns"),
        ({"b_v": np.zeros(16)}, TypeError, "b_v has dtype float64 but w_q has float32"),
        ({"w_o": None, "b_o": np.zeros(16, np.float32)}, ValueError, "b_o is given without w_o"),
        ({"num_heads": 0}, ValueError, "num_heads is 0, but it must be at least 1"),
        ({"num_heads": 4.0}, TypeError, "num_heads is 4.0, but an integer is needed"),
        ({"num_kv_heads": 3}, ValueError, "num_heads 4 is not a multiple of num_kv_heads 3"),
        ({"rope": "yes"}, TypeError, "rope is 'yes', but a RoPE, True or None is needed"),
        ({"rope": sa.RoPE(rotary_dim=6)}, ValueError, "rope rotates 6 elements, but head_dim is 4"),
    ],
)
def test_bad_weights(changed: dict[str, Any], exception: type[Exception], message: str) -> None:
    with pytest.raises(exception, match="SelfAttention: " + message):
        sa.SelfAttention(**arguments(**changed))
    with pytest.raises(exception, match="self_attention: " + message):
        sa.self_attention(np.zeros((3, 16), np.float32), **arguments(**changed))


@pytest.mark.parametrize(
    ("changed", "exception", "message"),
    [
        ({"x": np.zeros((3, 15), np.float32)}, ValueError, "x has d_model 15 but the weights have 16 rows"),
        ({"x": np.zeros(16, np.float32)}, ValueError, r"x has shape \(16,\) but needs 2 dimensions or more"),
        ({"x": np.zeros((3, 16))}, TypeError, "x has dtype float64, but w_q has float32"),
        ({"x": np.zeros((3, 16), np.float16)}, TypeError, "x has dtype float16"),
        ({"context": np.zeros((3, 15), np.float32)}, ValueError, "context has d_model 15"),
        ({"positions": [0, 1, 2]}, ValueError, "positions is given, but the layer has no rope"),
        (
            {"mask": np.ones((2, 2), bool)},
            ValueError,
            r"mask has shape \(2, 2\), which does not broadcast to \(4, 3, 3\)",
        ),
        ({"layout": "bshd"}, TypeError, "unexpected keyword argument 'layout'"),
        ({"is_causal": True}, TypeError, "did you mean 'causal'"),
        ({"out": np.zeros((3, 15), np.float32)}, ValueError, r"out has shape \(3, 15\) but the result has \(3, 16\)"),
        ({"out": np.zeros((3, 16))}, TypeError, "out has dtype float64, but the result is float32"),
        ({"out": []}, TypeError, "out is a list"),
        ({"num_threads": -1}, ValueError, "num_threads is -1"),
    ],
)
def test_bad_calls(changed: dict[str, Any], exception: type[Exception], message: str) -> None:
    call = {"x": np.zeros((3, 16), np.float32), **changed}
    with pytest.raises(exception, match="SelfAttention: .*" + message):
        sa.SelfAttention(**arguments())(**call)
    with pytest.raises(exception, match="self_attention: .*" + message):
        sa.self_attention(**arguments(), **call)


@pytest.mark.parametrize("with_out", [False, True])
def test_x_and_context_must_fit(with_out: bool) -> None:
    layer, x = sa.SelfAttention(**arguments()), np.zeros((2, 3, 16), np.float32)
    out = np.zeros_like(x) if with_out else None
    with pytest.raises(ValueError, match=r"SelfAttention: .*\(3,\)"):
        layer(x, context=np.zeros((3, 4, 16), np.float32), out=out)
    with pytest.raises(ValueError, match=r"SelfAttention: context has shape \(16,\)"):
        layer(x, context=np.zeros(16, np.float32), out=out)
    with pytest.raises(ValueError, match=r"SelfAttention: x has shape \(16,\)"):
        layer(np.zeros(16, np.float32), out=out)


def test_keys_of_x_need_weights_for_x() -> None:
    given = {**arguments(), "w_k": np.zeros((17, 16), np.float32), "w_v": np.zeros((17, 16), np.float32)}
    x, message = (
        np.zeros((2, 3, 16), np.float32),
        "x has d_model 16 but w_k has 17 rows: without context they must agree",
    )
    with pytest.raises(ValueError, match="^SelfAttention: " + message) as caught:
        sa.SelfAttention(**given)(x)
    assert caught.value.message_parts[::2] == ("SelfAttention", "x", "w_k")  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="^SelfAttention: " + message):
        sa.SelfAttention(**given)(x, cache=sa.KVCache(2, 4, 4, 10))
    with pytest.raises(ValueError, match="^self_attention: " + message):
        sa.self_attention(x, **given)


def test_random_bad_calls_raise_only_what_is_documented(rng: Any) -> None:
    plain = [None, True, 0, -1, 3, 2.5, np.nan, 1 << 70, b"", "x", (), (1, 2), [1, 2], [[1.0]], {}, object(), sa.RoPE()]
    shapes = [(), (16,), (3, 16), (16, 16), (2, 3, 16), (0, 16), (16, 0), (1,) * 32]
    arrays = [np.zeros(shape, dtype) for shape in shapes for dtype in (np.float32, np.float64, bool, np.int64, "U1")]
    values: list[Any] = [*plain * 2, *arrays]
    good = {"x": np.zeros((3, 16), np.float32), **arguments()}
    names = [*good, *BIASES, "num_kv_heads", "rope", "context", "positions", "out", "mask", "kv_lens", "window", "typo"]
    refused = 0
    for _ in range(4000):
        call = dict(good)
        for name in rng.choice(names, size=rng.integers(1, 4), replace=False):
            call[str(name)] = values[rng.integers(len(values))]
        try:
            sa.self_attention(**call)
        except (TypeError, ValueError, MemoryError, BufferError):
            refused += 1
    assert refused > 2000
