"""Bad input: the exception names the function, the argument, the value and the rule; nothing has been written."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from typing import Any

import numpy as np
import pytest

import selfattn as sa

pytestmark = pytest.mark.one_isa

Q = np.zeros((2, 4, 5, 8), np.float32)
K = np.zeros((2, 2, 7, 8), np.float32)


def array(*shape: int, dtype: Any = np.float32) -> Any:
    return np.zeros(shape, dtype)


# arguments that replace good ones, exception, message
CASES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"q": array(8)}, ValueError, "q has shape (8,) but needs at least 2 dimensions"),
    ({"q": array(2, 4, 5, 0)}, ValueError, "q has head_dim 0"),
    ({"k": array(2, 2, 7, 9)}, ValueError, "k has head_dim 9 but q has 8"),
    ({"k": array(2, 3, 7, 8)}, ValueError, "q has 4 heads, which is not a multiple of the 3 heads of k"),
    ({"k": array(2, 0, 7, 8)}, ValueError, "not a multiple of the 0 heads of k"),
    ({"v": array(2, 4, 7, 8)}, ValueError, "v has 4 heads but k has 2"),
    ({"v": array(2, 2, 6, 8)}, ValueError, "v has length 6 but k has 7"),
    ({"k": array(3, 2, 7, 8)}, ValueError, "the leading dimensions (3,) of k do not broadcast against (2,)"),
    ({"q": Q.astype(np.float16)}, TypeError, "k has dtype float32, but q has float16: they must agree"),
    ({"k": K.astype(np.float64)}, TypeError, "k has dtype float64, but q has float32"),
    (
        {"v": K.astype(np.int32)},
        TypeError,
        "v has dtype int32, but float16, bfloat16, float32 and float64 are accepted",
    ),
    ({"q": Q.astype(complex)}, TypeError, "q has dtype complex128"),
    ({"q": Q.astype(bool)}, TypeError, "q has dtype bool"),
    ({"q": Q.astype(object)}, TypeError, "q"),
    ({"q": "text"}, TypeError, "q"),
    ({"q": None}, TypeError, "q of type NoneType is not an array"),
    ({"q": np.ma.masked_less(Q, 0)}, TypeError, "q is a MaskedArray"),
    ({"mask": np.ma.masked_less(Q, 0)}, TypeError, "mask is a MaskedArray"),
    ({"mask": array(5, 7, dtype=np.int8)}, TypeError, "mask has dtype int8, but a mask must be bool, with True where"),
    ({"mask": array(5, 7)}, TypeError, "mask has dtype float32, but a mask must be bool"),
    ({"mask": array(5, 6, dtype=bool)}, ValueError, "mask has shape (5, 6), which does not broadcast to (2, 4, 5, 7)"),
    ({"mask": array(1, 2, 4, 5, 7, dtype=bool)}, ValueError, "mask has shape (1, 2, 4, 5, 7)"),
    ({"bias": array(5, 7, dtype=np.int16)}, TypeError, "bias has dtype int16"),
    ({"bias": array(5, 7, dtype=bool)}, TypeError, "bias has dtype bool"),
    ({"bias": array(3, 5, 7)}, ValueError, "bias has shape (3, 5, 7), which does not broadcast"),
    ({"causal": 1}, TypeError, "causal is 1, but True or False is needed"),
    ({"causal": "yes"}, TypeError, "causal is 'yes'"),
    ({"q_offset": 1.5}, TypeError, "q_offset has dtype float64, but integers are needed"),
    ({"q_offset": True}, TypeError, "q_offset has dtype bool"),
    ({"q_offset": [1, 2, 3]}, ValueError, "q_offset has shape (3,), which does not broadcast to (2,)"),
    ({"q_offset": np.uint64(1 << 63)}, ValueError, "q_offset holds 9223372036854775808"),
    ({"window": 4}, TypeError, "window is 4, but a pair (left, right) is needed"),
    ({"window": True}, TypeError, "window is True"),
    ({"window": (1, 2, 3)}, TypeError, "window is (1, 2, 3)"),
    ({"window": (-1, 0)}, ValueError, "window is (-1, 0), but its entries cannot be negative: use None for unbounded"),
    ({"window": (1.0, 0)}, TypeError, "window is (1.0, 0), but its entries are integers or None"),
    ({"window": (True, 0)}, TypeError, "window is (True, 0)"),
    ({"q_lens": [6, 1]}, ValueError, "q_lens holds 6, which is outside 0..5 (the length of q)"),
    ({"q_lens": -1}, ValueError, "q_lens holds -1, which is outside 0..5"),
    ({"kv_lens": [8, 1]}, ValueError, "kv_lens holds 8, which is outside 0..7 (the length of k)"),
    ({"kv_starts": [8, 1]}, ValueError, "kv_starts holds 8, which is outside 0..7 (the length of k)"),
    ({"kv_starts": [1, -1]}, ValueError, "kv_starts holds -1, which is outside 0..7 (the length of k)"),
    ({"kv_starts": [1, 2, 3]}, ValueError, "kv_starts has shape (3,), which does not broadcast to (2,)"),
    ({"kv_starts": [1.0, 2.0]}, TypeError, "kv_starts has dtype float64"),
    ({"kv_lens": [1.0, 2.0]}, TypeError, "kv_lens has dtype float64"),
    ({"kv_lens": [[1], [2]]}, ValueError, "kv_lens has shape (2, 1), which does not broadcast to (2,)"),
    ({"scale": np.nan}, ValueError, "scale is nan, but it must be finite"),
    ({"scale": np.complex64(1)}, TypeError, "but a real number is needed"),
    ({"scale": np.inf}, ValueError, "scale is inf"),
    ({"scale": 10**400}, ValueError, "but it must be finite"),
    ({"scale": "1"}, TypeError, "scale is '1', but a real number is needed"),
    ({"scale": True}, TypeError, "scale is True"),
    ({"scale": 1j}, TypeError, "scale is 1j"),
    ({"softcap": 0}, ValueError, "softcap is 0, but it must be greater than 0"),
    ({"softcap": -2.0}, ValueError, "softcap is -2, but it must be greater than 0"),
    ({"softcap": np.inf}, ValueError, "softcap is inf, but it must be finite"),
    ({"alibi_slopes": array(3)}, ValueError, "alibi_slopes has shape (3,), which does not broadcast to (2, 4)"),
    (
        {"alibi_slopes": [1, 2, 3, 4]},
        TypeError,
        "alibi_slopes has dtype int64, but float16, bfloat16, float32 and float64 are accepted",
    ),
    ({"sinks": array(1)}, ValueError, "sinks has shape (1,) but needs one logit per head: (4,)"),
    ({"sinks": array(2, 4)}, ValueError, "sinks has shape (2, 4)"),
    ({"sinks": array(4, dtype=np.int16)}, TypeError, "sinks has dtype int16"),
    ({"layout": "sbhd"}, ValueError, "layout is 'sbhd', but it must be one of 'bhsd', 'bshd'"),
    ({"layout": None}, ValueError, "layout is None"),
    ({"layout": array(2)}, ValueError, "layout is array([0., 0.], dtype=float32), but it must be one of"),
    ({"return_lse": 1}, TypeError, "return_lse is 1"),
    ({"return_weights": None}, TypeError, "return_weights is None"),
    ({"precision": array(2)}, ValueError, "precision is array("),
    ({"precision": "low"}, ValueError, "precision is 'low', but it must be one of 'highest', 'high', 'medium'"),
    ({"num_threads": 0}, ValueError, "num_threads is 0, but it must be in 1..4096"),
    ({"num_threads": 2.0}, TypeError, "num_threads is 2.0, but an integer is needed"),
    ({"num_threads": True}, TypeError, "num_threads is True"),
    ({"is_causal": True}, TypeError, "unexpected keyword argument 'is_causal' (did you mean 'causal'?)"),
    ({"attn_mask": None}, TypeError, "did you mean 'mask'?"),
    ({"softmax_scale": 1.0}, TypeError, "did you mean 'scale'?"),
    ({"dropout_p": 0.0}, TypeError, "did you mean 'dropout'?"),
    ({"enable_gqa": True}, TypeError, "grouped heads are recognised"),
    ({"casual": True}, TypeError, "unexpected keyword argument 'casual' (did you mean 'causal'?)"),
    ({"kv_len": [1, 1]}, TypeError, "unexpected keyword argument 'kv_len' (did you mean 'kv_lens'?)"),
    ({"nonsense": 1}, TypeError, "unexpected keyword argument 'nonsense'"),
]


@pytest.mark.parametrize(("changed", "exception", "message"), CASES, ids=lambda x: str(x)[:40])
def test_bad_input(changed: dict[str, Any], exception: type[Exception], message: str) -> None:
    out = np.full((2, 4, 5, 8), 7, np.float32)
    arguments: dict[str, Any] = {"q": Q, "k": K, "v": K, "out": out, **changed}
    with pytest.raises(exception, match=r"^attention: .*" + re.escape(message)) as raised:
        sa.attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)
    assert type(raised.value) is exception
    assert np.all(out == 7)
    if "unexpected keyword" in str(raised.value):
        return  # before any argument has been read
    function, *names = names_in(raised.value)
    assert function == "attention"
    assert names
    assert set(names) <= set(inspect.signature(sa.attention).parameters)


def names_in(error: Any) -> tuple[str, ...]:
    """Return the names that a message mentions: those of the function and of its arguments."""
    assert "".join(error.message_parts) == str(error)
    assert {type(part) for part in error.message_parts} == {str}
    names: tuple[str, ...] = error.message_parts[::2]
    return names


@pytest.mark.parametrize(
    ("changed", "names"),
    [
        ({"k": array(2, 2, 7, 9)}, ("k", "q")),
        ({"k": array(2, 3, 7, 8)}, ("q", "k")),
        ({"v": array(2, 2, 6, 8)}, ("v", "k")),
        ({"k": K.astype(np.float64)}, ("k", "q")),
        ({"k": array(3, 2, 7, 8)}, ("k",)),
        ({"q_lens": [6, 1]}, ("q_lens", "q")),
        ({"kv_lens": [1, 1], "causal": True}, ("kv_lens", "q", "q_lens", "q_offset")),
        ({"softcap": 1e-300}, ("softcap", "scale", "softcap")),
        ({"mask": array(5, 7)}, ("mask", "bias")),
        ({"scale": "q has k"}, ("scale",)),
        ({"q": "k has v"}, ("q",)),
    ],
    ids=str,
)
def test_names_of_arguments_are_known_apart_from_the_text(changed: dict[str, Any], names: tuple[str, ...]) -> None:
    arguments: dict[str, Any] = {"q": Q, "k": K, "v": K, **changed}
    with pytest.raises((TypeError, ValueError)) as raised:
        sa.attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)
    assert names_in(raised.value) == ("attention", *names)


def test_errors_can_be_pickled_and_copied() -> None:
    for arguments in ((Q, K[..., :3], K), (Q, K, "text")):  # one from the core, one from Python
        with pytest.raises((TypeError, ValueError)) as raised:
            sa.attention(*arguments)
        error = raised.value
        for again in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
            assert type(again) is type(error)
            assert str(again) == str(error)
            assert names_in(again) == names_in(error)


def test_reports_in_the_order_of_the_arguments() -> None:
    with pytest.raises(ValueError, match="k has head_dim"):
        sa.attention(Q, K[..., :3], K[:, :1], mask=np.ones((9, 9), bool), kv_lens=99)
    with pytest.raises(ValueError, match="v has 1 heads"):
        sa.attention(Q, K, K[:, :1], mask=np.ones((9, 9), bool), kv_lens=99)
    with pytest.raises(ValueError, match="mask has shape"):
        sa.attention(Q, K, K, mask=np.ones((9, 9), bool), kv_lens=99)


def test_too_large_results_are_memory_errors() -> None:
    wide = np.broadcast_to(np.float32(0), (1 << 22, 1 << 22, 4, 1))
    with pytest.raises((MemoryError, ValueError)):
        sa.attention(wide, wide[:, :1], wide[:, :1])
    left, middle, right = (np.broadcast_to(np.float32(0), shape) for shape in (
        (1 << 30, 1, 1, 1, 2, 1), (1, 1 << 30, 1, 1, 2, 1), (1, 1, 1 << 30, 1, 2, 1)))  # fmt: skip
    with pytest.raises(ValueError, match="have too many entries"):
        sa.attention(left, middle, right)
    # Neither a count nor a size may overflow, whether anything is allocated (attention) or not (explain).
    q, k, v = claim(1 << 40, 1, 1 << 19, 1), claim(1, 1, 1 << 30, 1), claim(1, 1, 1 << 30, 0)
    for call in (sa.attention, sa.explain):
        with pytest.raises(ValueError, match=r"the result would have shape \(\d+, 1, \d+, 0\), which is larger"):
            call(q, k, v)


def claim(*shape: int) -> Any:
    """A view that claims any shape over four bytes of memory."""
    return np.lib.stride_tricks.as_strided(np.ones(1, np.float32), shape, (0,) * len(shape))


def test_lengths_are_read_once_however_often_they_broadcast(run_python: Any) -> None:
    # In a child, which has a time limit: counting to 2**44 takes hours.
    code = """
        import numpy as np
        import selfattn as sa
        x = np.lib.stride_tricks.as_strided(np.ones(1, np.float32), (1 << 44, 1, 4, 1), (0,) * 4)
        nothing = np.ones((1, 1, 4, 0), np.float32)
        print(sa.attention(x, x[:1], nothing, q_lens=[4], kv_lens=[3]).shape == (1 << 44, 1, 4, 0))
        for lengths in ([5], [-1]):
            try:
                sa.attention(x, x[:1], nothing, kv_lens=lengths)
            except ValueError as error:
                print(error)
    """
    assert run_python(code).splitlines() == [
        "True",
        "attention: kv_lens holds 5, which is outside 0..4 (the length of k)",
        "attention: kv_lens holds -1, which is outside 0..4 (the length of k)",
    ]


def test_views_that_claim_more_than_there_can_be() -> None:
    x = np.ones((4, 1), np.float32)
    with pytest.raises(ValueError, match="q has head_dim 1099511627776, but at most 2147483647 is possible"):
        sa.attention(claim(4, 1 << 40), claim(4, 1 << 40), x)
    with pytest.raises(ValueError, match="v has head_dim 1099511627776, but at most"):
        sa.attention(x, x, claim(4, 1 << 40))
    for q_len in (1, 40):  # any number of keys is allowed if only a few are visible
        keys = claim(1 << 50, 1)
        out = sa.attention(claim(q_len, 1), keys, keys, causal=True, window=(300, 0), return_lse=True)
        assert np.array_equal(out[0], np.ones((q_len, 1)))
    assert sa.attention(claim(1 << 40, 1), x, np.ones((4, 0), np.float32)).shape == (1 << 40, 0)
    w = np.ones((16, 16), np.float32)
    layer = sa.SelfAttention(w, w, w, w, num_heads=4)
    for shape in ((1 << 56, 16), (1 << 30, 1 << 26, 16), (1 << 44, 16)):
        with pytest.raises(MemoryError):
            layer(claim(*shape))
        with pytest.raises(MemoryError):
            layer(w, context=claim(*shape))
    with pytest.raises(MemoryError):
        sa.SelfAttention(claim(1, 1 << 58), claim(1, 1 << 58), w[:1], num_heads=1)


def test_random_bad_calls_raise_only_what_is_documented(rng: Any) -> None:
    plain = [None, True, 0, -1, 3, 2.5, np.nan, 1 << 70, "bhsd", "bshd", b"", (), (1, 2), (None, None), [1, 2], [[1.0]]]
    shapes = [(), (4,), (2, 4, 5, 7), (0, 3), (2, 4, 5, 8), (2, 2, 7, 8), (1,) * 32]
    dtypes = [np.float32, np.float64, bool, np.int64, "datetime64[s]", [("x", "f4")], "U1"]
    arrays = [np.zeros(shape, dtype) for shape in shapes for dtype in dtypes]
    values: list[Any] = [*plain * 2, {}, object(), np.float32(1), *arrays]
    names = ["q", "k", "v", *(sa.attention.__kwdefaults__ or {})]
    refused: list[Exception] = []
    for _ in range(6000):
        arguments: dict[str, Any] = {"q": Q, "k": K, "v": K}
        for name in rng.choice(names, size=rng.integers(1, 5), replace=False):
            arguments[str(name)] = values[rng.integers(len(values))]
        try:
            sa.attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)
        except (TypeError, ValueError) as error:
            refused.append(error)
        except (MemoryError, BufferError):
            pass
    assert len(refused) > 3000
    assert all(names_in(error)[0] == "attention" for error in refused)
    assert not Q.any()
    assert not K.any()
