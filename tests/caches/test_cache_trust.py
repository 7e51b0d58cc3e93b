"""Interrupts, damaged buffers and arguments that change during a call must not damage a cache."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest

import selfattn as sa
from selfattn import _core


@contextmanager
def interrupt_after(name: str) -> Iterator[None]:
    """Let the core do all of its work; then Ctrl-C arrives."""
    original = getattr(_core, name)

    def call(*arguments: Any) -> Any:
        original(*arguments)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_core, name, call)
        yield


def test_sharers_of_a_page_survive_a_failed_call(normal: Any) -> None:
    cache = sa.PagedKVCache(20, 16, 2, 8)
    a = cache.allocate()
    cache.append(a, normal(2, 26, 8), normal(2, 26, 8))
    b = cache.fork(a)
    cache.truncate(b, 20)
    q = normal(1, 2, 1, 8)
    before = [sa.attention_with_kvcache(q, cache, sequences=[s]).tobytes() for s in (a, b)]
    free, lengths = cache.num_free_pages, (cache.length(a), cache.length(b))
    with interrupt_after("attend_cache"):
        for order in ([a, b], [b, a]):
            with pytest.raises(KeyboardInterrupt):
                sa.attention_with_kvcache(
                    normal(2, 2, 8, 8), cache, normal(2, 2, 8, 8), normal(2, 2, 8, 8), sequences=order
                )
    assert (cache.num_free_pages, (cache.length(a), cache.length(b))) == (free, lengths)
    assert [sa.attention_with_kvcache(q, cache, sequences=[s]).tobytes() for s in (a, b)] == before


@pytest.mark.one_isa
@pytest.mark.parametrize("kind", ["ring", "paged"])
def test_refuses_queries_that_see_lost_tokens(normal: Any, kind: str) -> None:
    k = normal(1, 1, 1, 4)
    cache: Any = sa.KVCache(1, 1, 4, 4, window=2) if kind == "ring" else sa.PagedKVCache(8, 1, 1, 4, window=2)
    own = {} if kind == "ring" else {"sequences": [cache.allocate()]}
    for _ in range(6):
        sa.attention_with_kvcache(k, cache, k, k, window=(2, 0), **own)
    sa.attention_with_kvcache(normal(1, 1, 3, 4), cache, window=(0, 0), **own)
    with pytest.raises(ValueError, match="q has 3 queries for stored tokens, and the first would see tokens before"):
        sa.attention_with_kvcache(normal(1, 1, 3, 4), cache, window=(2, 0), **own)
    with pytest.raises(ValueError, match="3 to the left, but the cache keeps only the tokens that a window of 2 sees"):
        sa.attention_with_kvcache(k, cache, window=(3, 0), **own)


@pytest.mark.parametrize("window", [None, 5])
def test_an_interrupt_after_the_core_takes_its_tokens_back(normal: Any, window: Any) -> None:
    cache = sa.KVCache(2, 2, 8, 20, window=window)
    cache.append(normal(2, 2, 7, 8), normal(2, 2, 7, 8))
    options = {"window": None if window is None else (window, 0)}
    q = normal(2, 2, 1, 8)
    before = sa.attention_with_kvcache(q, cache, **options)
    for name in ("attend_cache", "append"):
        k, v = normal(2, 2, 1, 8), normal(2, 2, 1, 8)
        attend = partial(sa.attention_with_kvcache, q, cache, **options)
        with interrupt_after(name), pytest.raises(KeyboardInterrupt):
            (attend if name == "attend_cache" else cache.append)(k, v)
        assert cache.lengths.tolist() == [7, 7]
    assert np.array_equal(sa.attention_with_kvcache(q, cache, **options), before)


def test_offsets_that_change_after_they_were_checked(normal: Any) -> None:
    starts = np.array([0, 3, 10])

    class Changing:
        def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
            starts[1] = -(1 << 30)
            return np.ones((7, 7), bool)

    q, k, v = (normal(10, 2, 8) for _ in range(3))
    found = sa.attention_varlen(q, k, v, starts, mask=[None, Changing()])
    assert starts[1] < 0
    assert np.array_equal(found, sa.attention_varlen(q, k, v, [0, 3, 10]))


@pytest.mark.one_isa
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("length", [-(1 << 32), -1, 1 << 62])
def test_lengths_that_change_in_the_buffer(normal: Any, window: Any, length: int) -> None:
    memory = bytearray(sa.KVCache.buffer_size(2, 2, 8, 20, window=window))
    cache = sa.KVCache(2, 2, 8, 20, window=window, buffer=memory)
    words = np.frombuffer(memory, np.int64)
    words[16:24:2] = length  # both copies of the first sequence's lengths and starts
    words[17:24:2] = 0
    with pytest.raises(ValueError, match="the cache's buffer says that sequence 0 has the tokens"):
        cache.append(normal(2, 2, 1, 8), normal(2, 2, 1, 8))
    with pytest.raises(ValueError, match="lengths are impossible"):
        sa.KVCache(2, 2, 8, 20, window=window, buffer=memory)


@pytest.mark.one_isa
@pytest.mark.parametrize(("window", "start", "length"), [(None, 1, 5), (5, 1, 22), (5, 6, 5)])
def test_starts_that_change_in_the_buffer(normal: Any, window: Any, start: int, length: int) -> None:
    memory = bytearray(sa.KVCache.buffer_size(2, 2, 8, 20, window=window))
    cache = sa.KVCache(2, 2, 8, 20, window=window, buffer=memory)
    words = np.frombuffer(memory, np.int64)
    words[16:24:4], words[18:24:4] = length, start  # of the first sequence, in both copies
    message = f"the cache's buffer says that sequence 0 has the tokens {start} to {length}, which is impossible"
    with pytest.raises(ValueError, match=f"append: {message}"):
        cache.append(normal(2, 2, 1, 8), normal(2, 2, 1, 8))
    with pytest.raises(ValueError, match=f"KVCache: {message}"):
        _ = cache.lengths


@pytest.mark.one_isa
@pytest.mark.parametrize("strange", [7, 2, -1, 1 << 62])
def test_any_number_in_the_buffer_names_one_of_both_copies(strange: int) -> None:
    memory = bytearray(sa.KVCache.buffer_size(2, 2, 8, 20))
    cache = sa.KVCache(2, 2, 8, 20, buffer=memory)
    for _ in range(2):
        cache.append(*np.ones((2, 2, 2, 1, 8), np.float32))
        np.frombuffer(memory, np.int64)[9] ^= strange & -2
    cache.truncate(1)
    assert cache.lengths.tolist() == [1, 1]
    cache.truncate(0)
    assert cache.lengths.tolist() == [0, 0]


@pytest.mark.one_isa
def test_a_cache_whose_making_was_cut_off_is_made_again() -> None:
    memory = bytearray(sa.KVCache.buffer_size(2, 2, 8, 20))
    sa.KVCache(2, 2, 8, 20, buffer=memory)
    words = np.frombuffer(memory, np.int64)
    words[0] = 0
    words[5:9] = 0
    assert sa.KVCache(2, 2, 8, 20, buffer=memory).lengths.tolist() == [0, 0]
    words[0], words[2] = 0, 7
    with pytest.raises(ValueError, match="neither a cache nor zeros"):
        sa.KVCache(2, 2, 8, 20, buffer=memory)


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_cascade_of_no_tokens(normal: Any, layout: str) -> None:
    cache = sa.PagedKVCache(20, 4, 2, 8, value_dim=5)
    prompt = cache.allocate()
    cache.append(prompt, normal(2, 9, 8), normal(2, 9, 5))
    shape = (2, 4, 0, 8) if layout == "bhsd" else (2, 0, 4, 8)
    forks = [prompt, cache.fork(prompt)]
    out = sa.attention_with_kvcache(normal(*shape), cache, sequences=forks, cascade=True, layout=layout)
    assert out.shape == (*shape[:3], 5)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_the_largest_float_as_codes(normal: Any, dtype: str) -> None:
    cache = sa.KVCache(1, 1, 4, 4, dtype=dtype)
    largest = np.finfo(np.float32).max
    cache.append(np.zeros((1, 1, 1, 4), np.float32), np.full((1, 1, 1, 4), largest))
    out = sa.attention_with_kvcache(normal(1, 1, 1, 4), cache)
    assert np.all(np.isfinite(out))
    assert np.allclose(out, largest, rtol=1e-6)


@pytest.mark.parametrize("new", ["float16", "float32", "float64"])
@pytest.mark.parametrize("stored", ["float16", "float32", "int8", "int4"])
def test_new_tokens_of_any_type(normal: Any, stored: str, new: str) -> None:
    q, k, v = normal(2, 2, 3, 8), normal(2, 2, 3, 8).astype(new), normal(2, 2, 3, 8).astype(new)
    one, other = (sa.KVCache(2, 2, 8, 9, dtype=stored) for _ in range(2))
    found = sa.attention_with_kvcache(q, one, k, v)
    other.append(k, v)
    assert np.array_equal(found, sa.attention_with_kvcache(q, other))
    assert np.array_equal(one.k, other.k)
    with pytest.raises(TypeError, match=r"attention_with_kvcache: v has dtype .*k has"):
        sa.attention_with_kvcache(q, one, k, v.astype(np.float64 if new != "float64" else np.float32))


@pytest.mark.one_isa
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_lengths_that_another_process_keeps_changing(run_python: Any) -> None:
    # If lengths were read again after the check, tokens could be written far outside of the buffer.
    run_python(
        """
        import mmap, os, signal, time
        import numpy as np
        import selfattn as sa

        shape = (1, 1, 8, 64)
        memory = mmap.mmap(-1, sa.KVCache.buffer_size(*shape))
        cache = sa.KVCache(*shape, buffer=memory)
        words = np.frombuffer(memory, np.int64)
        child = os.fork()
        if child == 0:
            while True:
                words[16] = words[18] = 1 << 50
                words[16] = words[18] = 0
        try:
            k = np.ones((1, 1, 1, 8), np.float32)
            q, ends, done = np.ones((1, 1, 1, 8), np.float32), time.monotonic() + 2, 0
            while time.monotonic() < ends:
                for call in (
                    lambda: cache.append(k, k),
                    lambda: sa.attention_with_kvcache(q, cache, k, k),
                    lambda: cache.truncate(0),
                    lambda: cache.reorder([0]),
                    lambda: cache.lengths,
                ):
                    try:
                        call()
                        done += 1
                    except ValueError:
                        pass
            assert done
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        """
    )


@pytest.mark.one_isa
def test_lengths_that_change_while_the_core_computes(run_python: Any) -> None:
    # Rotating the queries takes a while without the GIL; the new tokens are stored after that.
    run_python(
        """
        import threading, time
        import numpy as np
        import selfattn as sa

        shape = (1, 1, 64, 4096)
        memory = bytearray(sa.KVCache.buffer_size(*shape))
        cache = sa.KVCache(*shape, buffer=memory)
        words = np.frombuffer(memory, np.int64)
        q, k = np.ones((1, 64, 4000, 64), np.float32), np.ones((1, 1, 4000, 64), np.float32)
        started = threading.Event()

        def change():
            started.wait()
            time.sleep(0.01)
            words[16] = words[18] = 1 << 50

        thread = threading.Thread(target=change)
        thread.start()
        started.set()
        sa.attention_with_kvcache(q, cache, k, k, rope=True, window=(0, 0))
        thread.join()
        assert cache.lengths.tolist() == [4000]
        """
    )
