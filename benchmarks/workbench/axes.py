"""The grid's groups in other dtypes and at other precisions, with their own targets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from selfattn._bench.workload import Workload
from selfattn._typing import Precision

from .target import Group, Target
from .yardstick import PEAK

AXES: tuple[tuple[str, Precision], ...] = (
    ("float32", "high"),
    ("float32", "medium"),
    ("bfloat16", "highest"),
    ("float16", "highest"),
)
FAMILIES = ("prefill", "decode", "few", "tiny", "layer")

AMX = "amx"  # part of the names of ISAs with AMX
SOFTMAX = ("heads-32", "heads-64")  # calls that separate the softmax's time from that of the products

_LONG = 2048  # from this length on, the products dominate a prefill
_NO_SLOWER = 1.0  # for targets that only ask for a geometric mean


def varied_groups(groups: Mapping[str, Group]) -> Iterator[Group]:
    """Yield every family in every dtype and precision except the grid's own."""
    for family in FAMILIES:
        for dtype, precision in AXES:
            group = groups[family].varied(dtype, precision)
            make = _TARGETS.get((family, dtype, precision))
            yield group.judged_by(make(group) if make else (), _variants_of(group))


def _variants_of(group: Group) -> tuple[str, ...]:
    return SOFTMAX if group.family == "prefill" and group.workloads[0].itemsize == 2 else ()


def _names(group: Group, counts: Callable[[Workload], bool]) -> tuple[str, ...]:
    return tuple(workload.name for workload in group.workloads if counts(workload))


def _prefill_bfloat16(group: Group) -> tuple[Target, ...]:
    wide = _names(group, lambda w: w.q_len >= _LONG and w.head_dim == 128)
    return (
        Target("pytorch", each=2.5, mean=3.5, needs=AMX),
        Target("vllm", each=2.0, needs=AMX),
        Target(PEAK, each=0.45, needs=AMX, only=wide),
        _without_amx(group),
    )


def _prefill_float16(group: Group) -> tuple[Target, ...]:
    return (Target("pytorch", each=2.5, mean=4.0, needs=AMX), _without_amx(group))


def _without_amx(group: Group) -> Target:
    return Target("pytorch", each=_NO_SLOWER, mean=1.5, without=AMX)


def _prefill_high(group: Group) -> tuple[Target, ...]:
    return (Target("pytorch", each=_NO_SLOWER, mean=3.0, needs=AMX),)


def _decode(group: Group) -> tuple[Target, ...]:
    return (Target("pytorch", each=3.5), Target(PEAK, each=0.85))


def _tiny(group: Group) -> tuple[Target, ...]:
    return (Target("pytorch", each=2.0, only=_names(group, lambda w: w.kv_len > 1)),)


def _layer(group: Group) -> tuple[Target, ...]:
    return (Target("pytorch", each=1.5, only=_names(group, lambda w: w.d_model == 768)),)


_TARGETS: dict[tuple[str, str, str], Callable[[Group], tuple[Target, ...]]] = {
    ("prefill", "bfloat16", "highest"): _prefill_bfloat16,
    ("prefill", "float16", "highest"): _prefill_float16,
    ("prefill", "float32", "high"): _prefill_high,
    ("decode", "bfloat16", "highest"): _decode,
    ("decode", "float16", "highest"): _decode,
    ("tiny", "bfloat16", "highest"): _tiny,
    ("tiny", "float16", "highest"): _tiny,
    ("layer", "bfloat16", "highest"): _layer,
}
