"""`explain_call`: it tells the plans that run, refuses what the call refuses, and changes nothing."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from regions import recorded_regions

import selfattn as sa
from selfattn import _core

DTYPES = ["float32", "float64", "float16", "bfloat16"]
with_openmp = pytest.mark.skipif(
    not _core.parallel_backend().endswith("openmp"), reason="this build does not use OpenMP"
)
STARTS = [0, 1, 1, 40, 140]
KEY_STARTS = [0, 2500, 2503, 2503, 2603]


def zeros(*shape: int, dtype: Any = np.float32) -> Any:
    return np.zeros(shape, dtype)


def works(plan: Any) -> list[str]:
    return [part["work"] for part in plan["parts"]]


def without_source(plan: Any) -> dict[str, Any]:
    return {name: value for name, value in plan.items() if name != "threads_source"}


@pytest.fixture
def layer() -> sa.SelfAttention:
    w = [zeros(24, 64), zeros(24, 32), zeros(24, 32), zeros(64, 24)]
    return sa.SelfAttention(*w, num_heads=4, num_kv_heads=2, rope=True, norm=sa.RMSNorm(), q_norm=sa.RMSNorm())


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_is_explained_as_by_explain(isa: str, dtype: str) -> None:
    pytest.importorskip("ml_dtypes")
    q, k = zeros(2, 8, 300, 64, dtype=np.dtype(dtype)), zeros(2, 2, 300, 64, dtype=np.dtype(dtype))
    options: dict[str, Any] = {"causal": True, "num_threads": 1, "kv_lens": [300, 290], "q_lens": [300, 290]}
    told = sa.explain_call(sa.attention, q, k, v=k, **options)
    (part,) = told["parts"]
    expected = without_source(sa.explain(q, k, k, **options))
    assert part == {"work": "attention", **expected}
    assert (told["isa"], told["flops"]) == (isa, expected["flops"])


def test_packed_sequences_have_the_plans_of_separate_calls() -> None:
    q, k, v = zeros(140, 4, 32), zeros(2603, 2, 32), zeros(2603, 2, 48)[..., ::2]
    told = sa.explain_call(sa.attention_varlen, q, k, v, STARTS, KEY_STARTS, causal=True, num_threads=1)
    bounds = zip(pairwise(STARTS), pairwise(KEY_STARTS), strict=True)
    alone = [sa.explain(q[a:b], k[c:d], v[c:d], layout="bshd", num_threads=1) for (a, b), (c, d) in bounds]
    assert told["parts"] == [{"work": "attention", **without_source(plan)} for plan in alone]


@pytest.mark.parametrize("dtype", ["float32", "int8", "int4"])
@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_a_cache_stays_as_it_is(dtype: Any, kind: str) -> None:
    x = np.ones((2, 2, 5, 32), np.float32)
    options: dict[str, Any] = {"mask": np.tri(5, dtype=bool), "rope": True, "num_threads": 1}
    if kind == "contiguous":
        cache: Any = sa.KVCache(2, 2, 32, 100, dtype=dtype)
        cache.append(x, x)
        held = (cache.lengths.tolist(), cache.k.tobytes(), cache.v.tobytes())
    else:
        cache = sa.PagedKVCache(9, 4, 2, 32, dtype=dtype)
        options["sequences"] = [cache.allocate(), cache.allocate()]
        for name, row in zip(options["sequences"], x, strict=True):
            cache.append(name, row, row)
        held = (cache.num_free_pages, 5)
    told = sa.explain_call(sa.attention_with_kvcache, x, cache, x, x, **options)
    assert works(told) == ["rotation", "attention"]
    if kind == "contiguous":
        assert (cache.lengths.tolist(), cache.k.tobytes(), cache.v.tobytes()) == held
    else:
        assert (cache.num_free_pages, cache.length(options["sequences"][0])) == held
    with pytest.raises(TypeError, match="q has dtype int64"):
        sa.explain_call(sa.attention_with_kvcache, x.astype(int), cache, x, x, **options)
    before = sa.attention_with_kvcache(x, cache, x, x, **options)  # as if there had been no rehearsal
    assert np.isfinite(before).all()
    lengths = cache.lengths if kind == "contiguous" else [cache.length(name) for name in options["sequences"]]
    assert list(lengths) == [10, 10]


def test_every_call(layer: sa.SelfAttention) -> None:
    x, rows = zeros(1, 4, 50, 16), zeros(2, 50, 24)
    feed = sa.FeedForward(zeros(24, 96), zeros(96, 24), activation="gelu", norm=sa.LayerNorm())
    out, lse = sa.attention(x, x, x, return_lse=True)
    relative = (x, x, x, zeros(50, 16), zeros(4, 16), zeros(4, 16))
    layer_cache = sa.KVCache(2, 2, 16, 100)
    expected: list[tuple[list[str], tuple[Any, ...], dict[str, Any]]] = [
        (["attention"], (sa.relative_attention, *relative), {}),
        (["attention gradients"], (sa.attention_backward, x, x, x, x), {"out": out, "lse": lse}),
        (["norm"], (sa.rms_norm, rows), {}),
        (["norm"], (sa.LayerNorm(), rows), {}),
        (["rotation"], (sa.apply_rope, x), {}),
        (["merge"], (sa.merge_states, [out, out], [lse, lse]), {}),
        (["linear"], (sa.Linear(zeros(24, 8)), rows), {}),
        (["attention"], (sa.attention, x, x, x), {"return_lse": True}),
        (["attention"], (sa.attention, x, x, x), {"return_key_mass": True}),
        (["attention"] * 4, (sa.attention, x, x, x), {"key_indices": np.zeros((4, 50, 3), int)}),
    ]
    for wanted, call, options in expected:
        assert works(sa.explain_call(*call, **options)) == wanted, call[0]
    assert works(sa.explain_call(feed, rows))[-1] in ("feed-forward", "linear")
    for given in ({}, {"cache": layer_cache}):
        told = sa.explain_call(layer, rows, **given)
        assert works(told) == ["linear", "norm", "rotation", "attention", "linear"]
        assert told["parts"][0]["flops"] >= 2 * 100 * 24 * 128
    assert layer_cache.lengths.tolist() == [0, 0]


@with_openmp
def test_the_told_threads_are_used() -> None:
    q, k = zeros(3, 2, 512), zeros(4600, 2, 512)
    x, linear = zeros(64, 512), sa.Linear(zeros(512, 2048))
    calls: list[tuple[Any, ...]] = [(sa.attention_varlen, q, k, k, [0, 1, 3], [0, 2100, 4600]), (linear, x)]
    for call, *arrays in calls:
        with recorded_regions() as asked:
            told = sa.explain_call(call, *arrays, num_threads=3)
            assert asked == []
            call(*arrays, num_threads=3)
        assert asked == [3]
        assert {part["threads"] for part in told["parts"]} == {3}


def test_nothing_is_computed(normal: Any) -> None:
    x = normal(1, 2, 40, 16)
    y = sa.attention(x, x, x)
    sa.explain_call(sa.attention, x, x, x)
    assert np.array_equal(sa.attention(x, x, x), y)
    with pytest.raises(ValueError, match="mask"):  # a call that fails in a rehearsal ends it
        sa.explain_call(sa.attention, x, x, x, mask=np.ones((3, 3), bool))
    assert np.array_equal(sa.attention(x, x, x), y)


BAD: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
    (sa.attention, (zeros(2, 4, 8),), {}),
    (sa.attention, (zeros(2, 4, 8), zeros(2, 4, 7), zeros(2, 4, 8)), {}),
    (sa.attention, (zeros(2, 4, 8),) * 3, {"casual": True}),
    (sa.attention_varlen, (zeros(4, 2, 8),) * 3, {"cu_seqlens_q": [0, 4], "softcap": -1.0}),
    (sa.attention_with_kvcache, (zeros(2, 2, 1, 32), None), {}),
]


@pytest.mark.one_isa
@pytest.mark.parametrize(("call", "arrays", "options"), BAD)
def test_errors_are_those_of_the_call(call: Any, arrays: Any, options: Any) -> None:
    with pytest.raises((TypeError, ValueError)) as wanted:
        call(*arrays, **options)
    with pytest.raises(wanted.type) as told:
        sa.explain_call(call, *arrays, **options)
    assert str(told.value) == str(wanted.value)


@pytest.mark.one_isa
def test_what_cannot_be_told_is_refused() -> None:
    x = zeros(2, 4, 8)
    with pytest.raises(ValueError, match=r"^explain_call: out is given, but nothing is computed"):
        sa.explain_call(sa.attention, x, x, x, out=x.copy())
    with pytest.raises(ValueError, match=r"^explain_call: into is given"):
        sa.explain_call(sa.attention_backward, x, x, x, x, x, x[..., 0], into={"q": x.copy()})
    with pytest.raises(TypeError, match=r"into"):
        sa.explain_call(sa.attention, x, x, x, into=x.copy())
    with pytest.raises(TypeError, match=r"^explain_call: call is set_num_threads, but attention, .* or a layer"):
        sa.explain_call(sa.set_num_threads, 1)


@pytest.mark.one_isa
def test_parts_are_printed_after_the_whole() -> None:
    printed = str(sa.explain_call(sa.attention_varlen, *[zeros(5, 2, 8)] * 3, [0, 2, 5])).split("\n\n")
    assert len(printed) == 3
    assert printed[0].startswith("isa ")
    assert all(part.startswith("work ") for part in printed[1:])
