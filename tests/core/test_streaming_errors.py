"""What AttentionState refuses, and that it is then unchanged; calls from several threads."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import numpy as np
import pytest
from pieces import stream

import selfattn as sa


def zeros(*shape: int, dtype: Any = np.float32) -> Any:
    return np.zeros(shape, dtype)


def same(a: Any, b: Any) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.one_isa
def test_no_copies() -> None:
    state = sa.AttentionState(np.zeros((2, 3)), kv_len=5)
    for call in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="AttentionState cannot be copied or pickled"):
            call(state)


X = zeros(2, 4, 10, 8)
NARROW = {"k": zeros(2, 2, 10, 8, dtype=np.float16), "v": zeros(2, 2, 10, 6, dtype=np.float16)}


@pytest.mark.one_isa
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"q": np.zeros((2, 3), int)}, TypeError, "q has dtype int64, but float16"),
        ({"q": np.zeros(3)}, ValueError, r"q has shape \(3,\) but needs at least 2 dimensions"),
        ({"kv_len": -1}, ValueError, r"kv_len is -1, but it must be in 0\.\.140737488355328"),
        ({"kv_len": 2.0}, TypeError, "kv_len is 2.0, but an integer is needed"),
        ({"first": 101}, ValueError, r"first is 101, but it must be in 0\.\.100"),
        ({"mask": np.ones((10, 99), bool)}, ValueError, r"mask has shape \(10, 99\), which does not broadcast to"),
        ({"mask": np.ones((10, 100), int)}, TypeError, "mask has dtype int64, but a mask must be bool"),
        ({"bias": np.ones((3, 10, 100))}, ValueError, r"bias has shape \(3, 10, 100\), which does not broadcast"),
        ({"kv_lens": [3, 101]}, ValueError, r"kv_lens holds 101, which is outside 0\.\.100"),
        ({"kv_lens": [3, 4], "causal": True}, ValueError, "kv_lens holds 3, which is less than the 10 queries"),
        ({"q_offset": [1, 2, 3]}, ValueError, r"q_offset has shape \(3,\), which does not broadcast"),
        ({"sinks": [1.0]}, ValueError, r"sinks has shape \(1,\) but needs one logit per head: \(4,\)"),
        ({"softcap": -1.0}, ValueError, "softcap is -1, but it must be greater than 0"),
        ({"dropout": 0.5}, ValueError, "dropout is 0.5 without a seed"),
        ({"layout": "sbhd"}, ValueError, "layout is 'sbhd', but it must be one of 'bhsd', 'bshd'"),
        ({"is_causal": True}, TypeError, r"unexpected keyword argument 'is_causal' \(did you mean 'causal'\?\)"),
        ({"return_lse": True}, TypeError, "unexpected keyword argument 'return_lse'"),
    ],
)
def test_errors_of_the_constructor(arguments: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match="^AttentionState: " + message):
        sa.AttentionState(**{"q": X, "kv_len": 100, **arguments})


@pytest.mark.one_isa
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"first": 5}, ValueError, r"first is 5, but key 10 comes next: pieces come in order, without gaps"),
        ({"first": 101}, ValueError, r"first is 101, but it must be in 0\.\.100"),
        ({"k": zeros(2, 2, 91, 8), "v": zeros(2, 2, 91, 6)}, ValueError, "k has 91 keys from key 10 on, but kv_len"),
        ({"k": zeros(2, 1, 5, 8), "v": zeros(2, 1, 5, 6)}, ValueError, "k has 1 heads, but the pieces before had 2"),
        ({"v": zeros(2, 2, 10, 7)}, ValueError, "v has head_dim 7, but the pieces before had 6"),
        ({"v": zeros(2, 2, 9, 6)}, ValueError, "v has length 9 but k has 10"),
        (NARROW, TypeError, "k has dtype float16, but the pieces before"),
        ({"k": np.zeros((2, 2, 10, 8))}, TypeError, "k has dtype float64, but q has float32"),
        ({"k": zeros(3, 2, 10, 8)}, ValueError, r"the leading dimensions \(3,\) of k do not broadcast"),
        ({"k": zeros(8)}, ValueError, r"k has shape \(8,\) but needs at least 2 dimensions"),
        ({"mask": np.ones((10, 11), bool)}, ValueError, r"mask has shape \(10, 11\), which does not broadcast to"),
        ({"mask": np.ones((10, 10), int)}, TypeError, "mask has dtype int64, but a mask must be bool"),
        ({"bias": np.ones((10, 10))}, ValueError, "bias is given, but AttentionState has one for all keys already"),
    ],
)  # fmt: skip
def test_errors_of_a_piece_leave_the_state_unchanged(arguments: dict[str, Any], error: Any, message: str) -> None:
    k, v = np.ones((2, 2, 10, 8), np.float32), np.ones((2, 2, 10, 6), np.float32)
    state = sa.AttentionState(X, kv_len=100, bias=np.zeros(100))
    state.absorb(k, v)
    expected = state.result()
    with pytest.raises(error, match=r"^AttentionState\.absorb: " + message):
        state.absorb(**{"k": k, "v": v, **arguments})
    assert state.next_key == 10
    assert same(state.result(), expected)


@pytest.mark.one_isa
def test_q_must_have_all_leading_dimensions(normal: Any) -> None:
    state = sa.AttentionState(normal(1, 2, 5, 8), kv_len=9)
    with pytest.raises(ValueError, match=r"absorb: q has shape \(1, 2, 5, 8\), which the leading dimensions of k and"):
        state.absorb(*normal(2, 3, 2, 9, 8))
    with pytest.raises(TypeError, match=r"^AttentionState: unexpected keyword argument 'attn_mask' \(did you mean 'ma"):
        state.absorb(*normal(2, 1, 2, 9, 8), attn_mask=None)  # type: ignore[call-arg]


def test_threads_wait_for_each_other(normal: Any) -> None:
    q, k = normal(2, 200, 16), normal(2, 64, 16)
    state = sa.AttentionState(q, kv_len=64 * 40)

    def absorb() -> None:
        for _ in range(10):
            state.absorb(k, k)
            state.result()

    threads = [threading.Thread(target=absorb) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    keys = np.tile(k, (1, 40, 1))
    assert same(state.result(), stream(q, keys, keys, range(64, 64 * 40, 64)))
