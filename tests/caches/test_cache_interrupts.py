"""After an exception at any point of a call, a cache holds what it held before."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import selfattn as sa
from selfattn import _core

FILES = {
    str(Path(sa.__file__).with_name(name))
    for name in ("_any_cache.py", "_cache.py", "_cached.py", "_cascade.py", "_ledger.py", "_paged.py")
}
MOVES = {(str(Path(sa.__file__).with_name("_evict.py")), name) for name in ("run", "apply")}  # the others only plan


def raise_at(point: int, error: type[BaseException], call: Callable[[], Any]) -> bool:
    """Raise before the instruction number `point` of the caches' code; return False if the call ended earlier.

    Acquiring and releasing a lock is excluded, and so is `_run`, which undoes a call: Python does not interrupt them.
    """
    seen = 0

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal seen
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        if (file not in FILES and (file, name) not in MOVES) or name == "_run":
            return None
        frame.f_trace_opcodes = True
        line = frame.f_lineno and linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        if event == "opcode" and line and "with self._lock" not in line:
            seen += 1
            if seen == point:
                raise error
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except error:
        return True
    finally:
        sys.settrace(before)
    return False


def everything(cache: Any) -> Any:
    """Return a cache's state as a user sees it."""
    if isinstance(cache, sa.KVCache):
        lengths = cache.lengths.tolist()
        return lengths, [cache.k[b, :, :n].tobytes() + cache.v[b, :, :n].tobytes() for b, n in enumerate(lengths)]
    names = cache.sequences
    q = np.eye(cache.head_dim, dtype=np.float32)[None, None, :1]
    window = None if cache.window is None else (cache.window, None)
    seen = [
        sa.attention_with_kvcache(q, cache, sequences=[name], window=window).tobytes()
        for name in names
        if cache.length(name)
    ]
    return names, [cache.length(name) for name in names], cache.num_free_pages, seen


def x(tokens: int, *more: int) -> Any:
    return np.random.default_rng(tokens).standard_normal((*more, 1, tokens, 4)).astype(np.float32)


def paged() -> Any:
    cache = sa.PagedKVCache(5, 2, 1, 4)
    first = cache.allocate()
    cache.append(first, x(5), x(5))
    cache.fork(first)
    return cache


def windowed() -> Any:
    cache = sa.PagedKVCache(5, 2, 1, 4, window=1)
    cache.append(cache.allocate(), x(5), x(5))
    return cache


def roomy() -> Any:
    cache = sa.PagedKVCache(2, 8, 1, 4)
    cache.append(cache.allocate(), x(5), x(5))
    return cache


def batch() -> Any:
    cache = sa.KVCache(3, 1, 4, 8)
    cache.append(x(5, 3), x(5, 3))
    return cache


CALLS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "allocate": (paged, lambda cache: cache.allocate()),
    "fork": (paged, lambda cache: cache.fork(0)),
    "truncate": (paged, lambda cache: cache.truncate(1, 2)),
    "free": (paged, lambda cache: cache.free(1)),
    "append": (paged, lambda cache: cache.append(1, x(2), x(2))),
    "append-in-place": (roomy, lambda cache: cache.append(0, x(2), x(2))),
    "out-of-sight": (windowed, lambda cache: cache.append(0, x(6), x(6))),
    "attend": (
        paged,
        lambda cache: sa.attention_with_kvcache(x(1, 2), cache, x(1, 2), x(1, 2), sequences=[1, 0]),
    ),
    "cascade": (
        paged,
        lambda cache: sa.attention_with_kvcache(x(1, 2), cache, x(1, 2), x(1, 2), sequences=[1, 0], cascade=True),
    ),
    "evict": (paged, lambda cache: cache.evict(1, [0, 3, 4])),
    "evict-in-place": (roomy, lambda cache: cache.evict(0, [0, 3, 4], True)),
    "batch-append": (batch, lambda cache: cache.append(x(2, 3), x(2, 3))),
    "batch-truncate": (batch, lambda cache: cache.truncate([1, 2, 3])),
    "batch-reorder": (batch, lambda cache: cache.reorder([2, 2, 0])),
    "batch-evict": (batch, lambda cache: cache.evict([[0, 1, 4], [0, 1, 2], [2, 3, -1]], True)),
}


@pytest.mark.one_isa
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("name", CALLS)
def test_an_exception_anywhere(name: str, error: type[BaseException]) -> None:
    make, call = CALLS[name]
    cache = make()
    before = everything(cache)
    call(cache)
    after, point = everything(cache), 1
    while True:
        cache = make()
        if not raise_at(point, error, lambda cache=cache: call(cache)):
            break
        found = everything(cache)
        # At the very end, when only the result is missing, the call may have taken effect.
        assert found in (before, after), point
        if found == before:
            call(cache)
            assert everything(cache)[1:] == after[1:], point
        point += 1
    assert point > 5


@pytest.mark.one_isa
def test_rows_after_a_failed_fork() -> None:
    cache = paged()
    for point in range(1, 200):
        raise_at(point, MemoryError, lambda: cache.fork(0))
        for name in cache.sequences[2:]:
            cache.free(name)
    twin = cache.fork(0)
    cache.free(0)
    cache.free(1)
    assert (cache.length(twin), cache.num_free_pages) == (5, 2)


@pytest.mark.parametrize("kind", ["paged", "ring"])
def test_a_step_on_a_full_cache_takes_what_is_out_of_sight(kind: str) -> None:
    cache: Any = sa.PagedKVCache(3, 1, 1, 4, window=0) if kind == "paged" else sa.KVCache(1, 1, 4, 3, window=0)
    own = (cache.allocate(),) if kind == "paged" else ()
    for step in range(5):
        k = x(2) + step
        cache.append(*own, *((k, k) if own else (k[None], k[None])))
    with pytest.raises((MemoryError, ValueError)):
        cache.append(*own, *(((x(4), x(4))) if own else (x(4, 1), x(4, 1))))
    options = {"sequences": own} if own else {}
    assert np.array_equal(sa.attention_with_kvcache(x(1, 1), cache, window=(0, 0), **options)[0], (x(2) + 4)[:, 1:])


@pytest.mark.one_isa
@pytest.mark.parametrize("make", [batch, roomy, paged])
def test_lengths_after_an_interrupt_that_follows_the_commit(make: Callable[[], Any], monkeypatch: Any) -> None:
    cache = make()
    before, original = everything(cache), _core.append
    committed = []

    def then_interrupted(name: str, step: Any, k: Any, v: Any) -> None:
        original(name, step, k, v)
        committed.append(cache._ledger.state()[0] if make is batch else cache.length(0))
        raise KeyboardInterrupt

    monkeypatch.setattr(_core, "append", then_interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.append(x(1, 3), x(1, 3)) if make is batch else cache.append(0, x(1), x(1))
    assert np.all(committed[0] == 6)
    assert everything(cache) == before


@pytest.mark.one_isa
@pytest.mark.parametrize("make", [batch, roomy, paged])
def test_a_refused_call_leaves_the_call_before_it(make: Callable[[], Any]) -> None:
    cache = make()
    cache.append(x(1, 3), x(1, 3)) if make is batch else cache.append(0, x(1), x(1))
    before = everything(cache)
    refused = np.ones((3 if make is batch else 1, 1, 1, 4), np.int64)  # before the core reads the step
    options = {} if make is batch else {"sequences": [0]}
    for _ in range(2):
        with pytest.raises(TypeError, match="q has dtype int64"):
            sa.attention_with_kvcache(refused, cache, **options)
        assert everything(cache) == before


def test_a_failed_step_gives_reused_pages_back(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = sa.PagedKVCache(3, 1, 1, 4, window=0)
    name = cache.allocate()
    cache.append(name, x(3), x(3))
    original = _core.append

    def then_interrupted(*arguments: Any) -> None:
        original(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(_core, "append", then_interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.append(name, x(2), x(2))
    out = sa.attention_with_kvcache(x(3, 1), cache, sequences=[name], window=(0, 0))
    assert np.array_equal(out[0], x(3))
    cache.truncate(name, 1)
    assert (cache.length(name), cache.num_free_pages) == (1, 2)
