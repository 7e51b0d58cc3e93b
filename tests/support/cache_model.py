"""A model of caches: plain arrays for each sequence, nothing shared, nothing in place."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import ml_dtypes
import numpy as np

import selfattn as sa
from selfattn import reference
from selfattn._rounding import MATRIX_ROUNDINGS

STORAGE = ["float32", "float16", "bfloat16", "int8", "int4"]

CODES = ["int8", "int4"]


def storage_dtype(name: str) -> np.dtype[Any]:
    """Return the dtype of an array of a cache, as users see it."""
    return np.dtype({"bfloat16": ml_dtypes.bfloat16, "int4": np.uint8}.get(name, name))


def quantised(x: Any) -> tuple[Any, Any]:
    """Return 8-bit codes and the scale of each row: its largest magnitude becomes 127."""
    x = np.asarray(x, np.float32)
    scales = abs(x).max(axis=-1, initial=0) / np.float32(127)
    divisors = np.where(scales == 0, np.float32(1), scales)[..., np.newaxis]
    codes = np.where(scales[..., np.newaxis] == 0, np.float32(0), np.rint(x / divisors))
    return np.clip(codes, -127, 127).astype(np.int8), scales


def groups_of(x: Any) -> Any:
    """Return the last axis in groups of 32, the last of which is padded with zeros."""
    count = -(-x.shape[-1] // 32)
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 32 * count - x.shape[-1])])
    return padded.reshape(*x.shape[:-1], count, 32)


def packed(x: Any) -> tuple[Any, Any]:
    """Return words of 17 bytes with 32 codes of 4 bits, and the scale of each row."""
    groups = groups_of(np.asarray(x, np.float32).astype(np.float64))
    low = groups.min(axis=-1, initial=0)
    extents = groups.max(axis=-1, initial=0) - low
    most = extents.max(axis=-1, initial=0)
    scales = (most / 120).astype(np.float32)
    scales = np.where(scales.astype(np.float64) * 120 < most, np.nextafter(scales, np.float32(np.inf)), scales)
    largest = np.finfo(np.float32).max
    scales = np.where(scales.astype(np.float64) * 120 > largest, np.nextafter(scales, np.float32(0)), scales)
    divisors = np.where(scales == 0, 1, scales.astype(np.float64))[..., np.newaxis]
    multiples = np.clip(np.ceil(extents / 15 / divisors), 1, 8)
    steps = multiples * divisors
    zeros = np.clip(np.rint(-low / steps), 0, 15)
    codes = np.clip(zeros[..., np.newaxis] + np.rint(groups / steps[..., np.newaxis]), 0, 15).astype(np.uint8)
    pairs = codes[..., :16] | codes[..., 16:] << 4
    words = np.concatenate([pairs, ((multiples - 1 + 16 * zeros).astype(np.uint8))[..., np.newaxis]], axis=-1)
    return words.reshape(*x.shape[:-1], 17 * words.shape[-2]), scales


def unpacked(words: Any, dim: int) -> Any:
    """Return the integers that words of 4-bit codes represent, (..., dim)."""
    count = words.shape[-1] // 17
    parts = words.reshape(*words.shape[:-1], count, 17).astype(np.int64)
    codes = np.concatenate([parts[..., :16] & 15, parts[..., :16] >> 4], axis=-1)
    numbers = (parts[..., 16:] % 8 + 1) * (codes - (parts[..., 16:] >> 4))
    return numbers.reshape(*words.shape[:-1], 32 * count)[..., :dim]


class Tokens:
    """The keys or the values of one sequence as they are stored, (heads, length, ·), and scales (heads, length)."""

    def __init__(self, heads: int, dim: int, dtype: str) -> None:
        self.dim, self.dtype = dim, dtype
        self.stored = np.zeros((heads, 0, -(-dim // 32) * 17 if dtype == "int4" else dim), storage_dtype(dtype))
        self.scales = np.zeros((heads, 0), np.float32)

    def append(self, x: Any) -> None:
        quantise = {"int8": quantised, "int4": packed}.get(self.dtype)
        codes, scales = quantise(x) if quantise else (x, np.ones(x.shape[:2], np.float32))
        self.stored = np.concatenate([self.stored, codes.astype(self.stored.dtype)], axis=1)
        self.scales = np.concatenate([self.scales, scales], axis=1)

    def truncate(self, length: int) -> None:
        self.stored, self.scales = self.stored[:, :length], self.scales[:, :length]

    def evict(self, kept: Any) -> None:
        rows = np.arange(len(self.stored))[:, np.newaxis], kept
        self.stored, self.scales = self.stored[rows], self.scales[rows]

    def values(self) -> Any:
        stored = unpacked(self.stored, self.dim) if self.dtype == "int4" else self.stored
        return stored.astype(np.float64) * self.scales[..., np.newaxis].astype(np.float64)


class Sequence:
    """One sequence of a cache. Arrays are replaced, never written to: a shallow copy is a copy."""

    def __init__(self, num_kv_heads: int, head_dim: int, value_dim: int | None = None, dtype: str = "float32") -> None:
        self.k = Tokens(num_kv_heads, head_dim, dtype)
        self.v = Tokens(num_kv_heads, head_dim if value_dim is None else value_dim, dtype)

    @property
    def length(self) -> int:
        return self.k.stored.shape[1]

    def append(self, k: Any, v: Any) -> None:
        self.k.append(k)
        self.v.append(v)

    def truncate(self, length: int) -> None:
        self.k.truncate(length)
        self.v.truncate(length)

    def evict(self, kept: Any) -> None:
        self.k.evict(kept)
        self.v.evict(kept)

    def copy(self) -> Sequence:
        twin = Sequence.__new__(Sequence)
        for name, tokens in (("k", self.k), ("v", self.v)):
            other = Tokens.__new__(Tokens)
            vars(other).update(vars(tokens))
            setattr(twin, name, other)
        return twin

    def attend(self, q: Any, *, mask: Any = None, causal: bool = True, **options: Any) -> reference.Result:
        """q (H, Sq, D); a mask is one over the Sq newest tokens."""
        if mask is not None:
            whole = np.ones((*q.shape[:2], self.length), bool)
            whole[..., self.length - q.shape[1] :] = mask
            mask = whole
        return reference.attention(q, self.k.values(), self.v.values(), mask=mask, causal=causal, **options)


class PagedModel:
    """Sequences by id, and the pages of each. A page is an object; a released page is None."""

    def __init__(self, num_pages: int, page_size: int, window: int | None = None) -> None:
        self.num_pages, self.page_size, self.window = num_pages, page_size, window
        self.sequences: dict[int, Sequence] = {}
        self.tables: dict[int, list[object | None]] = {}

    def add(self, name: int, sequence: Sequence, table: Iterable[object | None] = ()) -> None:
        assert name not in self.sequences, "an id that is live was given out again"
        self.sequences[name], self.tables[name] = sequence, list(table)

    def fork(self, name: int, new: int) -> None:
        self.add(new, self.sequences[name].copy(), self.tables[name])

    def free(self, name: int) -> None:
        del self.sequences[name], self.tables[name]

    def truncate(self, name: int, length: int) -> None:
        self.sequences[name].truncate(length)
        del self.tables[name][-(-length // self.page_size) :]

    def table_of_kept(self, name: int, kept: Any) -> list[object | None]:
        """Return the table of a sequence of which only the tokens `kept`, (heads or 1, n), are left."""
        still, pages = (kept == np.arange(kept.shape[-1])).all(axis=0), -(-kept.shape[-1] // self.page_size)
        whole = pages if still.all() else int(still.sum()) // self.page_size
        return [*self.tables[name][:whole], *(object() for _ in range(pages - whole))]

    def released(self, names: Iterable[int]) -> dict[int, list[object | None]]:
        """Return all tables without the pages of `names` that no further token sees."""
        tables = {name: list(table) for name, table in self.tables.items()}
        for name in names if self.window is not None else []:
            # Keep what the first of the new tokens sees.
            unseen = max(self.sequences[name].length - self.window, 0) // self.page_size
            tables[name][:unseen] = [None] * unseen
        return tables

    def tables_after(
        self, names: Iterable[int], count: int, before: dict[int, list[object | None]]
    ) -> dict[int, list[object | None]]:
        """Return the tables `before` after `count` tokens have been appended to each of `names`."""
        tables = {name: list(table) for name, table in before.items()}
        for name in names:
            table, length = tables[name], self.sequences[name].length
            shared = [page for other, pages in tables.items() if other != name for page in pages]
            if count and length % self.page_size and table[-1] in shared:
                table[-1] = object()
            table += [object() for _ in range(-(-(length + count) // self.page_size) - len(table))]
        return tables

    def used(self, tables: dict[int, list[object | None]]) -> int:
        return len({page for table in tables.values() for page in table if page is not None})

    def fits(self, names: Iterable[int], count: int) -> bool:
        """Whether there are enough pages, including those that can be released before others are taken."""
        names = list(names)
        return self.used(self.tables_after(names, count, self.tables)) <= self.num_pages or (
            self.used(self.tables_after(names, count, self.released(names))) <= self.num_pages
        )

    def append(self, names: list[int], k: Any, v: Any) -> None:
        """k (B, Hkv, T, D): one row for each of `names`."""
        if k.shape[2]:
            self.tables = self.tables_after(names, k.shape[2], self.released(names))
        for name, row_k, row_v in zip(names, k, v, strict=True):
            self.sequences[name].append(row_k, row_v)

    def first_held(self, name: int) -> int:
        """Return the first token whose page has not been released."""
        return sum(1 for _ in itertools.takewhile(lambda page: page is None, self.tables[name])) * self.page_size

    @property
    def num_free_pages(self) -> int:
        return self.num_pages - self.used(self.tables)


def random_keep(rng: Any, heads: int, length: int) -> Any:
    """Return the indices (heads or 1, n) of tokens that stay: often of the first tokens and some others."""
    count, rows = rng.integers(length + 1), rng.choice([1, heads])
    first = rng.integers(count + 1)
    others = [np.sort(rng.permutation(np.arange(first, length))[: count - first]) for _ in range(rows)]
    return np.stack([np.concatenate([np.arange(first), row]) for row in others]).astype(np.int64)


def random_options(
    pick: Callable[[list[Any]], Any], rng: Any, num_heads: int, q_len: int, reach: int | None = None
) -> dict[str, Any]:
    """Make up options of an attention call; `pick` chooses from a list; no query looks further back than `reach`."""
    options: dict[str, Any] = {}
    if pick([False, True]):
        options["causal"] = pick([True, False])
    if reach is not None:
        options["window"] = (pick([reach, reach // 2, 0]), pick([None, 0, 2]))
    elif pick([False, True]):
        options["window"] = (pick([None, 0, 3, 20]), pick([None, 0, 2]))
    if pick([False, False, True]):
        options["softcap"] = pick([0.5, 30.0])
    if pick([False, False, True]):
        options["sinks"] = rng.standard_normal(num_heads).astype(np.float32)
    if pick([False, False, True]):
        options["alibi_slopes"] = (rng.random(num_heads) / 8).astype(np.float32)
    if pick([False, False, True]):
        options["scale"] = pick([0.0, -0.3, 1.0])
    if pick([False, False, True]):
        options["mask"] = rng.random((q_len, q_len)) < 0.6
    return options


def code_rounding(sequence: Sequence, q: Any, scale: float | None = None) -> tuple[float, float]:
    """Return what rounding to 24 bits may add where the other operand is codes: to a score, and to an output.

    docs/numerics.md derives both amounts.
    """
    if sequence.k.dtype not in CODES or sa.active_isa() != "avx512_bf16":
        return 0.0, 0.0
    factor = q.shape[-1] ** -0.5 if scale is None else abs(scale)
    of_keys = abs(sequence.k.values()).sum(axis=-1).max(initial=0)
    of_queries = 2.0**-23 * (1 + 2.0**-7) * abs(q.astype(np.float64)).max(initial=0)
    return factor * of_queries * of_keys, 2.0**-10 * float(sequence.v.scales.max(initial=0)) / 2


def check_attention(
    assert_accurate: Callable[..., float],
    sequences: list[Sequence],
    q: Any,
    out: Any,
    lse: Any = None,
    *,
    rotated: bool = False,
    **options: Any,
) -> None:
    """Compare row b of `out` and `lse` with the model's result for sequence b.

    `rotated`: q has been rotated in its own type.
    """
    rounded = MATRIX_ROUNDINGS.get((q.dtype.name, "highest"), (0.0, 0.0))
    if rotated and q.dtype.itemsize == 2:
        rounded = (rounded[0], rounded[1] + 2.0**-8)
    assert len(out) == len(sequences)
    for b, sequence in enumerate(sequences):
        exact = sequence.attend(q[b].astype(np.float64), **options)
        moved, extra = code_rounding(sequence, q[b], options.get("scale"))
        of_values = rounded[0] + float(np.expm1(2 * moved))
        assert_accurate(out[b], exact, trivial=True, rounded=(of_values, rounded[1]), extra=extra)
        if lse is None:
            continue
        finite = np.isfinite(exact.lse)
        assert np.array_equal(lse[b][~finite], exact.lse[~finite].astype(lse.dtype))
        tolerance = (16 + 4 * exact.sigma) * 2.0**-24 + exact.sigma * rounded[1] + moved
        error = abs(lse[b][finite] - exact.lse[finite])
        assert np.all(error <= tolerance * (1 + abs(exact.lse[finite])))


def read_through_attention(cache: Any, q_len: int, **options: Any) -> tuple[Any, Any]:
    """Return the last q_len tokens' keys and values, (B, Hkv, q_len, ·), from queries that see one key each.

    The unit vector d as a query has the score k_d, and the only weight is 1.
    """
    dim, heads = cache.head_dim, cache.num_kv_heads
    batch = len(options["sequences"]) if "sequences" in options else cache.batch
    units = np.tile(np.eye(dim, dtype=np.float32), (heads, 1))
    q = np.broadcast_to(units[:, np.newaxis], (batch, heads * dim, q_len, dim))
    out, lse = sa.attention_with_kvcache(q, cache, window=(0, 0), scale=1.0, return_lse=True, **options)
    return lse.reshape(batch, heads, dim, q_len).swapaxes(2, 3), out[:, ::dim]
