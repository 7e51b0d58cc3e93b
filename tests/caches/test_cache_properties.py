"""Hypothesis: any order of calls gives a KVCache the contents and the answers of the plain model."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
from cache_model import CODES, STORAGE, Sequence, check_attention, random_keep, random_options, storage_dtype
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import selfattn as sa

SETTINGS = settings(
    deadline=None, max_examples=40, stateful_step_count=25, suppress_health_check=[HealthCheck.too_slow]
)
seeds = st.integers(0, 1 << 30)
FULL = (ValueError, MemoryError)


class Contiguous(RuleBasedStateMachine):
    def __init__(self, assert_accurate: Any) -> None:
        super().__init__()
        self.assert_accurate = assert_accurate

    @initialize(
        batch=st.integers(1, 3), kv_heads=st.integers(1, 2), group=st.integers(1, 3),
        dim=st.integers(1, 12) | st.sampled_from([32, 33, 70]),
        value_dim=st.one_of(st.none(), st.integers(1, 9)), capacity=st.integers(1, 40), dtype=st.sampled_from(STORAGE),
        window=st.one_of(st.none(), st.integers(0, 12)),
    )  # fmt: skip
    def create(
        self, batch: int, kv_heads: int, group: int, dim: int, value_dim: int | None, capacity: int, dtype: str,
        window: int | None,
    ) -> None:  # fmt: skip
        if window is not None:  # few slots, which are soon overwritten
            capacity = window + 1 + capacity // 4
        self.shape, self.named = (batch, kv_heads, dim, capacity), {"value_dim": value_dim, "dtype": dtype}
        self.heads, self.dims, self.window = kv_heads * group, (dim, value_dim or dim), window
        if window is not None:
            self.named["window"] = window
        self.buffer = np.zeros(sa.KVCache.buffer_size(*self.shape, **self.named), np.uint8)
        self.cache = sa.KVCache(*self.shape, **self.named, buffer=self.buffer)
        self.rows = [Sequence(kv_heads, dim, value_dim, dtype) for _ in range(batch)]
        # For a ring: the length from which slots have been overwritten.
        self.written = [0] * batch

    # What the cache must hold.

    def first_held(self, b: int) -> int:
        return max(self.written[b] - self.cache.capacity, 0)

    @invariant()
    def holds_what_the_model_holds(self) -> None:
        cache = self.cache
        assert cache.lengths.dtype == np.int64
        assert cache.lengths.tolist() == [row.length for row in self.rows]
        assert not cache.lengths.flags.writeable
        assert not cache.k.flags.writeable
        for b, row in enumerate(self.rows):
            kept = np.arange(self.first_held(b), row.length)
            slots = kept % cache.capacity
            for tokens, found in ((row.k, cache.k), (row.v, cache.v)):
                assert found.dtype == tokens.stored.dtype
                assert found[b][:, slots].tobytes() == tokens.stored[:, kept].tobytes()
            if self.named["dtype"] in CODES:
                for tokens, found in ((row.k, cache.k_scales), (row.v, cache.v_scales)):
                    assert found[b][:, slots].tobytes() == tokens.scales[:, kept].tobytes()

    def refused(self, exceptions: Any, call: Any, *arguments: Any, **named: Any) -> None:
        before = self.buffer.tobytes()
        with pytest.raises(exceptions):
            call(*arguments, **named)
        assert self.buffer.tobytes() == before

    def tokens(self, seed: int, count: int, dtype: Any = None) -> list[Any]:
        rng = np.random.default_rng(seed)
        batch, kv_heads, *_ = self.shape
        dtype = np.float32 if dtype is None or self.named["dtype"] in CODES else dtype
        return [rng.standard_normal((batch, kv_heads, count, dim)).astype(dtype) for dim in self.dims]

    def has_room(self, count: int) -> bool:
        if self.window is not None:
            return count <= self.cache.capacity - self.window
        return max(row.length for row in self.rows) + count <= self.cache.capacity

    def append_to_model(self, k: Any, v: Any) -> None:
        for b, row in enumerate(self.rows):
            row.append(k[b], v[b])
            self.written[b] = max(self.written[b], row.length)

    # Calls.

    @rule(seed=seeds, count=st.integers(0, 12), wide=st.booleans())
    def append(self, seed: int, count: int, wide: bool) -> None:
        k, v = self.tokens(seed, count, np.float32 if wide else storage_dtype(self.named["dtype"]))
        if self.has_room(count):
            self.cache.append(k, v)
            self.append_to_model(k, v)
        else:
            self.refused(FULL, self.cache.append, k, v)

    @rule(seed=seeds, q_len=st.integers(1, 5), data=st.data())
    def append_and_attend(self, seed: int, q_len: int, data: Any) -> None:
        k, v = self.tokens(seed, q_len)
        rope, positions = None, None
        if self.dims[0] > 1 and data.draw(st.booleans(), "rope"):
            rope = sa.RoPE(rotary_dim=self.dims[0] // 2 * 2, interleaved=data.draw(st.booleans()))
            positions = data.draw(st.sampled_from([None, np.arange(q_len) + 7]))
        self.attend(seed, q_len, data, k=k, v=v, rope=rope, positions=positions)

    @precondition(lambda self: min(row.length for row in self.rows) > 0)
    @rule(seed=seeds, q_len=st.integers(1, 5), data=st.data())
    def only_attend(self, seed: int, q_len: int, data: Any) -> None:
        self.attend(seed, min(q_len, *(row.length for row in self.rows)), data)

    def attend(self, seed: int, q_len: int, data: Any, **tokens: Any) -> None:
        def pick(choices: list[Any]) -> Any:
            return data.draw(st.sampled_from(choices))

        rng = np.random.default_rng(seed + 1)
        narrow = self.named["dtype"] in ("float16", "bfloat16") and pick([False, True])
        q_dtype = storage_dtype(self.named["dtype"]) if narrow else np.dtype(np.float32)
        q = rng.standard_normal((len(self.rows), self.heads, q_len, self.dims[0])).astype(q_dtype)
        if tokens:
            tokens["k"], tokens["v"] = (x.astype(q_dtype) for x in (tokens["k"], tokens["v"]))
        options = random_options(pick, rng, self.heads, q_len, self.window)
        asked = {"layout": pick(["bhsd", "bshd"]), "num_threads": pick([1, 3])}
        given = {
            name: x.swapaxes(1, 2) if name in "kv" and asked["layout"] == "bshd" else x for name, x in tokens.items()
        }
        given_q = q.swapaxes(1, 2) if asked["layout"] == "bshd" else q
        if (tokens and not self.has_room(q_len)) or (not tokens and self.looks_too_far_back(q_len, options)):
            self.refused(FULL, sa.attention_with_kvcache, given_q, self.cache, **given, **options, **asked)
            return
        out, lse = sa.attention_with_kvcache(given_q, self.cache, return_lse=True, **given, **options, **asked)
        assert out.dtype == q_dtype
        if tokens.get("rope"):
            q, tokens["k"] = self.turn(q, tokens)
        if tokens:
            self.append_to_model(tokens["k"], tokens["v"])
        out = out.swapaxes(1, 2) if asked["layout"] == "bshd" else out
        check_attention(self.assert_accurate, self.rows, q, out, lse, rotated=tokens.get("rope") is not None, **options)

    def looks_too_far_back(self, q_len: int, options: dict[str, Any]) -> bool:
        return self.window is not None and any(
            self.first_held(b) > max(row.length - q_len - options["window"][0], 0) for b, row in enumerate(self.rows)
        )

    def turn(self, q: Any, tokens: Any) -> tuple[Any, Any]:
        q_len, positions = q.shape[2], tokens["positions"]
        if positions is None:
            positions = np.array([[row.length] for row in self.rows]) + np.arange(q_len)
        return sa.apply_rope(q, positions, tokens["rope"]), sa.apply_rope(tokens["k"], positions, tokens["rope"])

    @rule(data=st.data())
    def truncate(self, data: Any) -> None:
        lengths = [data.draw(st.integers(0, row.length)) for row in self.rows]
        if data.draw(st.booleans()):
            lengths = [min(lengths)] * len(lengths)
        given = lengths[0] if len(set(lengths)) == 1 else data.draw(st.sampled_from([lengths, np.array(lengths)]))
        lost = self.window is not None and any(
            n > 0 and max(n - self.window, 0) < self.first_held(b) for b, n in enumerate(lengths)
        )
        if lost:
            self.refused(ValueError, self.cache.truncate, given)
            return
        self.cache.truncate(given)
        for b, length in enumerate(lengths):
            self.rows[b].truncate(length)
            self.written[b] = self.written[b] if length else 0

    @rule(data=st.data())
    def reorder(self, data: Any) -> None:
        batch = len(self.rows)
        index = data.draw(st.lists(st.integers(0, batch - 1), min_size=batch, max_size=batch))
        self.cache.reorder(data.draw(st.sampled_from([index, np.array(index, np.int32)])))
        self.rows = [self.rows[i].copy() for i in index]
        self.written = [self.written[i] for i in index]

    @rule(seed=seeds)
    def evict(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        kept = [random_keep(rng, self.shape[1], row.length) for row in self.rows]
        most = max(row.shape[-1] for row in kept)
        keep = np.full((len(kept), max(len(row) for row in kept), most), -1)
        for b, row in enumerate(kept):
            keep[b, :, : row.shape[-1]] = row
        keep = keep[:, 0] if keep.shape[1] == 1 and rng.random() < 0.5 else keep
        if self.window is not None:
            self.refused(ValueError, self.cache.evict, keep)
            return
        self.cache.evict(keep)
        for row, own in zip(self.rows, kept, strict=True):
            row.evict(own)

    @rule()
    def open_again(self) -> None:
        self.cache = sa.KVCache(*self.shape, **self.named, buffer=self.buffer)

    @rule(seed=seeds, which=st.integers(0, 40))
    def misuse(self, seed: int, which: int) -> None:
        calls = bad_calls(self, *self.tokens(seed, 1))
        self.refused((TypeError, ValueError), *calls[which % len(calls)])


def bad_calls(machine: Contiguous, k: Any, v: Any) -> list[tuple[Any, ...]]:
    cache, batch = machine.cache, machine.shape[0]
    q = np.zeros((batch, machine.heads, 1, machine.dims[0]), np.float32)

    def attend(*arguments: Any, **named: Any) -> None:
        sa.attention_with_kvcache(*arguments, **({"window": (0, 0)} if machine.window is not None else {}), **named)

    too_many = np.zeros((batch, machine.shape[1], cache.capacity + 1, machine.dims[0]), np.float32)
    longer = max(row.length for row in machine.rows) + 1
    bad_options: list[dict[str, Any]] = [
        {"sequences": [0] * batch}, {"rope": 3}, {"positions": [0]}, {"mask": np.ones((2, 2), bool)},
        {"mask": np.ones((1, 1))}, {"softcap": -1.0}, {"scale": "x"}, {"sinks": np.zeros(machine.heads + 1)},
        {"kv_lens": [1] * batch}, {"out": np.zeros(3, np.float32)}, {"num_threads": 0}, {"layout": "x"},
        {"alibi_slopes": np.zeros(machine.heads + 1)}, {"causal": 1}, {"return_lse": "x"},
    ]  # fmt: skip
    return [
        *((cache.append, x, v) for x in (k[0], k[..., :0], np.concatenate([k, k], 2), k.astype(np.int32), None, k[:0])),
        *((cache.append, k, x) for x in (v[0], v[None], np.concatenate([v, v], 1), v.astype(complex), "v")),
        (cache.append, np.ma.MaskedArray(k), v),
        (cache.append, too_many, np.zeros((*too_many.shape[:3], machine.dims[1]), np.float32)),
        *((cache.truncate, x) for x in (-1, longer, [0] * (batch + 1), 0.5, True, None, [-1] * batch, 1 << 70)),
        *((cache.reorder, x) for x in ([batch] * batch, [-1] * batch, [0] * (batch + 1), 0, [0.0] * batch, None, [])),
        *((cache.evict, np.full((batch, 1), x)) for x in (-2, longer, 0.0, True)),
        *((cache.evict, x) for x in (None, 0, [0], np.zeros((batch + 1, 0), int), [[0, 0]] * batch, [[-1, 0]] * batch)),
        *((attend, x, cache) for x in (q[0], q[..., :0], q.astype(int), np.concatenate([q, q]), None)),
        (attend, q, cache, k),
        (attend, q, cache, None, v),
        (attend, q, cache, np.concatenate([k, k], 2), np.concatenate([v, v], 2)),
        (attend, q, None, k, v),
        *((partial(attend, **named), q, cache, k, v) for named in bad_options),
    ]


def test_any_order_of_calls(isa: str, assert_accurate: Any) -> None:
    run_state_machine_as_test(lambda: Contiguous(assert_accurate), settings=SETTINGS)  # type: ignore[no-untyped-call]
