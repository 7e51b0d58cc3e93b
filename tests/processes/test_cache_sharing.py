"""One buffer, several processes: opened by others, left by killed ones, opened with another description."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache_child import BATCH, DIM, HEADS, KINDS, append, length, open_cache, size_of, tokens
from cache_model import quantised
from places import SUPPORT

import selfattn as sa

START = f"import sys; sys.path.insert(0, {str(SUPPORT)!r}); import cache_child, cache_damage; "
KILLS = int(os.environ.get("SELFATTN_CACHE_KILLS", "15"))  # of each kind
# JAX warns of every fork if another test has imported it.
forking = pytest.mark.filterwarnings("ignore:os.fork")
posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and signals")


def check_tokens(cache: sa.KVCache, first: int = 0) -> None:
    """Check that every token from `first` up to the lengths has the contents that its number determines."""
    slots = np.arange(first, length(cache)) % cache.capacity
    for stored, scales, expected in zip(
        (cache.k, cache.v), (cache.k_scales, cache.v_scales), tokens(first, len(slots)), strict=True
    ):
        if scales is None:
            assert np.array_equal(stored[:, :, slots], expected)
        else:
            codes, expected_scales = quantised(expected)
            assert np.array_equal(stored[:, :, slots], codes)
            assert np.array_equal(scales[:, :, slots], expected_scales)


def oldest(cache: sa.KVCache) -> int:
    """Return the first of the tokens that the next one sees."""
    return 0 if cache.window is None else max(length(cache) - cache.window, 0)


@pytest.fixture
def shared() -> Iterator[Callable[[int], shared_memory.SharedMemory]]:
    blocks = []

    def make(size: int) -> shared_memory.SharedMemory:
        blocks.append(shared_memory.SharedMemory(create=True, size=size))
        return blocks[-1]

    yield make
    for block in blocks:
        with contextlib.suppress(BufferError):  # the frames of a failed test still hold the cache
            block.close()
        block.unlink()


@pytest.mark.parametrize("kind", KINDS)
def test_another_process_goes_on(kind: str, shared: Any, run_python: Any) -> None:
    block = shared(size_of(kind))
    cache = open_cache(kind, block.buf)
    append(cache, 5)
    for step in range(1, 4):
        total = 5 + 401 * step - 1
        assert int(run_python(START + f"cache_child.append_to_shared({block.name!r}, {kind!r}, 400)")) == total
        # The first object sees what the other process wrote, and so does one that is opened now.
        for seen in (cache, open_cache(kind, block.buf)):
            assert length(seen) == total
            check_tokens(seen, oldest(seen))
        append(cache, 1)
    del cache, seen


@posix
@forking
@pytest.mark.parametrize("kind", KINDS)
def test_fork_shares_what_is_shared_and_nothing_else(kind: str, shared: Any) -> None:
    block = shared(size_of(kind))
    own, common = open_cache(kind, None), open_cache(kind, block.buf)
    for cache in (own, common):
        append(cache, 20)
    child = os.fork()
    if child == 0:
        try:
            for cache in (own, common):
                append(cache, 30)
                check_tokens(cache)
            os._exit(0 if length(own) == length(common) == 50 else 1)
        except BaseException as error:
            print("child:", repr(error), file=sys.stderr)
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert length(own) == 20
    assert length(common) == 50
    for cache in (own, common):
        check_tokens(cache)
        append(cache, 1)
        check_tokens(cache)
    del own, common, cache


@posix
@forking
def test_fork_gives_each_process_its_own_pages(normal: Any) -> None:
    cache = sa.PagedKVCache(8, 4, 1, 4)
    k, v = normal(2, 1, 9, 4)
    name = cache.allocate()
    cache.append(name, k, v)
    q = normal(1, 1, 1, 4)
    expected = sa.attention_with_kvcache(q, cache, sequences=[name])
    child = os.fork()
    if child == 0:
        cache.append(name, k, v)
        twin = cache.fork(name)
        cache.free(name)
        os._exit(0 if (cache.length(twin), cache.num_free_pages) == (18, 3) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (cache.length(name), cache.num_free_pages, cache.sequences) == (9, 5, (name,))
    assert np.array_equal(sa.attention_with_kvcache(q, cache, sequences=[name]), expected)


def check_what_truncate_leaves(kind: str, memory: Any) -> None:
    """At every length to which a cache can be truncated, it holds what the next token sees."""
    total, accepted = length(open_cache(kind, memory.copy())), 0
    for shorter in range(total, max(total - 800, -1), -7):
        cache = open_cache(kind, memory.copy())
        try:
            cache.truncate(shorter)
        except ValueError:  # of a ring: these tokens are gone
            assert cache.window is not None
            continue
        check_tokens(cache, oldest(cache))
        accepted += 1
    assert accepted


@posix
@pytest.mark.parametrize("kind", KINDS)
def test_killed_while_appending(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "cache"
    memory = np.memmap(path, np.uint8, "w+", shape=(size_of(kind),))
    append(open_cache(kind, memory), 1)
    rng, met = np.random.default_rng(5), set()
    for seed in range(KILLS):
        code = START + f"cache_child.append_without_end({str(path)!r}, {kind!r}, {seed})"
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=tmp_path) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == b"ready\n"
            time.sleep(float(rng.uniform(0, 0.05)))
            child.send_signal(signal.SIGKILL)
            child.wait(20)
        cache = open_cache(kind, memory)
        check_tokens(cache, oldest(cache))
        check_what_truncate_leaves(kind, np.asarray(memory))
        met.add(length(cache))
        if cache.window is not None or length(cache) < cache.capacity:
            append(cache, 1)
        check_tokens(cache, oldest(cache))
    assert len(met) > KILLS // 2  # otherwise it was killed outside the loop


SHAPE = (BATCH, HEADS, DIM, KINDS["plain"]["capacity"])
OTHERS: list[Callable[[Any], Any]] = [
    *(
        lambda b, axis=axis: sa.KVCache(*(max(n // 2, 1) if i == axis else n for i, n in enumerate(SHAPE)), buffer=b)
        for axis in range(4)
    ),
    *(
        lambda b, named=named: sa.KVCache(*SHAPE, buffer=b, **named)
        for named in ({"dtype": "float16"}, {"dtype": "int8"}, {"dtype": "bfloat16"}, {"value_dim": 3}, {"window": 5})
    ),
]


@pytest.mark.parametrize("which", range(len(OTHERS)))
def test_a_buffer_of_another_description_is_refused(which: int) -> None:
    buffer = np.zeros(2 * size_of("plain"), np.uint8)
    append(open_cache("plain", buffer), 7)
    before = buffer.tobytes()
    with pytest.raises(ValueError, match=r"^KVCache: buffer holds "):
        OTHERS[which](buffer)
    assert buffer.tobytes() == before
    check_tokens(open_cache("plain", buffer))


@pytest.mark.parametrize("kind", [*KINDS, "paged"])
def test_a_buffer_that_will_not_do_is_refused(kind: str, tmp_path: Path) -> None:
    size = sa.PagedKVCache.buffer_size(10, 4, 1, 4) if kind == "paged" else size_of(kind)
    path = tmp_path / "file"
    path.write_bytes(bytes(size))
    bad: list[Any] = [
        np.zeros(size - 1, np.uint8), b"", bytes(size), np.memmap(path, np.uint8, "r"), "x" * size, size, 1.5, [0] * 9,
        memoryview(bytearray(size)).toreadonly(), np.zeros(2 * size, np.uint8)[::2], np.zeros(size + 9, np.uint8)[1:],
        np.array([None] * size),
    ]  # fmt: skip
    if kind != "paged":  # whose buffer holds only tokens
        bad += [np.full(size, 0x5A, np.uint8), np.random.default_rng(0).integers(0, 256, size).astype(np.uint8)]
    for buffer in bad:
        plain = isinstance(buffer, np.ndarray) and buffer.dtype == np.uint8
        before = buffer.tobytes() if plain else b""
        with pytest.raises((ValueError, TypeError, BufferError), match=r"^(Paged)?KVCache: buffer "):
            sa.PagedKVCache(10, 4, 1, 4, buffer=buffer) if kind == "paged" else open_cache(kind, buffer)
        assert not plain or buffer.tobytes() == before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory as Linux does")
@pytest.mark.parametrize("window", [None, 3])
def test_a_damaged_header_never_crashes(window: int | None, run_python: Any) -> None:
    run_python(START + f"cache_damage.run({window})")


@pytest.mark.parametrize("kind", KINDS)
def test_any_writeable_buffer_will_do(kind: str) -> None:
    size = size_of(kind)
    buffers: list[Any] = [bytearray(size + 100), memoryview(bytearray(size)), np.zeros(size // 4 + 1, np.float32)]
    buffers += [np.zeros((2, size), np.int8), np.zeros(size + 64, np.uint8)[8:]]
    for buffer in buffers:
        append(open_cache(kind, buffer), 33)
        again = open_cache(kind, buffer)
        assert length(again) == 33
        check_tokens(again)


def test_views_outlive_their_cache() -> None:
    cache = open_cache("plain", None)
    append(cache, 3)
    k, held = cache.k, cache.lengths
    del cache
    junk = [np.full(size_of("plain"), 1, np.uint8) for _ in range(4)]
    assert np.array_equal(k[:, :, :3], tokens(0, 3)[0])
    assert held.tolist() == [3] * BATCH
    assert len(junk) == 4
