"""The workloads that selfattn's speed is judged by, in groups with targets."""

from __future__ import annotations

from dataclasses import replace

from selfattn._bench.options import Options
from selfattn._bench.workload import Workload
from selfattn._bench.workloads import WORKLOADS, attention_workload, layer_workload

from .axes import AMX, varied_groups
from .target import Group, Target
from .yardstick import FEWER, PEAK, TIME

# Number of heads by head_dim and length: fewer for long calls.
_PREFILL_HEADS = {
    64: {128: 12, 256: 12, 512: 12, 1024: 12, 2048: 8, 4096: 4, 8192: 2},
    128: {128: 8, 256: 8, 512: 8, 1024: 8, 2048: 4, 4096: 2, 8192: 1},
}
_LONG = 2048  # from this length on, the products dominate a prefill

PREFILL = tuple(
    attention_workload(
        f"prefill-{length}-d{dim}{'-causal' if causal else ''}",
        f"prompt of {length} tokens, {heads} head{'s'[: heads - 1]} of {dim}",
        heads,
        length,
        dim,
        causal=causal,
    )
    for dim, by_length in _PREFILL_HEADS.items()
    for length, heads in by_length.items()
    for causal in (False, True)
)


def _odd(heads: int, lens: int | tuple[int, int], dim: int, causal: bool = False) -> Workload:
    q_len, kv_len = (lens, lens) if isinstance(lens, int) else lens
    label = f"{q_len}" if q_len == kv_len else f"{q_len}x{kv_len}"
    name = f"odd-{label}-d{dim}{'-causal' if causal else ''}"
    return attention_workload(name, f"{heads} heads of {dim}", heads, (q_len, kv_len), dim, causal=causal)


ODD = (
    _odd(12, 96, 32),
    _odd(12, 511, 32, causal=True),
    _odd(16, 129, 72, causal=True),
    _odd(16, 729, 72),
    _odd(8, (777, 633), 80),
    _odd(8, (100, 700), 80),
    _odd(8, 384, 96, causal=True),
    _odd(8, (700, 97), 96),
    _odd(8, 333, 160),
    _odd(8, (150, 451), 160, causal=True),
    _odd(4, 500, 256),
    _odd(8, 250, 256, causal=True),
)

# Shares of the peak, in float32 and, for the unit that multiplies pairs, in bfloat16.
_SHARES = {"embed-128": 0.72, "bert-128": 0.8, "vit-197": 0.8, "mask-bool-512": 0.76, "bias-512": 0.72}
_PAIR_SHARES = {"bert-128": 0.6, "prefill-2k-d64": 0.75}
SHORT = tuple(WORKLOADS[name] for name in (*_SHARES, "prefill-2k-d64"))

DECODE = (WORKLOADS["decode-4k-gqa"], WORKLOADS["decode-32k-gqa"])
UNGROUPED = (
    WORKLOADS["decode-4k-mha"],
    attention_workload("decode-4k-mha-d64", "one new token, 12 heads of 64", 12, (1, 4096), 64, causal=True),
    attention_workload("decode-32k-mha-d64", "one new token, 12 heads of 64", 12, (1, 32768), 64, causal=True),
)


def _few(heads: int | tuple[int, int], count: int, suffix: str = "") -> Workload:
    why = f"{count} drafted tokens on 3,000 keys{', a KV head per head' if suffix else ''}"
    return attention_workload(f"few-{count}x3000{suffix}", why, heads, (count, 3000), 128, causal=True)


_FEW_GROUPED = tuple(_few((32, 8), count) for count in (2, 3, 4, 6, 8, 12, 16))
FEW = (*_FEW_GROUPED, *(_few(8, count, "-mha") for count in (2, 4, 8, 12, 16)))

_TINY_CALLS = (WORKLOADS["tiny-64"], WORKLOADS["tiny-16"], WORKLOADS["tiny-24"])
_OVERHEAD = attention_workload("tiny-1", "one pair of numbers: nothing but call overhead", 1, 1, 1)
TINY = (*_TINY_CALLS, _OVERHEAD)

LAYER = tuple(
    layer_workload(
        f"layer-{d_model}-{length}-b{batch}", f"a layer of width {d_model}, batch {batch}", batch, length, d_model, 12
    )
    for d_model in (384, 768)
    for length in (128, 256, 512)
    for batch in (1, 8)
)


def _option(name: str, why: str, heads: int, length: int, *, without: Options, **options: object) -> Workload:
    workload = attention_workload(f"option-{name}-{length}", why, heads, length, 64, **options)
    return replace(workload, baseline=without)


_CAUSAL = Options(causal=True)
_PAIRWISE = tuple(
    _option(name, why, 12, length, without=Options(), **options)
    for name, why, options in (
        ("mask", "a boolean mask per pair", {"mask": "pairs"}),
        ("bias", "an additive bias per head and pair", {"bias": True}),
    )
    for length in (512, 1024)
)
_TILES = _option("tiles", "three of four squares of 256 pairs hidden", 12, 2048, without=Options(), mask="tiles")
_WINDOWS = (
    _option("window", "256 keys to the left", 2, 8192, without=_CAUSAL, causal=True, window=(255, 0)),
    _option("band", "128 keys to either side", 2, 8192, without=Options(), window=(128, 127)),
)
_HALF = _option("causal", "half of the pairs hidden", 12, 1024, without=Options(), causal=True)
_PER_SCORE = (
    _option("alibi", "ALiBi", 12, 1024, without=_CAUSAL, causal=True, alibi=True),
    _option("softcap", "capped scores", 12, 1024, without=_CAUSAL, causal=True, softcap=50.0),
)
OPTIONS = (*_PAIRWISE, _TILES, *_WINDOWS, _HALF, *_PER_SCORE)

DOUBLE = (
    WORKLOADS["f64-512"],
    attention_workload("f64-100-d80", "double precision, odd", 12, 100, 80, dtype="float64"),
    attention_workload("f64-1024-causal", "double precision", 12, 1024, 64, causal=True, dtype="float64"),
    attention_workload("f64-2048-d128", "double precision", 2, 2048, 128, dtype="float64"),
)


def _names(workloads: tuple[Workload, ...]) -> tuple[str, ...]:
    return tuple(workload.name for workload in workloads)


_COST = 1 / 1.15  # an option that costs 15 %

_GROUPS: dict[str, Group] = {
    group.name: group
    for group in (
        Group(
            "prefill",
            "Prefill: a prompt of S tokens",
            PREFILL,
            (
                Target("pytorch", each=1.15, mean=1.5),
                Target("pytorch", each=1.3, mean=2.0, needs=AMX),
                Target("vllm", each=1.15),
                Target(PEAK, each=0.75, threads=1, only=_names(tuple(w for w in PREFILL if w.q_len >= _LONG))),
                Target("single", each=1.85, threads=2, longer_than=1e-3),
            ),
        ),
        Group(
            "short",
            "Short prompts of common models",
            SHORT,
            tuple(Target(PEAK, each=share, threads=1, only=(name,)) for name, share in _SHARES.items()),
        ),
        Group("odd", "Mid-size and odd shapes", ODD, (Target("pytorch", each=1.1, mean=1.5),)),
        Group(
            "decode",
            "Decode: one query against many keys",
            DECODE,
            (Target("pytorch", each=3.0), Target(PEAK, each=0.85)),
        ),
        Group(
            "ungrouped",
            "Decode without groups",
            UNGROUPED,
            (Target(PEAK, each=0.92, threads=1), Target("numpy", each=1.0)),
        ),
        Group(
            "few",
            "A few queries against 3,000 keys",
            FEW,
            (
                Target("pytorch", each=2.5, only=_names(_FEW_GROUPED)),
                # No cliff at the switch from one kernel to the next: at most a quarter more than proportional time.
                Target(FEWER, each=1 / 1.25),
            ),
        ),
        Group(
            "tiny",
            "Tiny: call overhead counts",
            TINY,
            (
                Target("pytorch", each=3.0, only=_names(_TINY_CALLS)),
                Target(TIME, each=3e-6, threads=1, only=(_OVERHEAD.name,)),
            ),
        ),
        Group("layer", "SelfAttention: projections and attention", LAYER, (Target("pytorch", each=1.25),)),
        Group(
            "options",
            "Options against the same call without",
            OPTIONS,
            (
                Target("plain", each=8.0, only=_names(_WINDOWS)),
                Target("plain", each=_COST, only=_names(_PAIRWISE)),
                # A quarter of the work, at the cost of a mask.
                Target("plain", each=4 * _COST, only=(_TILES.name,)),
                # Half of the tiles; those on the diagonal are computed in full although half of each is hidden.
                Target("plain", each=1.6, only=(_HALF.name,)),
                Target("plain", each=_COST, only=_names(_PER_SCORE)),
            ),
        ),
        Group("float64", "Double precision", DOUBLE, (Target("pytorch", each=1.2),)),
    )
}

_SHORT_IN_PAIRS = (
    _GROUPS["short"]
    .varied("bfloat16", "highest")
    .judged_by(tuple(Target(PEAK, share, threads=1, only=(f"{name}-bf16",)) for name, share in _PAIR_SHARES.items()))
)

GROUPS: dict[str, Group] = {
    **_GROUPS,
    _SHORT_IN_PAIRS.name: _SHORT_IN_PAIRS,
    **{group.name: group for group in varied_groups(_GROUPS)},
}

EVERY: dict[str, Workload] = {
    **WORKLOADS,
    **{workload.name: workload for group in GROUPS.values() for workload in group.workloads},
}
