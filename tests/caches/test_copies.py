"""`copy` and `pickle` give independent objects that behave like the originals.

Copies of caches are bytes, whatever the instruction set.
"""

from __future__ import annotations

import copy
import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from copy_ways import ways

import selfattn as sa
from selfattn import reference

pytestmark = pytest.mark.one_isa
storage = pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16", "int8", "int4"])


def tokens(seed: int, *shape: int) -> tuple[Any, Any]:
    k, v = np.random.default_rng(seed).standard_normal((2, *shape)).astype(np.float32)
    return k, v


def answer(cache: Any, **options: Any) -> bytes:
    rows = len(options.get("sequences", range(3)))
    q = np.linspace(-1, 1, rows * 4 * 5, dtype=np.float64).reshape(rows, 4, 1, 5)
    window = None if cache.window is None else (cache.window, None)
    return sa.attention_with_kvcache(q, cache, window=window, **options).tobytes()


@ways
@storage
@pytest.mark.parametrize("window", [None, 3])
def test_a_cache_and_its_copy_are_equal_and_independent(way: Any, dtype: str, window: int | None) -> None:
    cache = sa.KVCache(3, 2, 5, 12, dtype=dtype, window=window)
    for seed in range(3):
        cache.append(*tokens(seed, 3, 2, 4, 5))
    cache.truncate([12, 11, 12])
    before = answer(cache)
    twin = way(cache)
    assert (repr(twin), twin.lengths.tolist(), answer(twin)) == (repr(cache), [12, 11, 12], before)
    for both in (cache, twin):
        both.truncate(11)
    more = tokens(9, 3, 2, 1, 5)
    twin.append(*more)
    assert cache.lengths.tolist() == [11] * 3
    cache.append(*tokens(8, 3, 2, 1, 5))
    assert answer(cache) != answer(twin)
    cache.truncate(11)
    cache.append(*more)
    assert answer(cache) == answer(twin)


@ways
@storage
def test_sequences_and_forks_of_a_copy(way: Any, dtype: str) -> None:
    cache = sa.PagedKVCache(12, 4, 2, 5, dtype=dtype)
    gone, first, empty = (cache.allocate() for _ in range(3))
    cache.append(gone, *tokens(0, 2, 9, 5))
    cache.append(first, *tokens(1, 2, 10, 5))
    fork = cache.fork(first)
    cache.free(gone)
    twin = way(cache)
    assert (twin.sequences, twin.num_free_pages) == ((first, empty, fork), cache.num_free_pages)
    assert [twin.length(name) for name in twin.sequences] == [10, 0, 10]
    assert answer(twin, sequences=[first, fork]) == answer(cache, sequences=[first, fork])
    assert twin.allocate() == cache.allocate() == 4
    for both in (cache, twin):
        both.append(fork, *tokens(2, 2, 3, 5))  # a copy of the page that is shared
        assert (both.length(first), both.length(fork), both.num_free_pages) == (10, 13, 7)
    assert answer(twin, sequences=[first, fork]) == answer(cache, sequences=[first, fork])
    twin.free(first)
    assert cache.length(first) == 10


@ways
def test_pages_out_of_sight_in_a_copy(way: Any) -> None:
    cache = sa.PagedKVCache(4, 2, 2, 5, window=2)
    name = cache.allocate()
    for seed in range(5):
        cache.append(name, *tokens(seed, 2, 3, 5))
    twin = way(cache)
    assert twin.num_free_pages == cache.num_free_pages
    for both in (cache, twin):
        both.append(name, *tokens(9, 2, 3, 5))
    assert answer(twin, sequences=[name]) == answer(cache, sequences=[name])


@ways
def test_a_copy_owns_its_memory(way: Any, tmp_path: Path) -> None:
    path = tmp_path / "cache"
    memory = np.memmap(path, np.uint8, "w+", shape=(sa.KVCache.buffer_size(3, 2, 5, 12),))
    cache = sa.KVCache(3, 2, 5, 12, buffer=memory)
    cache.append(*tokens(0, 3, 2, 4, 5))
    twin = way(cache)
    before = memory.tobytes()
    twin.append(*tokens(1, 3, 2, 4, 5))
    assert not np.shares_memory(twin.k, memory)
    assert memory.tobytes() == before
    pages = sa.PagedKVCache(6, 2, 2, 5, buffer=bytearray(sa.PagedKVCache.buffer_size(6, 2, 2, 5)))
    assert not np.shares_memory(way(pages)._store.memory, pages._store.memory)


class Named(sa.KVCache):
    def __init__(self, name: Any, **options: Any) -> None:
        self.name = name
        super().__init__(1, 1, 3, 4, **options)
        self.me = self


class NamedPages(sa.PagedKVCache):
    pass


@ways
def test_a_subclass_keeps_its_attributes(way: Any) -> None:
    cache = Named(["a"], window=2)
    twin = way(cache)
    assert (type(twin), twin.name, twin.window) == (Named, ["a"], 2)
    assert (twin.name is cache.name) == (way is copy.copy)
    assert twin.me is (cache if way is copy.copy else twin)
    assert twin._store is not cache._store
    pages = NamedPages(4, 2, 1, 3)
    pages.name = "b"  # type: ignore[attr-defined]
    assert way(pages).name == "b"


def test_plain_caches_have_no_attributes_of_others() -> None:
    for cache in (sa.KVCache(1, 1, 3, 4), sa.PagedKVCache(4, 2, 1, 3)):
        assert cache._foreign() == {}
        assert set(vars(cache)) == {*cache._made_with, *cache._made}
        assert "attributes" not in cache.__getstate__()


def test_a_pickle_holds_what_is_held() -> None:
    cache = sa.KVCache(1, 1, 64, 10_000)
    cache.append(*tokens(0, 1, 1, 10, 64))
    assert len(pickle.dumps(cache)) < 20_000
    pages = sa.PagedKVCache(1000, 16, 1, 64)
    pages.append(pages.allocate(), *tokens(0, 1, 20, 64))
    assert len(pickle.dumps(pages)) < 40_000


@pytest.mark.parametrize("way", [copy.deepcopy, pickle.dumps])
def test_a_copy_waits_for_an_append(way: Any) -> None:
    cache = sa.KVCache(1, 1, 4, 8)
    made: list[Any] = []
    with cache._lock.writing:
        thread = threading.Thread(target=lambda: made.append(way(cache)))
        thread.start()
        thread.join(0.1)
        assert not made
    thread.join(10)
    assert made


def batch_state(**changes: Any) -> Any:
    cache = sa.KVCache(2, 1, 3, 4)
    cache.append(*tokens(0, 2, 1, 2, 3))
    state = cache.__getstate__()
    contents = state["contents"]
    return {**state, "contents": {**contents, **{n: f(contents[n]) for n, f in changes.items()}}}


def paged_state(**changes: Any) -> Any:
    cache = sa.PagedKVCache(4, 2, 1, 3)
    cache.append(cache.allocate(), *tokens(0, 1, 3, 3))
    state = cache.__getstate__()
    contents = state["contents"]
    return {**state, "contents": {**contents, **{n: f(contents[n]) for n, f in changes.items()}}}


BAD_BATCH: list[Any] = [
    None, [], {}, {"version": 2}, {"version": 1}, {**batch_state(), "contents": {}},
    *(batch_state(lengths=lambda _, n=n: np.array([n, 2])) for n in (-1, 5, 1 << 62)),
    batch_state(lengths=lambda x: x.tolist()), batch_state(lengths=lambda x: x.astype(np.int32)),
    batch_state(lengths=lambda x: x[:1]), batch_state(starts=lambda x: x + 1), batch_state(starts=lambda x: x - 1),
    batch_state(tokens=lambda x: x[:1]), batch_state(tokens=lambda x: [y[:, :, :1] for y in x]),
    batch_state(tokens=lambda x: [y.astype(np.float64) for y in x]), batch_state(tokens=lambda x: [None, None]),
    batch_state(tokens=tuple), {**batch_state(), "attributes": None}, {**batch_state(), "attributes": {"_ledger": ()}},
]  # fmt: skip
BAD_PAGED: list[Any] = [
    None, {"version": 0}, {**paged_state(), "contents": {}},
    *(paged_state(sequences=lambda _, x=x: x) for x in (
        None, {0: (3, 0, [0, 4])}, {0: (3, 0, [0, -1])}, {0: (3, 0, [0, 0])}, {0: (3, 0, [0])}, {0: (3, 0, [0, 2])},
        {0: (3, 0, [0, 1 << 40])}, {0: (5, 0, [0, 1])}, {0: (-1, 0, [])}, {0: (3, 2, [1])}, {0: (3, 0)}, {0: None},
        {1: (3, 0, [0, 1])}, {-1: (0, 0, [])}, {"0": (0, 0, [])}, {0: (3.0, 0, [0, 1])}, {0: (3, 0, ["0", 1])},
        {0: (1 << 62, 0, [0, 1])},
    )),
    *(paged_state(next=lambda _, x=x: x) for x in (None, 0, -1, 1.0, True)),
    *(paged_state(pages=lambda _, x=x: np.array(x)) for x in ([0, 4], [0, 0], [-1, 0], [0.0, 1.0], [[0], [1]])),
    paged_state(tokens=lambda x: [y[:1] for y in x]), paged_state(tokens=lambda x: [y[..., :1] for y in x]),
]  # fmt: skip


@pytest.mark.parametrize("state", BAD_BATCH)
def test_a_damaged_pickle_is_refused(state: Any) -> None:
    with pytest.raises(ValueError, match=r"^KVCache: the pickle"):
        sa.KVCache.__new__(sa.KVCache).__setstate__(state)


@pytest.mark.parametrize("state", BAD_PAGED)
def test_a_damaged_pickle_of_pages_is_refused(state: Any) -> None:
    with pytest.raises(ValueError, match=r"^PagedKVCache: the pickle"):
        sa.PagedKVCache.__new__(sa.PagedKVCache).__setstate__(state)


def test_a_pickle_with_other_arguments_is_refused() -> None:
    state = batch_state()
    for name, value in {"batch": 0, "dtype": "int7", "capacity": -1, "surprise": 1}.items():
        with pytest.raises((ValueError, TypeError)):
            sa.KVCache.__new__(sa.KVCache).__setstate__({**state, "arguments": {**state["arguments"], name: value}})


@ways
def test_what_else_is_public(way: Any) -> None:
    for rope in (sa.RoPE(500.0, 4, True), sa.RoPE(inv_freq=[0.3, 0.1], attention_scaling=1.5, axes=[0, 1])):
        sa.apply_rope(np.ones((2, 4)), rope=rope)
        assert way(rope) == rope
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 2, 9, 4))
    explanation = sa.explain(q, k, v)
    assert (way(explanation), str(way(explanation))) == (explanation, str(explanation))
    result = reference.attention(q, k, v)
    assert all(np.array_equal(a, b) for a, b in zip(way(result), result, strict=True))
    assert type(way(result)) is type(result)
    bias = sa.T5Bias(rng.standard_normal((32, 2)), bidirectional=False, max_distance=1 << 20)
    assert np.array_equal(sa.attention(q, k, v, t5=way(bias)), sa.attention(q, k, v, t5=bias))
    assert len(pickle.dumps(bias)) < 2000
