"""Random calls on caches, again and again: `python soak_caches.py OPERATIONS` prints how much memory they leak.

Every result is checked: n determines the contents of token n of every sequence, so lengths determine everything.
"""

from __future__ import annotations

import gc
import resource
import sys
from pathlib import Path
from typing import Any

import numpy as np

import selfattn as sa

HEADS, DIM, CAPACITY, PAGES, PAGE = 2, 8, 96, 48, 8
DTYPES = ["float32", "float16", "bfloat16", "int8", "int4"]
ENOUGH = 8  # live sequences


def resident() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text(encoding="utf8").split()[1]) * resource.getpagesize()


class Soak:
    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.k, self.v = self.rng.standard_normal((2, 1, HEADS, CAPACITY + 8, DIM)).astype(np.float32)
        self.q = self.rng.standard_normal((1, HEADS, 4, DIM)).astype(np.float32)
        # Values of magnitude 1 to 2 make a wrong token differ clearly from a rounded one.
        self.v += np.sign(self.v)
        self.renew()

    def renew(self) -> None:
        """Start with new caches of some storage type."""
        self.dtype = DTYPES[int(self.rng.integers(len(DTYPES)))]
        self.cache = sa.KVCache(1, HEADS, DIM, CAPACITY, dtype=self.dtype)
        self.paged = sa.PagedKVCache(PAGES, PAGE, HEADS, DIM, dtype=self.dtype)
        self.length = 0
        self.lengths: dict[int, int] = {}
        # The result of queries that see only their own token: the stored values.
        whole = sa.KVCache(1, HEADS, DIM, CAPACITY, dtype=self.dtype)
        whole.append(self.k[:, :, :CAPACITY], self.v[:, :, :CAPACITY])
        self.expected = sa.attention_with_kvcache(self.zeros(CAPACITY), whole, window=(0, 0))

    def zeros(self, count: int) -> Any:
        return np.zeros((1, HEADS, count, DIM), np.float32)

    def run(self, count: int) -> None:
        actions = [self.contiguous] * 3 + [self.pages] * 6 + [self.bad]
        for _ in range(count):
            actions[int(self.rng.integers(len(actions)))]()
            if self.rng.random() < 0.002:
                self.renew()
        self.check()

    def new(self, at: int, count: int) -> tuple[Any, Any]:
        return self.k[:, :, at : at + count], self.v[:, :, at : at + count]

    def contiguous(self) -> None:
        count = int(self.rng.integers(0, 5))
        if self.length + count > CAPACITY or self.rng.random() < 0.05:
            self.length = int(self.rng.integers(0, self.length + 1))
            self.cache.truncate(self.length)
        elif self.rng.random() < 0.5:
            self.cache.append(*self.new(self.length, count))
            self.length += count
        elif count:
            new = self.new(self.length, count)
            sa.attention_with_kvcache(self.q[:, :, :count], self.cache, *new, num_threads=1)
            self.length += count
        assert self.cache.lengths[0] == self.length

    def pages(self) -> None:
        if len(self.lengths) < 2:
            self.lengths[self.paged.allocate()] = 0
        name = list(self.lengths)[int(self.rng.integers(len(self.lengths)))]
        step = int(self.rng.integers(10))
        if step < 5:
            self.append_pages(name, int(self.rng.integers(0, 20)))
        elif step == 5 and len(self.lengths) < ENOUGH:
            self.lengths[self.paged.fork(name)] = self.lengths[name]
        elif step == 6:
            self.lengths[name] = int(self.rng.integers(0, self.lengths[name] + 1))
            self.paged.truncate(name, self.lengths[name])
        elif step == 7:
            self.paged.free(name)
            del self.lengths[name]
        elif self.lengths[name]:
            self.check_pages(name)

    def append_pages(self, name: int, count: int) -> None:
        at = self.lengths[name]
        if at + count > CAPACITY:
            return
        free, new = self.paged.num_free_pages, self.new(at, count)
        try:
            if count % 2:
                self.paged.append(name, *(x[0] for x in new))
            elif count:
                sa.attention_with_kvcache(self.zeros(count), self.paged, *new, sequences=[name], num_threads=1)
            self.lengths[name] += count
        except MemoryError:
            assert self.paged.num_free_pages == free
            assert free <= count // PAGE + 2

    def check_pages(self, name: int) -> None:
        length = self.lengths[name]
        count = min(length, 9)
        options: dict[str, Any] = {"sequences": [name], "window": (0, 0), "num_threads": 1}
        out = sa.attention_with_kvcache(self.zeros(count), self.paged, **options)
        assert np.array_equal(out, self.expected[:, :, length - count : length])

    def bad(self) -> None:
        wrong: list[Any] = [
            lambda: self.cache.append(self.k[0], self.v),
            lambda: self.cache.append(*[np.zeros((1, HEADS, CAPACITY + 1, DIM), np.float32)] * 2),
            lambda: self.cache.truncate(self.length + 1),
            lambda: self.cache.reorder([1]),
            lambda: self.paged.free(-1),
            lambda: self.paged.append(-1, self.k[0], self.v[0]),
            lambda: sa.attention_with_kvcache(self.q, self.cache, self.k, None),
            lambda: sa.attention_with_kvcache(self.q, self.paged, sequences=[-1]),
            lambda: sa.attention_with_kvcache(self.q[:, :, :1], self.cache, *self.new(0, 1), out=self.q),
            lambda: sa.KVCache(1, HEADS, DIM, CAPACITY, buffer=bytearray(100)),
        ]
        try:
            wrong[int(self.rng.integers(len(wrong)))]()
        except (TypeError, ValueError, MemoryError):
            return
        raise AssertionError("a bad call went through")

    def check(self) -> None:
        """Check everything, and free it."""
        assert self.cache.lengths[0] == self.length
        if self.length:
            out = sa.attention_with_kvcache(self.zeros(self.length), self.cache, window=(0, 0))
            assert np.array_equal(out, self.expected[:, :, : self.length])
        assert set(self.paged.sequences) == self.lengths.keys()
        for name, length in list(self.lengths.items()):
            if length:
                self.check_pages(name)
            self.paged.free(name)
        self.lengths.clear()
        assert self.paged.num_free_pages == PAGES


def main(operations: int) -> None:
    soak = Soak(11)
    for _ in range(2):
        soak.run(operations // 10)
    before = resident()
    for _ in range(10):
        soak.run(operations // 10)
    print(resident() - before)


if __name__ == "__main__":
    main(int(sys.argv[1]))
