"""One buffer, several processes: opened by others, left by the dead, described by something else."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any

import cache_child
import numpy as np
import pytest
from cache_child import BATCH, CAPACITY, DIM, HEADS, PAGE, PAGES, append, batch, tokens
from cache_model import read_through_attention

import selfattn as sa

KINDS = ["contiguous", "paged"]
START = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import cache_child; "
KILLS = int(os.environ.get("SELFATTN_CACHE_KILLS", "20"))  # of each kind
posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and signals")


def size_of(kind: str) -> int:
    if kind == "contiguous":
        return int(sa.KVCache.buffer_size(BATCH, HEADS, DIM, CAPACITY))
    return int(sa.PagedKVCache.buffer_size(PAGES, PAGE, HEADS, DIM))


def open_cache(kind: str, buffer: Any) -> Any:
    return cache_child.open_contiguous(buffer) if kind == "contiguous" else cache_child.open_paged(buffer)


def new_cache(kind: str, buffer: Any) -> Any:
    cache = open_cache(kind, buffer)
    if kind == "paged":
        cache.allocate()
    return cache


def lengths(cache: Any) -> list[int]:
    if isinstance(cache, sa.KVCache):
        return [int(n) for n in cache.lengths]
    return [cache.length(name) for name in cache.sequences]


def check_tokens(cache: Any) -> None:
    """Every token below the lengths is what its number says, and no page is lost."""
    found: list[tuple[int, Any, Any]] = []
    if isinstance(cache, sa.KVCache):
        found = [(n, cache.k[b, :, :n], cache.v[b, :, :n]) for b, n in enumerate(lengths(cache))]
    else:
        for name in cache.sequences:
            k, v = read_through_attention(cache, cache.length(name), sequences=[name])
            found.append((cache.length(name), -v[0], v[0]))  # keys come through lse, not to the last bit
            assert np.all(abs(k[0] + v[0]) <= 2.0**-20 * abs(v[0]))
    for length, k, v in found:
        expected = tokens(0, length)
        assert np.array_equal(k, expected[0])
        assert np.array_equal(v, expected[1])


@pytest.fixture
def shared() -> Iterator[Any]:
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
    cache = new_cache(kind, block.buf)
    append(cache, 5)
    for step in range(1, 4):
        printed = run_python(START + f"cache_child.append_to_shared({block.name!r}, {kind!r}, 40)")
        assert int(printed) == 5 + 41 * step - 1
        # The first object sees what the other process wrote, and so does one that is opened now.
        for seen in (cache, open_cache(kind, block.buf)):
            assert set(lengths(seen)) == {5 + 41 * step - 1}
            check_tokens(seen)
        append(cache, 1)
    del cache, seen


@posix
@pytest.mark.parametrize("kind", KINDS)
def test_fork_shares_what_is_shared_and_nothing_else(kind: str, shared: Any) -> None:
    block = shared(size_of(kind))
    own, common = new_cache(kind, None), new_cache(kind, block.buf)
    for cache in (own, common):
        append(cache, 20)
    child = os.fork()
    if child == 0:
        try:
            for cache in (own, common):
                append(cache, 30)
                check_tokens(cache)
            os._exit(0 if lengths(own)[0] == lengths(common)[0] == 50 else 1)
        except BaseException as error:
            print("child:", repr(error), file=sys.stderr)
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert lengths(own)[0] == 20
    assert lengths(common)[0] == 50
    for cache in (own, common):
        check_tokens(cache)
        append(cache, 1)
        check_tokens(cache)
    del own, common, cache


@posix
@pytest.mark.parametrize("kind", KINDS)
def test_killed_while_appending(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "cache"
    memory = np.memmap(path, np.uint8, "w+", shape=(size_of(kind),))
    if kind == "paged":
        open_cache(kind, memory).allocate()
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
        check_tokens(cache)
        met.add(lengths(cache)[0])
        if kind == "paged":
            for name in cache.sequences[1:]:  # a fork that nobody freed any more
                cache.free(name)
            assert cache.num_free_pages == PAGES - -(-lengths(cache)[0] // PAGE)
        if lengths(cache)[0] + PAGE < CAPACITY:
            append(cache, 1)
        check_tokens(cache)
    assert len(met) > KILLS // 2  # else it died somewhere else than in the loop


def other_descriptions(kind: str) -> list[Any]:
    if kind == "contiguous":
        shape, make = (BATCH, HEADS, DIM, CAPACITY), sa.KVCache
    else:
        shape, make = (PAGES, PAGE, HEADS, DIM), sa.PagedKVCache
    shapes = [tuple(max(n // 2, 1) if i == axis else n for i, n in enumerate(shape)) for axis in range(4)]
    named: list[dict[str, Any]] = [{"dtype": "float16"}, {"dtype": "int8"}, {"value_dim": 3}, {"window": 5}]
    return [lambda b, s=s: make(*s, buffer=b) for s in shapes] + [
        lambda b, n=n: make(*shape, buffer=b, **n) for n in named
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_buffer_of_another_description_is_refused(kind: str) -> None:
    buffer = np.zeros(2 * size_of(kind), np.uint8)
    append(new_cache(kind, buffer), 7)
    before = buffer.tobytes()
    others = other_descriptions(kind)
    others.append(lambda b: open_cache(KINDS[1 - KINDS.index(kind)], b))
    for make in others:
        with pytest.raises(ValueError, match=r"^(Paged)?KVCache: .*buffer"):
            make(buffer)
        assert buffer.tobytes() == before
    check_tokens(open_cache(kind, buffer))


@pytest.mark.parametrize("kind", KINDS)
def test_a_buffer_that_will_not_do_is_refused(kind: str, tmp_path: Path) -> None:
    size = size_of(kind)
    path = tmp_path / "file"
    path.write_bytes(bytes(size))
    bad: list[tuple[Any, type[Exception] | tuple[type[Exception], ...]]] = [
        (np.zeros(size - 1, np.uint8), ValueError),
        (b"", (ValueError, BufferError, TypeError)),
        (bytes(size), (ValueError, BufferError, TypeError)),
        (np.memmap(path, np.uint8, "r"), (ValueError, BufferError)),
        (memoryview(bytearray(size)).toreadonly(), (ValueError, BufferError, TypeError)),
        (np.zeros(2 * size, np.uint8)[::2], (ValueError, BufferError)),
        ("x" * size, TypeError),
        (size, TypeError),
        (np.full(size, 0x5A, np.uint8), ValueError),
        (np.random.default_rng(0).integers(0, 256, size).astype(np.uint8), ValueError),
    ]
    for buffer, exceptions in bad:
        before = bytes(buffer) if isinstance(buffer, np.ndarray) else None
        with pytest.raises(exceptions, match=r"^(Paged)?KVCache: .*buffer"):
            open_cache(kind, buffer)
        assert before is None or bytes(buffer) == before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory as Linux does")
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_header_never_crashes(kind: str, run_python: Any) -> None:
    run_python(START.replace("cache_child", "cache_damage") + f"cache_damage.run({kind!r})")


@pytest.mark.parametrize("kind", KINDS)
def test_any_writeable_buffer_will_do(kind: str) -> None:
    size = size_of(kind)
    whole = np.zeros(size + 64, np.uint8)
    at = -whole.ctypes.data % 64
    buffers = [bytearray(size + 100), memoryview(bytearray(size)), np.zeros(size // 4 + 1, np.float32)]
    buffers += [np.zeros((2, size), np.int8), whole[at : at + size]]
    for buffer in buffers:
        cache = new_cache(kind, buffer)
        append(cache, 33)
        del cache
        cache = open_cache(kind, buffer)
        assert set(lengths(cache)) == {33}
        check_tokens(cache)


def test_views_outlive_their_cache() -> None:
    cache = sa.KVCache(BATCH, HEADS, DIM, CAPACITY)
    cache.append(*batch(0, 3))
    k, held = cache.k, cache.lengths
    del cache
    junk = [np.full(size_of("contiguous"), 1, np.uint8) for _ in range(4)]
    assert np.array_equal(k[1, :, :3], tokens(0, 3)[0])
    assert held.tolist() == [3] * BATCH
    assert len(junk) == 4
