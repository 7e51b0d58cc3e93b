"""Many threads on one cache: no torn result, no deadlock, and a failing call does not block the others."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import selfattn as sa

KINDS = ["contiguous", "paged"]
HEADS, DIM, CAPACITY = 2, 32, 280


def run_all(workers: list[Callable[[], None]], seconds: float = 60) -> None:
    """Run each in a thread; fail if one of them raises or does not end."""
    failures: list[BaseException] = []

    def guard(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guard, args=(work,), daemon=True) for work in workers]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(deadline - time.monotonic(), 0))
    if failures:
        raise failures[0]
    assert not any(thread.is_alive() for thread in threads), "deadlock"


class Subject:
    """A cache whose rows hold the first tokens of one of two texts: its length and the text determine everything."""

    def __init__(self, kind: str, rng: Any, dtype: str) -> None:
        self.batch = 2 if kind == "contiguous" else 1
        self.texts = rng.standard_normal((2, 2, self.batch, HEADS, CAPACITY, DIM)).astype(np.float32)
        self.text = 0
        self.cache: Any
        self.asked: dict[str, Any] = {}
        if kind == "contiguous":
            self.cache = sa.KVCache(self.batch, HEADS, DIM, CAPACITY, dtype=dtype)
        else:
            self.cache = sa.PagedKVCache(CAPACITY // 8, 8, HEADS, DIM, dtype=dtype)
            self.asked["sequences"] = [self.cache.allocate()]

    def length(self) -> int:
        return int(self.cache.length(*self.asked["sequences"]) if self.asked else self.cache.lengths[-1])

    def clear(self) -> None:
        """Begin the other text."""
        self.cache.truncate(*self.asked.get("sequences", []), 0)
        self.text = 1 - self.text

    def new(self, count: int) -> Any:
        at = self.length()
        return self.texts[self.text, :, :, :, at : at + count]

    def attend(self, q: Any, *new: Any, **options: Any) -> Any:
        return sa.attention_with_kvcache(q, self.cache, *new, **self.asked, **options)


@pytest.fixture
def switching() -> Iterator[None]:
    """Make Python switch threads often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("switching")
@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("kind", KINDS)
def test_readers_never_see_half_a_change(kind: str, rng: Any, dtype: str) -> None:
    subject = Subject(kind, rng, dtype)
    q = rng.standard_normal((subject.batch, 8 * HEADS, 1, DIM)).astype(np.float32)
    known = {subject.attend(q).tobytes(): (0, 0)}
    for text in range(2):
        while subject.length() < CAPACITY:
            answer = subject.attend(q, *subject.new(1)).tobytes()
            known[answer] = (text, subject.length())
        subject.clear()
    assert len(known) == 2 * CAPACITY + 1
    history, done, over = [(0, 0)], [0], threading.Event()
    reads, torn = [0] * 4, []

    def write() -> None:
        order = np.random.default_rng(1)
        for _ in range(600):
            count, length = int(order.choice([1, 2, 100, 200])), subject.length()
            fits = length + count <= CAPACITY
            history.append((subject.text, length + count) if fits else (0, 0))
            if fits:
                subject.attend(q.repeat(count, axis=2), *subject.new(count), num_threads=1)
            else:
                subject.clear()
            done[0] = len(history) - 1
        over.set()

    def read(which: int) -> None:
        while not over.is_set():
            first = done[0]
            answer = subject.attend(q, num_threads=1 + which % 2).tobytes()
            allowed = history[first : len(history)]
            reads[which] += 1
            if known.get(answer) not in allowed:
                torn.append((known.get(answer), allowed))
                return

    run_all([write, *((lambda which=which: read(which)) for which in range(4))])
    assert torn == []
    assert sum(reads) > 20


def test_tokens_of_many_writers_are_all_there() -> None:
    writers, each = 6, 40
    cache = sa.KVCache(1, 1, 4, writers * each)
    start = threading.Barrier(writers)

    def write(which: int) -> None:
        start.wait(30)
        for i in range(each):
            x = np.full((1, 1, 1, 4), which * each + i, np.float32)
            if i % 2:
                sa.attention_with_kvcache(x, cache, x, -x, num_threads=1)
            else:
                cache.append(x, -x)

    run_all([lambda which=which: write(which) for which in range(writers)])  # type: ignore[misc]
    assert cache.lengths.tolist() == [writers * each]
    held = cache.k[0, 0]
    assert np.array_equal(np.sort(held[:, 0]), np.arange(writers * each))
    assert (held == held[:, :1]).all()
    assert np.array_equal(cache.v[0, 0], -held)
    for which in range(writers):  # each in the order in which its thread wrote
        own = held[held[:, 0] // each == which, 0]
        assert np.array_equal(own, np.sort(own))


def test_sequences_of_many_threads_do_not_mix(rng: Any) -> None:
    threads, rounds, page = 6, 30, 4
    cache = sa.PagedKVCache(threads * 24, page, 1, 4)
    start = threading.Barrier(threads)

    def work(which: int) -> None:
        order = np.random.default_rng(which)
        start.wait(30)
        for i in range(rounds):
            name, value = cache.allocate(), np.float32(which * rounds + i + 1)
            x = np.full((1, int(order.integers(1, 30)), 4), value)
            cache.append(name, x, x)
            twin = cache.fork(name)
            cache.append(twin, 2 * x[:, :1], 2 * x[:, :1])
            cache.truncate(name, x.shape[1] - 1)
            q = np.zeros((2, 1, 1, 4), np.float32)
            new = np.full((2, 1, 1, 4), value)
            out = sa.attention_with_kvcache(q, cache, new, new, sequences=[name, twin], num_threads=1)
            count = x.shape[1] + 2
            assert abs(out[0] - value).max() <= 1e-6 * value
            assert abs(out[1] - value * (count + 1) / count).max() <= 1e-6 * value
            cache.free(name)
            cache.free(twin)

    run_all([lambda which=which: work(which) for which in range(threads)])  # type: ignore[misc]
    assert cache.num_free_pages == threads * 24
    assert len(cache.sequences) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_that_fails_lets_go(kind: str, rng: Any) -> None:
    subject = Subject(kind, rng, "float32")
    q, new = np.ones((subject.batch, HEADS, 3, DIM), np.float32), subject.new(3)
    read_only = np.broadcast_to(np.float32(0), q.shape)
    many = np.ones((subject.batch, HEADS, CAPACITY + 40, DIM), np.float32)
    attempts: list[Callable[[], Any]] = [
        lambda: subject.attend(q[:0], *new),
        lambda: subject.attend(q, new[0]),
        lambda: subject.attend(q, *new, out=read_only),
        lambda: subject.attend(q, *new, out=q[:, :1]),
        lambda: subject.attend(q, *new, softcap=-1.0),
        lambda: subject.attend(q, *new, mask=np.ones((2, 2), bool)),
        lambda: subject.attend(q, *new, num_threads=-1),
        lambda: subject.attend(many, many, many),
        lambda: subject.attend("q", *new),
        lambda: subject.attend(q, *new, nonsense=1),
    ]
    if kind == "contiguous":
        attempts += [lambda: subject.cache.append(many, many), lambda: subject.cache.truncate(9)]
        attempts += [lambda: subject.cache.reorder([5, 6]), lambda: subject.cache.append(None, None)]
    else:
        name = subject.asked["sequences"][0]
        attempts += [lambda: subject.cache.append(name, many[0], many[0]), lambda: subject.cache.truncate(name, 9)]
        attempts += [lambda: subject.cache.fork(99), lambda: subject.cache.append(name, many[0], many[0])]
    for attempt in attempts:
        with pytest.raises((TypeError, ValueError, MemoryError)):
            attempt()
        assert subject.length() == 0
        # Another thread: one that already holds a lock might take it again.
        run_all([lambda: subject.attend(q, *new), lambda: subject.attend(q)], seconds=10)
        assert subject.length() == 3
        subject.clear()


@pytest.mark.uncounted
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kind", KINDS)
def test_fork_while_others_are_inside(kind: str, run_python: Any) -> None:
    # In the child the thread that held the lock does not exist, so the lock must not stay locked for ever.
    made = "sa.KVCache(1, 2, 16, 4000)" if kind == "contiguous" else "sa.PagedKVCache(300, 16, 2, 16)"
    asked = "{}" if kind == "contiguous" else "{'sequences': [cache.allocate()]}"
    run_python(
        f"""
        import faulthandler, os, threading, warnings
        import numpy as np
        import selfattn as sa

        warnings.simplefilter("ignore")
        cache = {made}
        asked = {asked}
        x = np.ones((1, 2, 1, 16), np.float32)
        # NumPy's first call imports a module, which must not happen during a fork.
        sa.attention_with_kvcache(x, cache, **asked)
        over = threading.Event()

        def work():
            for _ in range(3500):
                if not over.is_set():
                    sa.attention_with_kvcache(x, cache, x, x, num_threads=1, **asked)

        def read():
            while not over.is_set():
                sa.attention_with_kvcache(x, cache, num_threads=1, **asked)

        threads = [threading.Thread(target=f) for f in (work, read, read)]
        for thread in threads:
            thread.start()
        codes = []
        for _ in range(25):
            child = os.fork()
            if child == 0:
                faulthandler.dump_traceback_later(20, exit=True)
                out = sa.attention_with_kvcache(x, cache, x, x, **asked)
                os._exit(0 if abs(out - 1).max() < 1e-6 else 3)
            codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            if codes[-1]:
                break
        over.set()
        for thread in threads:
            thread.join()
        assert not any(codes), codes
        """
    )


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="sends SIGINT as Linux does")
@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_call_leaves_the_cache_as_it_was(kind: str, run_python: Any) -> None:
    made = "sa.KVCache(1, 4, 64, 12_000)" if kind == "contiguous" else "sa.PagedKVCache(800, 16, 4, 64)"
    run_python(
        f"""
        import os, signal, threading
        import numpy as np
        import selfattn as sa

        signal.signal(signal.SIGINT, signal.default_int_handler)
        cache = {made}
        paged = isinstance(cache, sa.PagedKVCache)
        asked = {{"sequences": [cache.allocate()]}} if paged else {{}}
        x = np.ones((1, 4, 5000, 64), np.float32)
        q = np.ones((1, 64, 5000, 64), np.float32)
        if paged:
            cache.append(asked["sequences"][0], x[0], x[0])
        else:
            cache.append(x, x)
        length = (lambda: cache.length(asked["sequences"][0])) if paged else (lambda: int(cache.lengths[0]))
        for delay in (0.05, 0.15, 0.4):
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT)).start()
            try:
                sa.attention_with_kvcache(q, cache, x, x, num_threads=1, **asked)
                raise AssertionError("too fast to be interrupted")
            except KeyboardInterrupt:
                pass
            assert length() == 5000
        one = np.ones((1, 4, 1, 64), np.float32)
        assert abs(sa.attention_with_kvcache(one, cache, one, one, **asked) - 1).max() < 1e-6
        assert length() == 5001
        """
    )
