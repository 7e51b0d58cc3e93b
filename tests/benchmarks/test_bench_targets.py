"""The grid, its targets, and how results are judged by them. Nothing about speed."""

from __future__ import annotations

import pytest

from selfattn._bench.peer import MAX_SCORES_BYTES, Own
from selfattn._bench.peers import PEERS
from selfattn._bench.workloads import WORKLOADS
from workbench.cache_grid import CACHE_GROUPS
from workbench.grid import EVERY, GROUPS
from workbench.target import Group, Target, judge
from workbench.yardstick import FEWER, PEAK, TIME, YARDSTICKS

IN_GROUPS = [workload for group in GROUPS.values() for workload in group.workloads]
FIRST = ("float32", "highest")
MAX_FLOPS = 4e10  # less than a second on any core with vectors


def group(*targets: Target) -> Group:
    return Group("g", "a test", GROUPS["tiny"].workloads, targets)


def test_names_of_groups_are_unique_and_mean_one_workload():
    names = [workload.name for workload in IN_GROUPS]
    assert len(set(names)) == len(names)
    assert all(workload.why for workload in IN_GROUPS)
    assert all(EVERY[name] == workload for name, workload in WORKLOADS.items())
    assert set(EVERY) == set(names) | set(WORKLOADS)


def test_the_grid_is_the_promised_one():
    shapes = {(w.q_len, w.head_dim, w.options.causal) for w in GROUPS["prefill"].workloads}
    lengths = (128, 256, 512, 1024, 2048, 4096, 8192)
    assert shapes == {(length, dim, causal) for length in lengths for dim in (64, 128) for causal in (False, True)}
    odd = GROUPS["odd"].workloads
    assert {w.head_dim for w in odd} == {32, 72, 80, 96, 160, 256}
    assert sum(w.q_len != w.kv_len for w in odd) >= 3
    few = GROUPS["few"].workloads
    assert [w.q_len for w in few if w.group_size == 4] == [2, 3, 4, 6, 8, 12, 16]
    assert [w.q_len for w in few if w.group_size == 1] == [2, 4, 8, 12, 16]
    assert {w.kv_len for w in GROUPS["decode"].workloads} == {4096, 32768}
    bound_by_memory = {w.name for w in IN_GROUPS if w.memory_bound and (w.dtype, w.precision) == FIRST}
    decoding = {w.name for name in ("decode", "ungrouped") for w in GROUPS[name].workloads}
    assert bound_by_memory == decoding | {"few-2x3000-mha", "few-4x3000-mha"}
    assert len(GROUPS["layer"].workloads) == 12


@pytest.mark.parametrize("workload", IN_GROUPS, ids=lambda w: w.name)
def test_calls_are_short_and_fit_every_peer(workload):
    assert workload.flops() < MAX_FLOPS
    assert workload.batch * workload.num_heads * workload.q_len * workload.kv_len * 4 < MAX_SCORES_BYTES


def test_targets_name_peers_and_workloads_that_are_there():
    for member in GROUPS.values():
        names = {workload.name for workload in member.workloads}
        for target in member.targets:
            assert target.against in YARDSTICKS
            assert set(target.only) <= names
            assert target.against != "plain" or all(EVERY[name].baseline for name in target.only)
    peak = next(target for target in GROUPS["prefill"].targets if target.against == PEAK)
    assert {EVERY[name].q_len for name in peak.only} == {2048, 4096, 8192}


def test_every_option_has_a_target():
    counted = [name for target in GROUPS["options"].targets if target.against == "plain" for name in target.only]
    assert sorted(counted) == sorted(workload.name for workload in GROUPS["options"].workloads)


@pytest.mark.parametrize(("name", "enough"), [("causal", 1.6), ("alibi", 0.87), ("softcap", 0.87)])
def test_options_are_held_against_the_call_without(made_up, name, enough):
    def states(ratio):
        verdicts = judge(GROUPS["options"], [made_up(f"option-{name}-1024", plain=ratio)])
        return {verdict.state for verdict in verdicts if verdict.values}

    assert states(enough) == {"met"}
    assert states(enough - 0.01) == {"missed"}


def test_a_mean_and_a_floor_are_both_required(made_up):
    both = group(Target("pytorch", each=1.1, mean=1.5))

    def state(*ratios):
        names = ("tiny-64", "tiny-16", "tiny-24")
        (verdict,) = judge(both, [made_up(name, pytorch=x) for name, x in zip(names, ratios, strict=False)])
        return verdict.state

    assert state(1.5, 1.5, 1.5) == "met"
    assert state(1.1, 2.25) == "met"
    assert state(1.09, 9.0) == "missed"
    assert state(1.4, 1.5) == "missed"


def test_the_verdict_names_the_worst(made_up):
    (verdict,) = judge(
        group(Target("pytorch", each=3.0)), [made_up("tiny-64", pytorch=4.0), made_up("tiny-16", pytorch=1.0)]
    )
    assert verdict.mean == pytest.approx(2.0)
    assert str(verdict) == "PyTorch, 1 thread: geomean 2.00x, worst 1.00x (target 3.00x) tiny-16: missed"
    target = Target(PEAK, each=0.75, mean=0.8, only=("tiny-64",))
    (verdict,) = judge(group(target), [made_up("tiny-64", fraction=0.85)])
    assert str(verdict) == "peak, 1 thread, 1 workload: geomean 85% (target 80%), worst 85% (target 75%) tiny-64: met"


def test_targets_count_where_they_say(made_up):
    target = Target("single", each=1.85, threads=2, only=("tiny-64", "tiny-16"), longer_than=1e-3)
    slow = {"seconds": 1e-3, "single": 1.5}
    results = [
        made_up("tiny-64", threads=2, **slow),
        made_up("tiny-16", threads=2, seconds=4e-4, single=1.5),
        made_up("tiny-24", threads=2, **slow),
        made_up("tiny-64", threads=1, **slow),
    ]
    (verdict,) = judge(group(target), results)
    assert verdict.values == {"tiny-64": 1.5}
    assert judge(group(target), results[3:]) == []


def test_what_was_not_measured_is_said(made_up):
    (verdict,) = judge(group(Target("pytorch", each=3.0)), [made_up("tiny-64")])
    assert str(verdict) == "PyTorch, 1 thread: not measured"
    assert not verdict.missed


def test_peers_without_a_target_must_not_be_faster(made_up):
    result = made_up("tiny-64", threads=2, pytorch=5.0, jax=0.99, onnxruntime=1.0, single=0.5)
    states = {verdict.target.against: verdict.state for verdict in judge(group(Target("pytorch", each=3.0)), [result])}
    assert states == {"pytorch": "met", "jax": "missed", "onnxruntime": "met"}


def test_a_peer_must_not_be_faster_where_its_target_says_nothing(made_up):
    results = [made_up("tiny-64", pytorch=4.0), made_up("tiny-16", pytorch=0.9)]
    _, rest = judge(group(Target("pytorch", each=3.0, only=("tiny-64",))), results)
    assert rest.values == {"tiny-16": 0.9}
    assert rest.missed


def test_more_queries_take_little_more_than_in_proportion(made_up):
    def verdict(seconds):
        target = next(target for target in GROUPS["few"].targets if target.against == FEWER)
        results = [made_up(f"few-{count}x3000-mha", seconds=value) for count, value in seconds.items()]
        (found,) = judge(Group("g", "a test", GROUPS["few"].workloads, (target,)), results)
        return found

    assert verdict({2: 2e-3, 4: 4.99e-3}).state == "met"
    assert verdict({2: 2e-3, 4: 5.01e-3}).state == "missed"
    cliff = verdict({16: 8e-3, 2: 2e-3, 4: 5.12e-3, 8: 6.4e-3})
    assert cliff.values == pytest.approx({"few-4x3000-mha": 1 / 1.28, "few-8x3000-mha": 1.6, "few-16x3000-mha": 1.6})
    assert str(cliff) == (
        "queries per second with fewer queries, 1 thread: "
        "geomean 1.26x, worst 0.78x (target 0.80x) few-4x3000-mha: missed"
    )


def test_a_time_is_a_limit(made_up):
    def verdict(*seconds):
        results = [made_up(name, seconds=value) for name, value in zip(("tiny-1", "tiny-64"), seconds, strict=False)]
        return judge(group(Target(TIME, each=3e-6)), results)[0]

    assert str(verdict(2.1e-6)) == "time of a call, 1 thread: tiny-1 at most 3 us: 2.1 us: met"
    assert str(verdict(2.1e-6, 3.2e-6)) == "time of a call, 1 thread: tiny-64 at most 3 us: 3.2 us: missed"
    assert str(Target(TIME, each=3e-6, threads=1)) == "time of a call, 1 thread: each at most 3 us"


def test_overhead_is_held_against_the_clock_on_one_thread(made_up):
    def verdicts(seconds, threads=1):
        found = judge(GROUPS["tiny"], [made_up("tiny-1", threads, seconds=seconds, pytorch=1.5)])
        return {verdict.target.against: verdict.state for verdict in found if verdict.target.only == ("tiny-1",)}

    assert EVERY["tiny-1"].flops() == 4
    assert verdicts(2.9e-6) == {"time": "met", "pytorch": "met"}
    assert verdicts(3.1e-6) == {"time": "missed", "pytorch": "met"}
    assert verdicts(3.1e-6, threads=2) == {"pytorch": "met"}


def test_queries_are_compared_within_a_series_and_a_number_of_threads(made_up):
    results = [made_up("few-2x3000"), made_up("few-4x3000-mha"), made_up("few-4x3000", 2)]
    verdicts = [verdict for verdict in judge(GROUPS["few"], results) if verdict.target.against == FEWER]
    assert [str(verdict) for verdict in verdicts] == [
        "queries per second with fewer queries, 1 thread: not measured",
        "queries per second with fewer queries, 2 threads: not measured",
    ]


def test_groups_add_the_variants_they_are_held_against():
    assert GROUPS["prefill"].peers(["pytorch"], 2) == ["pytorch", "single"]
    assert GROUPS["prefill"].peers(["pytorch"], 1) == ["pytorch"]
    assert GROUPS["options"].peers([], 1) == ["plain"]
    assert GROUPS["tiny"].peers(["jax"], 2) == ["jax"]


def test_variants_are_of_selfattn():
    assert all(isinstance(PEERS[name], Own) for name in ("plain", "single"))


def test_a_cascade_is_judged_by_the_peak_of_the_unit(made_up):
    results = [made_up("cache-cascade-16", fraction=fraction) for fraction in (0.751, 0.749)]
    assert [judge(CACHE_GROUPS["cascade"], [result])[0].state for result in results] == ["met", "missed"]
