"""The child process of `test_allocation`: calls in which each allocation fails in turn."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import itertools
import os
import sys
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

import selfattn as sa
from selfattn import _core
from selfattn._arguments import core_options

_shim = ctypes.CDLL(os.environ["LD_PRELOAD"])
_shim.failing_malloc_live.restype = ctypes.c_long
_shim.failing_malloc_arm.argtypes = [ctypes.c_long, ctypes.c_int]


def calls() -> dict[str, Callable[[], Any]]:
    """The calls to fail. Each has enough work for two threads, and no scratch of its size is left from another."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Any:
        return rng.standard_normal(shape).astype(np.float32)

    few, cache = normal(1, 2, 2, 64), normal(1, 2, 5000, 64)
    many = normal(2, 4, 130, 40)
    backwards, lengths, out = many[..., ::-1], np.array([100, 130], np.int32), np.empty_like(many)
    sinks = normal(4)
    x, context = normal(2, 90, 48), normal(2, 70, 48)
    weights = [normal(48, 48) for _ in range(4)]
    biases = {f"b_{name}": normal(48) for name in "qkvo"}
    layer = sa.SelfAttention(*weights, **biases, num_heads=4, rope=True)
    narrow, narrow_few, narrow_cache = (x.astype(np.float16) for x in (many, few, cache))
    narrow_layer = sa.SelfAttention(*(w.astype(np.float16) for w in weights), num_heads=4, rope=True)
    narrow_x = x.astype(np.float16)
    norm = sa.LayerNorm(biases["b_q"], biases["b_k"])
    linear = sa.Linear(weights[0], biases["b_q"], activation="gelu", w_gate=weights[1])
    feed_forward = sa.FeedForward(weights[0], weights[1], norm=norm, post_norm=norm)
    whole = sa.SelfAttention(*weights, num_heads=4, norm=norm, post_norm=norm)
    both = {"return_lse": True, "return_weights": True}
    return {
        "tile": lambda: sa.attention(many, many, many, num_threads=3),
        "ranges": lambda: sa.attention(few, cache, cache, num_threads=3),
        "serial": lambda: sa.attention(few, cache, cache, num_threads=1),
        "results": lambda: sa.attention(many, many, many, num_threads=3, **both),
        "converted": lambda: sa.attention(backwards, many, backwards, kv_lens=lengths, sinks=sinks, num_threads=3),
        "overlap": lambda: overlapping(many),
        "out": lambda: sa.attention(many, many, many, out=out, num_threads=3),
        "layer": lambda: layer(x, context=context, num_threads=3, **both),
        "layer backwards": lambda: layer(x[:, ::-1], num_threads=3),
        "self_attention": lambda: sa.self_attention(x, *weights, **biases, num_heads=4, num_threads=3),
        "narrow": lambda: sa.attention(narrow, narrow, narrow, num_threads=3, **both),
        "narrower": lambda: sa.attention(many, narrow[..., ::-1], narrow, num_threads=3),
        "narrow ranges": lambda: sa.attention(narrow_few, narrow_cache, narrow_cache, num_threads=3),
        "narrow layer": lambda: narrow_layer(narrow_x, num_threads=3),
        "linear": lambda: linear(x[:, ::-1], residual=x, num_threads=3),
        "feed forward": lambda: feed_forward(x, residual=x, num_threads=3),
        "few rows": lambda: feed_forward(x[:, :20], residual=x[:, :20], num_threads=3),
        "norm": lambda: norm(x[:, ::-1], residual=x),
        "whole layer": lambda: whole(x, residual=x, num_threads=3),
        "gradients": lambda: gradients(many, sinks),
        "narrow gradients": lambda: gradients(narrow[..., ::-1], sinks),
        "packed gradients": lambda: packed_gradients(many[0], sinks),
        "pieces": lambda: in_pieces(many),
        "rope": lambda: sa.apply_rope(many),
        "merge": lambda: merged(many),
        "explain": lambda: str(sa.explain(many, many, many, num_threads=1)),  # else the number follows measured times
        "refused": lambda: refused(many),
    }


def overlapping(x: Any) -> Any:
    y = x.copy()
    return sa.attention(y, y, y, out=y, num_threads=3)


def gradients(x: Any, sinks: Any) -> Any:
    # Not attention_backward: where memory is short, NumPy's sums raise SystemError.
    options = core_options("attention_backward", sinks=sinks, num_threads=3)
    given = _core.GradientInputs(grad_out=x, out=x, lse=np.ones(x.shape[:3], np.float32))
    wrt = "q", "k", "v", "sinks"
    return tuple(_core.attention_backward("attention_backward", (x, x, x), given, wrt, options).values())


def packed_gradients(x: Any, sinks: Any) -> Any:
    function, starts = "attention_varlen_backward", np.array([0, 50, 130])
    options = core_options(function, sinks=sinks, layout="bshd", num_threads=3)
    packed = x.swapaxes(0, 1)
    inputs = _core.VarlenInputs(q=packed, k=packed, v=packed, cu_seqlens_q=starts, cu_seqlens_k=starts)
    given = _core.GradientInputs(grad_out=packed, out=packed, lse=np.ones(x.shape[:2], np.float32))
    return tuple(_core.attention_varlen_backward(function, inputs, given, ("q", "k", "v"), options).values())


def in_pieces(x: Any) -> Any:
    state = sa.AttentionState(x, kv_len=x.shape[2], num_threads=3)
    for keys in (slice(0, 70), slice(70, None)):
        before = state.next_key
        try:
            state.absorb(x[:, :, keys], x[:, :, keys], first=keys.start)
        except MemoryError:
            assert state.next_key == before
            state.absorb(x[:, :, keys], x[:, :, keys], first=keys.start)  # the state is unchanged
            state.result()
            raise
    return state.result()


def merged(x: Any) -> Any:
    # Not merge_states: it reads the default number of threads, and ignores files that it cannot read.
    out, lse = np.empty_like(x), np.empty_like(x[..., 0])
    _core.merge_states([x, x], [x[..., 0], x[..., 1]], out, lse, 3)
    return out, lse


def refused(x: Any) -> str:
    try:
        sa.attention(x, x[..., :3], x)
    except ValueError as error:
        return f"{error} {error.__dict__}"
    raise AssertionError("not refused")


def digest(result: Any) -> bytes:
    parts = result if isinstance(result, tuple) else (result,)
    return hashlib.sha256(b"".join(x.tobytes() if isinstance(x, np.ndarray) else x.encode() for x in parts)).digest()


def attempt(call: Callable[[], Any], expected: bytes, n: int, all_libraries: bool) -> tuple[bool, bool]:
    """Let the n-th allocation fail; return whether it was reached, and whether the call failed because of it."""
    result, failed = None, False
    _shim.failing_malloc_arm(n, all_libraries)
    try:
        result = call()
    except MemoryError:
        failed = True
    finally:
        reached = bool(_shim.failing_malloc_disarm())
    assert reached or not failed
    assert failed or digest(result) == expected, "no exception, and a wrong result"
    assert digest(call()) == expected, "the next call is wrong"
    return reached, failed


def in_fresh_processes(all_libraries: bool) -> None:
    """Let each allocation of a first call fail, in a fork for each; print how many there were and how many raised."""
    for name, call in calls().items():
        expected = in_child(lambda call=call: digest(call()))  # a fork as well: no scratch may be left here
        raised = n = 0
        while True:
            n += 1
            reached, failed = in_child(partial(answer, call, expected, n, all_libraries))
            if not reached:
                break
            raised += failed
        print(name.replace(" ", "_"), n - 1, raised)


def answer(call: Callable[[], Any], expected: bytes, n: int, all_libraries: bool) -> bytes:
    return bytes(attempt(call, expected, n, all_libraries))


def in_child(action: Callable[[], bytes]) -> bytes:
    """Return what `action` returns in a fork of this process."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, action())
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        received = pipe.read()
    status = os.waitpid(child, 0)[1]
    assert status == 0, f"ended by signal {os.WTERMSIG(status)}"
    assert received, "failed"
    return received


def leaking(all_libraries: bool) -> None:
    """Print how many more bytes are in use after a second round of failures than after the first."""
    rounds = []
    for _ in range(3):
        for call in calls().values():
            expected = digest(call())
            n = 1
            while attempt(call, expected, n, all_libraries)[0]:
                n += 1
        gc.collect()
        rounds.append(_shim.failing_malloc_live())
    print(*(after - before for before, after in itertools.pairwise(rounds)))
