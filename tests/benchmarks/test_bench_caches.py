"""benchmarks/caches.py: its workloads are correct, its groups are complete, and each target can be missed."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
from places import BENCHMARKS
from scripts import load_script

import selfattn
from selfattn import _core
from selfattn._bench.check import Mismatch, check, expected_parts, storage_error, unit_of
from selfattn._bench.measure import check_all, check_storage, measure
from selfattn._bench.options import Cache
from selfattn._bench.peers import PEERS
from selfattn._bench.timing import BANDWIDTH, interleave
from selfattn._bench.workload import Workload
from selfattn._bench.workloads import attention_workload
from workbench import allocations, targets_command
from workbench.cache_grid import CACHE_GROUPS, LONGEST, ON_CACHES, SHORTEST
from workbench.cache_variants import CACHE_VARIANTS
from workbench.cached import STEPS, Filled, stored
from workbench.grid import EVERY
from workbench.target import judge

SCRIPT = BENCHMARKS / "caches.py"
TYPES = ("float32", "bfloat16", "float16")
OWN = PEERS["selfattn"]


def small(cache: Cache, q_len: int = 1, batch: int = 2, kv_len: int = 40, **options) -> Workload:
    workload = attention_workload(
        "small", "a test", (4, 2), (q_len, kv_len), 16, batch=batch, causal=q_len > 1, **options
    )
    return replace(workload, cache=cache)


SMALL = {
    "contiguous": small(Cache()),
    "queries": small(Cache(), q_len=5),
    "lengths": small(Cache(), kv_lens=(17, 40), mask="keys"),
    "paged": small(Cache(page_size=8), kv_lens=(17, 40), mask="keys"),
    "int8": small(Cache("int8")),
    "cascade": small(Cache(page_size=8, shared=16, cascade=True), batch=3),
    "step": small(Cache(step=True), batch=1),
    "paged-step": small(Cache(page_size=8, step=True), batch=1),
    "latents": replace(small(Cache(values="prefix")), value_dim=12),
    "paged-latents": replace(small(Cache(page_size=8, values="prefix")), value_dim=12),
}


def test_a_cascade_may_round_as_the_call_on_its_shared_prompt_does(monkeypatch):
    def rounds_many_rows(q, k, v, **options):
        return {"unit": "bfloat16 pairs" if q.shape[0] * q.shape[2] > 1 and q.shape[0] == 1 else "fma"}

    monkeypatch.setattr(selfattn, "explain", rounds_many_rows)
    assert unit_of(SMALL["cascade"]) == "bfloat16 pairs"
    assert unit_of(SMALL["paged"]) == "fma"


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", SMALL)
def test_every_way_to_a_cache_is_right(name, dtype):
    workload = SMALL[name].varied(dtype)
    arrays = workload.make_arrays()
    peers = [peer for peer in CACHE_VARIANTS if peer.supports(workload)]
    runs = {peer.name: peer.prepare(workload, arrays, 2) for peer in (OWN, *peers)}
    assert len(runs) > 1 or (name, dtype) == ("int8", "float16")
    assert max(check_all(workload, arrays, runs, peers).values()) <= 1


@pytest.mark.parametrize("name", SMALL)
def test_a_cache_that_holds_something_else_is_found(name):
    workload = SMALL[name]
    arrays = workload.make_arrays()
    changed = "v" if workload.cache.values == "own" else "k"
    run = OWN.prepare(workload, {**arrays, changed: arrays[changed] + np.float32(1e-3)}, 1)
    with pytest.raises(Mismatch):
        check("a test", np.asarray(run()), expected_parts(workload, stored(workload, arrays)))


def test_errors_of_codes_are_small_and_reported():
    workload = SMALL["int8"]
    arrays = workload.make_arrays()
    held = stored(workload, arrays)
    step = np.abs(arrays["k"]).max(axis=-1, keepdims=True) / 127
    assert np.abs(held["k"] - arrays["k"]).max() > 0 and np.all(np.abs(held["k"] - arrays["k"]) <= step * 0.501)  # noqa: PT018
    run = OWN.prepare(workload, arrays, 1)
    error = check_storage(workload, arrays, run)
    assert 1e-5 < error < 0.02
    assert error == storage_error(workload, arrays, np.asarray(run()))
    wrong = {**arrays, "v": arrays["v"] * np.float32(1.1)}
    with pytest.raises(Mismatch, match="storing k and v has an error of"):
        check_storage(workload, wrong, run)
    assert check_storage(SMALL["paged"], {}, run) is None


def test_pages_are_in_random_order_and_shared():
    filled = Filled(SMALL["cascade"], SMALL["cascade"].make_arrays())
    held = [_core.sequence(filled.cache._pool, sequence)[2].tolist() for sequence in filled.sequences]
    pages = [page for row in held for page in row[2:]]
    assert pages not in (sorted(pages), sorted(pages, reverse=True))
    assert len({tuple(row[:2]) for row in held}) == 1
    assert len({tuple(row[2:]) for row in held}) == 3
    assert [filled.cache.length(sequence) for sequence in filled.sequences] == [40, 40, 40]


@pytest.mark.parametrize("name", ["step", "paged-step"])
def test_steps_append_and_are_taken_back(name, monkeypatch):
    workload = SMALL[name]
    rewound, rewind = [], Filled.rewind
    monkeypatch.setattr(Filled, "rewind", lambda self: (rewound.append(1), rewind(self)))
    run = OWN.prepare(workload, workload.make_arrays(), 1)
    first = np.asarray(run()).copy()
    for _ in range(STEPS - 1):
        later = run()
    assert not rewound
    assert not np.array_equal(first, later)
    assert np.array_equal(run(), first)
    assert len(rewound) == 1


def test_bytes_are_those_of_the_cache():
    row = 2 * 2 * 16  # heads, K and V, numbers
    assert SMALL["contiguous"].kv_bytes() == 2 * 40 * row * 4
    assert SMALL["lengths"].kv_bytes() == 57 * row * 4
    assert SMALL["paged"].varied("float16").kv_bytes() == 57 * row * 2
    assert SMALL["int8"].kv_bytes() == 2 * 40 * (row + 2 * 2 * 4)
    assert SMALL["cascade"].kv_bytes() == (16 + 3 * 24) * row * 4
    assert all(workload.memory_bound for workload in SMALL.values())


def test_gauges_take_their_turn():
    order = []
    found = interleave({"a": lambda: order.append("a")}, 0.0, {"g": lambda: order.append("g") or 0.25})
    assert found["g"] == [0.25] * len(found["a"])
    assert order.count("g") == 5
    assert "".join(order).rstrip("g").count("g") >= 3


def test_the_bandwidth_is_of_the_same_rounds():
    workload = SMALL["int8"]
    result = measure(workload, [PEERS["bf16-cache"]], threads=1, seconds=0.01)
    assert set(result.times) == {"selfattn", "bf16-cache", BANDWIDTH}
    assert result.fraction_of_peak == result.ratios[BANDWIDTH].median
    assert result.bandwidth == pytest.approx(workload.kv_bytes() / result.times[BANDWIDTH].median)
    assert result.storage_error > 0
    assert type(result).from_dict(json.loads(json.dumps(result.to_dict()))) == result


def test_peers_run_only_what_is_the_same_for_them():
    numpy = PEERS["numpy"]
    assert "numpy" in measure(SMALL["paged"], [numpy], threads=1, seconds=0.01).ratios
    assert measure(SMALL["int8"], [numpy], threads=1, seconds=0.01).skipped["numpy"].endswith("in another type")
    assert measure(SMALL["step"], [numpy], threads=1, seconds=0.01).skipped == {"numpy": "it appends nothing"}


def test_the_grid_is_the_promised_one():
    assert not set(ON_CACHES) & set(EVERY)
    by_family = {
        family: [w for group in CACHE_GROUPS.values() if group.family == family for w in group.workloads]
        for family in ("decode", "mixed", "groups", "queries", "paged", "int8", "cascade")
    }
    assert {(w.kv_len, w.dtype, w.num_heads, w.num_kv_heads, w.head_dim) for w in by_family["decode"]} == {
        (length, dtype, 32, 8, 128) for length in (4096, 32768) for dtype in TYPES
    }
    assert {(w.batch, w.cache.page_size > 0) for w in by_family["mixed"] if w.dtype == "bfloat16"} == {
        (batch, paged) for batch in (8, 16, 32) for paged in (False, True)
    }
    assert all(SHORTEST <= n <= LONGEST for w in by_family["mixed"] for n in w.options.kv_lens)
    assert {w.group_size for w in by_family["groups"]} == {1, 3, 5, 6, 7, 8, 16}
    assert {(w.q_len, w.group_size) for w in by_family["queries"]} == {(n, g) for n in (1, 2, 4, 8, 16) for g in (1, 4)}
    assert {w.cache.page_size for w in by_family["paged"]} == {16, 64}
    assert {(w.kv_len, w.cache.dtype) for w in by_family["int8"]} == {(8192, "int8"), (32768, "int8")}
    assert {(w.batch, w.cache.shared, w.kv_len) for w in by_family["cascade"]} == {(16, 4096, 4160)}


@pytest.mark.parametrize("workload", ON_CACHES.values(), ids=lambda w: w.name)
def test_workloads_fit_in_memory_and_survive_json(workload):
    rows = workload.batch * workload.kv_len * workload.num_kv_heads * 2 * workload.head_dim * workload.itemsize
    assert 2 * rows + workload.kv_bytes() < 4e9  # of arrays, of a cache with padding, and of the array that is streamed
    assert Workload.from_dict(json.loads(json.dumps(asdict(workload)))) == workload


# Results that just meet each target, and results that just miss it.
VERDICTS = {
    "decode": ("cache-decode-4k", {"pytorch": 3.5, BANDWIDTH: 0.75}, {"pytorch": 3.49, BANDWIDTH: 0.74}),
    "decode-bf16": ("cache-decode-32k-bf16", {"vllm": 1.0}, {"vllm": 0.99}),
    "mixed-bf16": ("cache-mixed-32-paged-bf16", {"pytorch": 3, BANDWIDTH: 0.91}, {"pytorch": 2.9, BANDWIDTH: 0.9}),
    "queries": ("cache-queries-8-g4", {"one-query": 1 / 2.29}, {"one-query": 1 / 2.31}),
    "paged-bf16": ("cache-paged-16-bf16", {"contiguous": 1 / 1.07}, {"contiguous": 1 / 1.09}),
    "int8": ("cache-int8-32k", {"bf16-cache": 1.6}, {"bf16-cache": 1.59}),
}


@pytest.mark.parametrize("group", VERDICTS)
def test_each_target_can_be_met_and_missed(group, made_up):
    name, enough, too_little = VERDICTS[group]
    for ratios, state in ((enough, "met"), (too_little, "missed")):
        result = made_up(name, **{BANDWIDTH: 0.95, **ratios})
        verdicts = {
            (v.target.against.replace("peak", BANDWIDTH), v.state) for v in judge(CACHE_GROUPS[group], [result])
        }
        assert {(against, state) for against in ratios} <= verdicts


def test_the_overhead_is_what_a_line_through_two_steps_has_without_keys(made_up):
    def verdict(twice, seconds=3.2e-6):
        result = made_up("cache-step", seconds=seconds, **{"twice-the-keys": twice})
        return str(judge(CACHE_GROUPS["overhead"], [result])[0])

    assert verdict(1.1) == "overhead of a step, 1 thread, 1 workload: cache-step at most 3 us: 2.88 us: met"
    assert verdict(1.01).endswith("3.17 us: missed")
    assert judge(CACHE_GROUPS["overhead"], [made_up("cache-step", 2, **{"twice-the-keys": 1.0})]) == []


def test_twice_the_keys_are_twice_as_many_on_the_average():
    workload = ON_CACHES["cache-step"]
    twice = PEERS["twice-the-keys"].answered(workload)
    later = (STEPS - 1) / 2
    assert twice.kv_len + later == 2 * (workload.kv_len + later)


def test_steps_are_counted_without_a_rewind():
    assert 1 + allocations.WARM_CALLS + allocations.CALLS <= STEPS
    assert set(allocations.STEPS) == {w.name for w in CACHE_GROUPS["overhead"].workloads}


@pytest.mark.uncounted
@pytest.mark.skipif(bool(allocations.why_not()), reason=allocations.why_not())
def test_allocations_of_steps_are_counted(script):
    counts = allocations.count(script.SHIM, 1, ("tiny-16", *allocations.STEPS))
    assert counts == dict.fromkeys(("tiny-16", *allocations.STEPS), (0, 0))


@pytest.fixture
def script():
    return load_script("caches")


def run_script(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True, check=False)


def test_the_script_lists():
    listed = run_script("--list").stdout
    assert all(name in listed for name in ON_CACHES)
    assert "target time over that of selfattn on a contiguous cache: each at most 1.08x" in listed


def test_the_script_measures_judges_and_writes(tmp_path):
    file = tmp_path / "r.json"
    done = run_script(
        "--workloads", "cache-step", "--threads", "1", "--peers", "numpy", "--seconds", "0.02", "--json", str(file)
    )
    assert "overhead of a step, 1 thread, 1 workload: cache-step at most 3 us: " in done.stdout
    assert "NumPy: cache-step: it appends nothing" in done.stdout
    assert done.returncode == (done.stdout.splitlines()[-1] != "no target missed")
    (record,) = json.loads(file.read_text())["results"]
    assert set(record["times"]) == {"selfattn", "twice-the-keys", "core", BANDWIDTH}


@pytest.mark.parametrize("counted", [True, False])
def test_an_allocation_of_a_step_is_a_failure(script, monkeypatch, counted):
    asked = []
    monkeypatch.setattr(script, "run", lambda args: 0)
    monkeypatch.setattr(script.allocations, "show", lambda source, threads, cases: asked.append(threads) or threads < 2)
    groups = [] if counted else ["--groups", "int8"]
    monkeypatch.setattr(sys, "argv", ["caches.py", *groups])
    assert script.main() == int(counted)
    assert asked == ([1, 2] if counted else [])


def test_usual_peers_are_those_asked_for(monkeypatch):
    parser = argparse.ArgumentParser()
    targets_command.add_arguments(parser, CACHE_GROUPS, ("numpy",))
    assert targets_command._peers(parser.parse_args([])) == ["numpy"]
    assert "numpy" not in targets_command._peers(parser.parse_args([]).__class__(peers=None, usual_peers=None))
    assert "int8" in parser.parse_args(["--groups", "int8"]).groups


def test_storage_errors_are_printed(made_up):
    from selfattn._bench.report import table_lines

    result = replace(made_up("cache-int8-8k"), storage_error=0.00123)
    assert "  cache-int8-8k: 0.12% of sum p|v|" in table_lines([result])
    assert not any("sum p|v|" in line for line in table_lines([made_up("cache-int8-8k")]))


def test_int8_is_what_the_cache_stores():
    assert Filled(SMALL["int8"], SMALL["int8"].make_arrays()).cache.dtype == np.int8
    assert isinstance(Filled(SMALL["paged"], SMALL["paged"].make_arrays()).cache, selfattn.PagedKVCache)
