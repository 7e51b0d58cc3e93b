"""The workloads that caches are judged by, in groups with targets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from selfattn._bench.options import Cache
from selfattn._bench.workload import Workload
from selfattn._bench.workloads import attention_workload

from .cache_variants import CONTIGUOUS, ONE_QUERY, TWICE
from .target import Group, Target
from .yardstick import OVERHEAD, PEAK, UNIT

GQA = (32, 8)
LATENT_DIMS = (
    576,
    512,
)  # DeepSeek-V2 and V3: a latent of 512 numbers and a rotated key of 64; the values are the latent
LONG = 8192
OVERHEAD_GROUP = "overhead"
SHORTEST, LONGEST = 100, 8000  # range of the mixed lengths
STEP_KEYS = 33  # number of keys in the first step; 96 on average


def _on_cache(name: str, why: str, lens: tuple[int, int], heads: Any = GQA, dim: Any = 128, **options: Any) -> Workload:
    cache = options.pop("cache", Cache())
    causal = lens[0] > 1
    workload = attention_workload(f"cache-{name}", why, heads, lens, dim, causal=causal, **options)
    return replace(workload, cache=cache)


DECODE = (
    _on_cache("decode-4k", "one query, 4,096 keys", (1, 4096)),
    _on_cache("decode-32k", "one query, 32,768 keys", (1, 32768)),
)


def _mixed(batch: int, page_size: int) -> Workload:
    lens = tuple(int(n) for n in np.random.default_rng(batch).integers(SHORTEST, LONGEST + 1, batch))
    name, where = (f"mixed-{batch}-paged", "pages of 16") if page_size else (f"mixed-{batch}", "a contiguous cache")
    why = f"{batch} sequences of {min(lens):,} to {max(lens):,} keys in {where}"
    cache = Cache(page_size=page_size)
    return _on_cache(name, why, (1, max(lens)), batch=batch, kv_lens=lens, mask="keys", cache=cache)


MIXED = (_mixed(8, 0), _mixed(8, 16))
MANY_MIXED = tuple(_mixed(batch, page_size) for batch in (16, 32) for page_size in (0, 16))
SIZES = tuple(
    _on_cache(f"group-{size}", f"{size} query head{'s'[: size - 1]} to a KV head", (1, LONG), (8 * size, 8))
    for size in (1, 3, 5, 6, 7, 8, 16)
)
QUERIES = tuple(
    _on_cache(
        f"queries-{count}-g{size}",
        f"{count} new token{'s'[: count - 1]}, groups of {size}",
        (count, LONG),
        (8 * size, 8),
    )
    for size in (1, 4)
    for count in (1, 2, 4, 8, 16)
)
_EIGHT = tuple(workload.name for workload in QUERIES if workload.q_len == 8)
PAGED = tuple(
    _on_cache(f"paged-{size}", f"pages of {size} tokens in random order", (1, LONG), cache=Cache(page_size=size))
    for size in (16, 64)
)
PAGED_INT8 = tuple(
    _on_cache(f"paged-int8-{size}", f"pages of {size} tokens of int8", (1, LONG), cache=Cache("int8", page_size=size))
    for size in (16, 64)
)
INT8 = tuple(
    _on_cache(f"int8-{label}", f"one query, {length:,} keys of int8", (1, length), cache=Cache("int8"))
    for label, length in (("8k", LONG), ("32k", 4 * LONG))
)
CASCADE = (
    _on_cache(
        "cascade-16",
        "16 answers to one prompt of 4,096 tokens, 64 tokens each",
        (1, 4096 + 64),
        batch=16,
        cache=Cache(page_size=16, shared=4096, cascade=True),
    ),
)
LATENTS = tuple(
    _on_cache(
        f"latents-{label}-h{heads}",
        f"one query of {heads} heads, {length:,} latents",
        (1, length),
        (heads, 1),
        LATENT_DIMS,
        dtype="bfloat16",
        cache=Cache(values="prefix"),
    )
    # With 128 heads and 32k latents, the float64 reference would need 19 GB.
    for label, length, heads in (("4k", 4096, 16), ("4k", 4096, 128), ("32k", 8 * 4096, 16))
)
STEPS = (
    _on_cache("step", "append a token and attend", (1, STEP_KEYS), 1, 8, cache=Cache(step=True)),
    _on_cache("step-paged", "the same in pages", (1, STEP_KEYS), 1, 8, cache=Cache(page_size=16, step=True)),
)


def _in_types(group: Group) -> tuple[Group, ...]:
    """Return a group and its copy in bfloat16, with the same targets."""
    return (group, _twin(group, "bfloat16"))


def _judged(group: Group, dtype: str, *targets: Target) -> Group:
    """Return a group of float32 workloads in a dtype, with targets that name these workloads."""
    judged = replace(group, targets=targets)
    return judged if dtype == "float32" else _twin(judged, dtype)


def _twin(group: Group, dtype: str) -> Group:
    twin = group.varied(dtype, "highest")
    names = {old.name: new.name for old, new in zip(group.workloads, twin.workloads, strict=True)}
    targets = tuple(replace(target, only=tuple(names[name] for name in target.only)) for target in group.targets)
    return twin.judged_by(targets, group.variants)


_PAGED = Group("paged", "Pages compared with a contiguous cache", PAGED, (Target(CONTIGUOUS, each=1.08),))
_MIXED = Group(
    "mixed",
    "Mixed lengths in a batch (for PyTorch padding and a boolean mask)",
    MIXED,
    # At most 1.1 times the time that it takes to read all keys and values.
    (Target("pytorch", each=3.0), Target(PEAK, each=1 / 1.1)),
)

_IN_L3, _IN_MEMORY = ((workload.name,) for workload in DECODE)  # where K and V are in 16 bits on common processors
_DECODE = Group("decode", "Decode: one query", DECODE, ())
_QUERIES = Group("queries", "Several new queries", QUERIES, ())


def _decode(dtype: str, *peaks: Target) -> Group:
    return _judged(_DECODE, dtype, Target("pytorch", each=3.5), *peaks)


def _queries(dtype: str, limit: float) -> Group:
    return _judged(_QUERIES, dtype, Target(ONE_QUERY, each=limit, only=_EIGHT), Target("pytorch", each=1.0))


CACHE_GROUPS: dict[str, Group] = {
    group.name: group
    for group in (
        _decode("float32", Target(PEAK, each=0.75, only=_IN_L3), Target(PEAK, each=0.85, only=_IN_MEMORY)),
        *(
            _decode(dtype, Target(PEAK, 0.65, only=_IN_L3), Target(PEAK, 0.85, threads=2, only=_IN_MEMORY))
            for dtype in ("bfloat16", "float16")
        ),
        _MIXED,
        _twin(replace(_MIXED, workloads=(*MIXED, *MANY_MIXED)), "bfloat16"),
        *_in_types(
            Group(
                "groups",
                "Group sizes: query heads to each of 8 KV heads",
                SIZES,
                (Target("pytorch", each=1.0),),
                variants=("group-1",),
            )
        ),
        _queries("float32", 2.3),
        _queries("bfloat16", 3.0),
        *_in_types(_PAGED),
        _twin(_PAGED, "float16"),
        Group("paged-int8", "Pages of 8-bit codes", PAGED_INT8, (Target(CONTIGUOUS, each=1.08),)),
        *_in_types(
            Group(
                "int8",
                "8-bit codes compared with bfloat16",
                INT8,
                (Target("bf16-cache", each=1.6, only=(INT8[-1].name,)),),
            )
        ),
        *_in_types(
            Group(
                "cascade",
                "One prompt that many answers share",
                CASCADE,
                (Target(UNIT, each=0.75),),
                variants=("no-cascade",),
            )
        ),
        Group(
            "latents",
            "Latent attention: keys and values in one row, bfloat16",
            LATENTS,
            (Target(UNIT, each=0.70),),  # with 16 heads and more, arithmetic takes longer than reading
        ),
        Group(
            OVERHEAD_GROUP,
            "A step: overhead besides arithmetic",
            STEPS,
            tuple(
                Target(OVERHEAD, each=limit, threads=1, only=(step.name,))
                for step, limit in zip(STEPS, (3e-6, 4e-6), strict=True)
            ),
            variants=("core", TWICE),
        ),
    )
}

ON_CACHES: dict[str, Workload] = {
    workload.name: workload for group in CACHE_GROUPS.values() for workload in group.workloads
}
