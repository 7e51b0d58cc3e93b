"""Hypothesis: any order of calls gives a PagedKVCache the contents and pages of the plain model."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
from cache_model import (
    CODES,
    STORAGE,
    PagedModel,
    Sequence,
    check_attention,
    random_keep,
    random_options,
    read_through_attention,
    storage_dtype,
)
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
    deadline=None, max_examples=40, stateful_step_count=30, suppress_health_check=[HealthCheck.too_slow]
)
seeds = st.integers(0, 1 << 30)
some_live = precondition(lambda self: self.model.sequences)


class Paged(RuleBasedStateMachine):
    def __init__(self, assert_accurate: Any) -> None:
        super().__init__()
        self.assert_accurate = assert_accurate

    @initialize(
        num_pages=st.integers(1, 12), page_size=st.sampled_from([1, 2, 3, 5, 16]), kv_heads=st.integers(1, 2),
        group=st.integers(1, 3), dim=st.integers(1, 9), value_dim=st.one_of(st.none(), st.integers(1, 9)),
        dtype=st.sampled_from(STORAGE), window=st.one_of(st.none(), st.none(), st.integers(0, 12)),
    )  # fmt: skip
    def create(
        self, num_pages: int, page_size: int, kv_heads: int, group: int, dim: int, value_dim: int | None, dtype: str,
        window: int | None,
    ) -> None:  # fmt: skip
        self.shape = (num_pages, page_size, kv_heads, dim)
        self.named = {"value_dim": value_dim, "dtype": dtype, "window": window}
        self.heads, self.dims, self.window = kv_heads * group, (dim, value_dim or dim), window
        self.buffer = np.zeros(sa.PagedKVCache.buffer_size(*self.shape, **self.named), np.uint8)
        self.cache = sa.PagedKVCache(*self.shape, **self.named, buffer=self.buffer)
        self.model = PagedModel(num_pages, page_size, window)

    @invariant()
    def holds_what_the_model_holds(self) -> None:
        cache, model = self.cache, self.model
        assert sorted(cache.sequences) == sorted(model.sequences)
        assert {name: cache.length(name) for name in model.sequences} == {
            name: sequence.length for name, sequence in model.sequences.items()
        }
        assert cache.num_free_pages == model.num_free_pages
        for name, sequence in model.sequences.items():
            if sequence.length:
                self.check_contents(name, sequence)

    def check_contents(self, name: int, sequence: Sequence) -> None:
        first = self.model.first_held(name)
        if first == sequence.length:
            return
        k, v = read_through_attention(self.cache, sequence.length - first, sequences=[name])
        # The product of a code and its scale may be rounded, and a score before it enters lse.
        of_v = 2.0**-23 if self.named["dtype"] in CODES else 0.0
        for found, tokens, tolerance in ((k, sequence.k, 2.0**-21), (v, sequence.v, of_v)):
            wanted = tokens.values()[:, first:]
            assert np.all(abs(found[0] - wanted) <= tolerance * abs(wanted))

    def refused(self, exceptions: Any, call: Any, *arguments: Any, **named: Any) -> None:
        before = self.buffer.tobytes()
        with pytest.raises(exceptions):
            call(*arguments, **named)
        assert self.buffer.tobytes() == before

    def tokens(self, seed: int, *shape: int) -> list[Any]:
        rng = np.random.default_rng(seed)
        return [rng.standard_normal((*shape, dim)).astype(np.float32) for dim in self.dims]

    def any_live(self, data: Any) -> int:
        return int(data.draw(st.sampled_from(sorted(self.model.sequences))))

    # Calls.

    @precondition(lambda self: len(self.model.sequences) < 6)
    @rule()
    def allocate(self) -> None:
        self.model.add(self.cache.allocate(), Sequence(self.shape[2], *self.dims, self.named["dtype"]))

    @some_live
    @rule(seed=seeds, count=st.integers(0, 20), wide=st.booleans(), data=st.data())
    def append(self, seed: int, count: int, wide: bool, data: Any) -> None:
        name = self.any_live(data)
        k, v = self.tokens(seed, 1, self.shape[2], count)
        if not wide and self.named["dtype"] not in CODES:
            k, v = (x.astype(storage_dtype(self.named["dtype"])) for x in (k, v))
        if self.model.fits([name], count):
            self.cache.append(name, k[0], v[0])
            self.model.append([name], k, v)
        else:
            self.refused(MemoryError, self.cache.append, name, k[0], v[0])

    @some_live
    @precondition(lambda self: len(self.model.sequences) < 6)
    @rule(data=st.data())
    def fork(self, data: Any) -> None:
        name = self.any_live(data)
        self.model.fork(name, self.cache.fork(name))

    @some_live
    @rule(data=st.data())
    def truncate(self, data: Any) -> None:
        name = self.any_live(data)
        length = data.draw(st.integers(0, self.model.sequences[name].length))
        if self.window is not None and length and max(length - self.window, 0) < self.model.first_held(name):
            self.refused(ValueError, self.cache.truncate, name, length)
        else:
            self.cache.truncate(name, length)
            self.model.truncate(name, length)

    @some_live
    @rule(seed=seeds, data=st.data())
    def evict(self, seed: int, data: Any) -> None:
        name = self.any_live(data)
        kept = random_keep(np.random.default_rng(seed), self.shape[2], self.model.sequences[name].length)
        if self.window is not None:
            self.refused(ValueError, self.cache.evict, name, kept)
            return
        after = {**self.model.tables, name: self.model.table_of_kept(name, kept)}
        if self.model.used(after) > self.model.num_pages:
            self.refused(MemoryError, self.cache.evict, name, kept)
            return
        self.cache.evict(name, kept)
        self.model.tables = after
        self.model.sequences[name].evict(kept)

    @some_live
    @rule(data=st.data())
    def free(self, data: Any) -> None:
        name = self.any_live(data)
        self.cache.free(name)
        self.model.free(name)
        self.refused(ValueError, self.cache.free, name)

    @some_live
    @rule(seed=seeds, q_len=st.integers(1, 5), data=st.data())
    def append_and_attend(self, seed: int, q_len: int, data: Any) -> None:
        names = data.draw(st.lists(st.sampled_from(sorted(self.model.sequences)), min_size=1, unique=True))
        k, v = self.tokens(seed, len(names), self.shape[2], q_len)
        tokens: dict[str, Any] = {"k": k, "v": v}
        if self.dims[0] > 1 and data.draw(st.booleans(), "rope"):
            tokens["rope"] = sa.RoPE(rotary_dim=2)
        self.attend(seed, names, q_len, data, tokens)

    @precondition(lambda self: any(sequence.length for sequence in self.model.sequences.values()))
    @rule(seed=seeds, q_len=st.integers(1, 5), data=st.data())
    def only_attend(self, seed: int, q_len: int, data: Any) -> None:
        lengths = {name: sequence.length for name, sequence in self.model.sequences.items()}
        filled = sorted(name for name, length in lengths.items() if length)
        names = data.draw(st.lists(st.sampled_from(filled), min_size=1, unique=True))
        self.attend(seed, names, min(q_len, *(lengths[name] for name in names)), data, {})

    def attend(self, seed: int, names: list[int], q_len: int, data: Any, tokens: dict[str, Any]) -> None:
        def pick(choices: list[Any]) -> Any:
            return data.draw(st.sampled_from(choices))

        rng = np.random.default_rng(seed + 1)
        q = rng.standard_normal((len(names), self.heads, q_len, self.dims[0])).astype(np.float32)
        options = random_options(pick, rng, self.heads, q_len, self.window)
        asked = {
            "sequences": pick([names, np.array(names)]),
            "cascade": pick([False, True]),
            "num_threads": pick([1, 3]),
        }
        call = partial(sa.attention_with_kvcache, q, self.cache, **tokens, **options, **asked)
        if tokens and not self.model.fits(names, q_len):
            self.refused(MemoryError, call)
            return
        if not tokens and self.looks_too_far_back(names, q_len, options):
            self.refused(ValueError, call)
            return
        out, lse = call(return_lse=True)
        if "rope" in tokens:
            starts = np.array([[self.model.sequences[name].length] for name in names])
            q, tokens["k"] = (sa.apply_rope(x, starts + np.arange(q_len), tokens["rope"]) for x in (q, tokens["k"]))
        if tokens:
            self.model.append(names, tokens["k"], tokens["v"])
        check_attention(self.assert_accurate, [self.model.sequences[name] for name in names], q, out, lse, **options)

    def looks_too_far_back(self, names: list[int], q_len: int, options: dict[str, Any]) -> bool:
        return self.window is not None and any(
            self.model.first_held(name) > max(self.model.sequences[name].length - q_len - options["window"][0], 0)
            for name in names
        )

    @some_live
    @rule(seed=seeds, which=st.integers(0, 50), data=st.data())
    def misuse(self, seed: int, which: int, data: Any) -> None:
        calls = bad_calls(self, self.any_live(data), *self.tokens(seed, self.shape[2], 1))
        # The lack of pages may be reported first.
        self.refused((TypeError, ValueError, MemoryError), *calls[which % len(calls)])


def bad_calls(machine: Paged, name: int, k: Any, v: Any) -> list[tuple[Any, ...]]:
    cache, q = machine.cache, np.zeros((1, machine.heads, 1, machine.dims[0]), np.float32)
    attend = partial(sa.attention_with_kvcache, **({} if machine.window is None else {"window": (0, 0)}))
    dead = max(machine.model.sequences) + 1
    names: list[Any] = [dead, -1, 1 << 40, 1 << 70, None, "0", 0.5, True, [name]]
    bad_sequences: list[Any] = [None, [], [dead], [-1], [1 << 70], [name] * 2, name, "x", [0.5], [[name]], [None]]
    bad_options: list[dict[str, Any]] = [
        {"rope": "x"}, {"positions": [0]}, {"mask": np.ones((2, 2), bool)}, {"softcap": 0}, {"q_lens": [1]},
        {"sinks": np.zeros(machine.heads + 1)}, {"out": np.zeros(3, np.float32)}, {"cascade": 3},
    ]  # fmt: skip
    return [
        *((method, bad) for method in (cache.fork, cache.free, cache.length) for bad in names),
        *((cache.append, bad, k, v) for bad in names),
        *((cache.truncate, bad, 0) for bad in names),
        *((cache.truncate, name, x) for x in (-1, cache.length(name) + 1, None, 0.5, True, 1 << 70)),
        *((cache.evict, bad, np.zeros(0, int)) for bad in names),
        *((cache.evict, name, x) for x in (None, 0, [cache.length(name)], [-2], [0.0], [True], [0, 0], [[[0]]])),
        *((cache.append, name, x, v) for x in (k[0], k[None], k[..., :0], k.astype(int), np.concatenate([k, k], 1))),
        *((cache.append, name, k, x) for x in (v[0], None, np.concatenate([v, v]), v.astype(complex))),
        *((partial(attend, q, cache, k[None], v[None], sequences=bad),) for bad in bad_sequences),
        *((partial(attend, x, cache, sequences=[name]),) for x in (q[0], q[..., :0], q.astype(int), q[:0])),
        *((partial(attend, q, cache, k[None], v[None], sequences=[name], **bad),) for bad in bad_options),
        (partial(attend, q, cache, k[None], sequences=[name]),),
        (partial(attend, np.concatenate([q, q]), cache, *(np.stack([x, x]) for x in (k, v)), sequences=[name] * 2),),
    ]


def test_any_order_of_calls(isa: str, assert_accurate: Any) -> None:
    run_state_machine_as_test(lambda: Paged(assert_accurate), settings=SETTINGS)  # type: ignore[no-untyped-call]


@pytest.mark.one_isa
def test_too_few_pages_are_counted_in_the_message() -> None:
    cache = sa.PagedKVCache(5, 4, 1, 2)
    name, x = cache.allocate(), np.ones((1, 30, 2), np.float32)
    cache.append(name, x[:, :6], x[:, :6])
    with pytest.raises(MemoryError, match=r"(?s)(?=.*\b7\b)(?=.*\b3\b).*page"):
        cache.append(name, x, x[..., :2])  # 36 tokens: 9 pages, but only 2 exist
    assert (cache.length(name), cache.num_free_pages) == (6, 3)


@pytest.mark.one_isa
@pytest.mark.parametrize("name", [True, np.bool_(True), 1.0, "1", None, 2, -1, [1]])
def test_only_ids_are_ids(name: Any) -> None:
    cache = sa.PagedKVCache(5, 4, 1, 2)
    assert [cache.allocate(), cache.allocate()] == [0, 1]
    for method in (cache.length, cache.fork, cache.free):
        with pytest.raises((TypeError, ValueError), match="sequence"):
            method(name)
    assert cache.sequences == (0, 1)
