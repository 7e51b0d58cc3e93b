"""The benchmarks: the list of workloads, the peers, checking, reporting. Nothing about speed."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

import selfattn
from selfattn._bench import report, timing
from selfattn._bench.check import Mismatch, check, check_everywhere, expected_parts
from selfattn._bench.measure import Result, measure
from selfattn._bench.peer import CannotRun, NumPy, Peer
from selfattn._bench.peers import OWN, PEERS, choose, others
from selfattn._bench.timing import Quartiles, interleave, ratios
from selfattn._bench.workload import Workload
from selfattn._bench.workloads import ALL, QUICK, WORKLOADS, attention_workload, find, from_shape
from workbench.cache_variants import CACHE_VARIANTS

TINY = attention_workload("tiny", "a test", 2, 12, 8)
PROMISED_NAMES = (
    "embed-128",
    "bert-512",
    "vit-197",
    "prefill-2k-causal",
    "long-8k-causal",
    "decode-4k-gqa",
    "tiny-16",
    "projection-layer",
)


def small(workload: Workload) -> Workload:
    """The same case with the same sort of options, small enough for loops in Python."""
    q_len = min(workload.q_len, 13)
    kv_len = q_len + min(workload.kv_len - workload.q_len, 18)
    options = workload.options
    if options.window is not None:
        options = replace(options, window=(5, 0))
    if options.kv_lens is not None:
        lens = tuple(max(1, length * kv_len // workload.kv_len) for length in options.kv_lens)
        options = replace(options, kv_lens=lens)
    batch = len(options.kv_lens) if options.kv_lens else min(workload.batch, 2)
    num_kv_heads = min(workload.num_kv_heads, 2)
    head_dim = min(workload.head_dim, 16)
    return replace(
        workload,
        batch=batch,
        num_heads=num_kv_heads * workload.group_size,
        num_kv_heads=num_kv_heads,
        q_len=q_len,
        kv_len=kv_len,
        head_dim=head_dim,
        value_dim=head_dim,
        d_model=24 if workload.kind == "layer" else 0,
        options=options,
    )


SMALL = [small(workload) for workload in ALL]


def by_name(workloads):
    return pytest.mark.parametrize("workload", workloads, ids=lambda w: w.name)


def visible_pairs_by_loops(workload: Workload) -> int:
    options, count = workload.options, 0
    left, right = options.window or (None, None)
    for entry in range(workload.batch):
        kv_len = options.kv_lens[entry] if options.kv_lens else workload.kv_len
        diagonal = (workload.kv_len if options.mask == "keys" else kv_len) - workload.q_len
        for i in range(workload.q_len):
            for j in range(kv_len):
                visible = not options.causal or j <= i + diagonal
                visible = visible and (left is None or j - (i + diagonal) >= -left)
                visible = visible and (right is None or j - (i + diagonal) <= right)
                count += visible
    return count


def test_names_are_unique_and_explained():
    assert len(WORKLOADS) == len(ALL)
    for workload in ALL:
        assert workload.why
        assert "\n" not in workload.why


def test_promised_names_exist():
    assert set(PROMISED_NAMES) | set(QUICK) <= set(WORKLOADS)


@by_name(ALL)
def test_workload_is_consistent(workload):
    assert workload.num_heads % workload.num_kv_heads == 0
    assert workload.flops() > 0
    assert workload.options.kv_lens is None or len(workload.options.kv_lens) == workload.batch
    assert Workload.from_dict(json.loads(json.dumps(_as_dict(workload)))) == workload


def _as_dict(workload):
    from dataclasses import asdict

    return asdict(workload)


@by_name(SMALL)
def test_flops_count_visible_pairs(workload):
    pairs = visible_pairs_by_loops(workload)
    assert workload.visible_pairs() == pairs
    per_pair = 2 * (workload.head_dim + workload.value_dim) * workload.num_heads
    assert workload.attention_flops() == pairs * per_pair


def test_flops_of_known_cases():
    assert WORKLOADS["bert-512"].flops() == 4 * 512 * 512 * 64 * 12
    causal = WORKLOADS["prefill-2k-causal"]
    assert causal.flops() == 4 * (2048 * 2049 // 2) * 128 * 32
    layer = WORKLOADS["projection-layer"]
    assert layer.projection_flops() == 4 * (2 * 512 * 768 * 768)
    decode = WORKLOADS["decode-4k-gqa"]
    assert decode.kv_bytes() == 2 * 8 * 4096 * 128 * 4


def test_only_decode_counts_as_memory_bound():
    bound = {workload.name for workload in ALL if workload.memory_bound}
    assert bound == {"decode-4k-gqa", "decode-32k-gqa", "decode-4k-mha", "batch-decode-16x700"}


def test_arrays_have_the_shapes_and_are_reproducible():
    for workload in SMALL:
        first, second = workload.make_arrays(3), workload.make_arrays(3)
        for name, array in first.items():
            assert np.array_equal(array, second[name])
        main = first["x" if workload.kind == "layer" else "q"]
        assert main.dtype == workload.dtype
        assert not np.array_equal(main, workload.make_arrays(4)["q" if "q" in first else "x"])


def test_find_and_shape_refuse_what_they_do_not_know():
    assert find(["bert-512", "tiny-16"]) == [WORKLOADS["bert-512"], WORKLOADS["tiny-16"]]
    with pytest.raises(ValueError, match="no workload 'x'"):
        find(["x"])
    assert from_shape("2,3,4,5").q_len == 4
    with pytest.raises(ValueError, match="four positive integers"):
        from_shape("2,3,-4,5")


@pytest.mark.parametrize("name", ["selfattn", "single", *(peer.name for peer in others() if peer.name != "vllm")])
@by_name(SMALL)
def test_peers_are_right(name, workload):
    peer = PEERS[name]
    if not peer.available():
        pytest.skip(f"{peer.label} is not installed")
    reason = peer.why_not(workload)
    if reason:
        pytest.skip(reason)
    arrays = workload.make_arrays()
    out = np.asarray(peer.prepare(workload, arrays, threads=2)())
    assert out.dtype == workload.dtype
    assert check(name, out, expected_parts(workload, arrays)) <= 1


def test_own_and_numpy_run_every_small_workload():
    assert all(OWN.supports(workload) and NumPy().supports(workload) for workload in SMALL)


def test_reasons_for_not_running():
    assert "2 GiB" in PEERS["numpy"].why_not(WORKLOADS["long-8k-causal"])
    assert "softcap" in PEERS["pytorch"].why_not(WORKLOADS["softcap-1k"])
    assert "float32" in PEERS["onnxruntime"].why_not(WORKLOADS["f64-512"])


def test_choose():
    assert choose(["numpy"]) == [PEERS[OWN.name], PEERS["numpy"]]
    with pytest.raises(ValueError, match="no peer 'x'"):
        choose(["x"])


def test_check_covers_start_middle_and_end_of_large_workloads():
    large = attention_workload("large", "", 4, 4096, 4, causal=True)
    arrays = large.make_arrays()
    parts = expected_parts(large, arrays)
    starts = {(part.index[1].start, part.index[2].start) for part in parts}
    assert {head for head, _ in starts} == {0, 2, 3}
    assert {0, 2048} < {row for _, row in starts}
    assert max(part.index[2].stop for part in parts) == 4096
    assert check("selfattn", OWN.prepare(large, arrays, threads=2)(), parts) <= 1


@pytest.mark.parametrize("workload", SMALL[::5], ids=lambda w: w.name)
def test_check_rejects_wrong_results(workload):
    arrays = workload.make_arrays()
    parts = expected_parts(workload, arrays)
    right = np.asarray(OWN.prepare(workload, arrays, threads=1)())
    check("right", right, parts)
    coarse = right.astype(np.float16).astype(right.dtype)
    poisoned, shifted = right.copy(), right.copy()
    poisoned.flat[-1] = np.nan
    shifted.flat[0] += 1e-3
    for wrong in (coarse, poisoned, shifted):
        with pytest.raises(Mismatch):
            check("wrong", wrong, parts)


def test_check_everywhere_sees_what_no_part_covers():
    arrays = TINY.make_arrays()
    parts = expected_parts(TINY, arrays)
    right = OWN.prepare(TINY, arrays, threads=1)()
    wrong = right.copy()
    wrong[0, 1, 5, 3] += 1e-2
    check_everywhere("right", right, right, parts)
    with pytest.raises(Mismatch, match="differs from selfattn"):
        check_everywhere("wrong", wrong, right, parts)
    with pytest.raises(Mismatch, match="shape"):
        check_everywhere("wrong", right[:, :1], right, parts)


class Fake(NumPy):
    """NumPy's answer times a factor, counting calls."""

    def __init__(self, factor: float, refuse: bool = False) -> None:
        self.factor, self.refuse, self.calls = factor, refuse, 0

    def prepare(self, workload, arrays, threads):
        if self.refuse:
            raise CannotRun("refused for a test")
        right = super().prepare(workload, arrays, threads)

        def run():
            self.calls += 1
            return right() * np.float32(self.factor)

        return run


def test_a_wrong_peer_stops_the_run_before_timing():
    wrong = Fake(1.001)
    with pytest.raises(Mismatch, match="numpy on tiny"):
        measure(TINY, [wrong], threads=1, seconds=0.01)
    assert wrong.calls == 1


def test_a_peer_that_refuses_is_reported():
    result = measure(TINY, [Fake(1.0, refuse=True)], threads=1, seconds=0.01)
    assert result.skipped == {"numpy": "refused for a test"}
    assert "refused for a test" in report.table([result])


def test_measure_fills_every_field():
    right = Fake(1.0)
    result = measure(TINY, [OWN, right], threads=2, seconds=0.01)
    assert right.calls > result.rounds >= timing.MIN_ROUNDS
    assert result.isa == selfattn.active_isa()
    assert set(result.times) == {"selfattn", "numpy"}
    assert set(result.ratios) == {"numpy"}
    assert all(0 < error <= 1 for error in result.errors.values())
    assert result.peak > 0
    assert result.rate() == TINY.flops() / result.times["selfattn"].median
    assert Result.from_dict(json.loads(json.dumps(result.to_dict()))).times == result.times


def test_decode_is_held_against_a_stream():
    workload = attention_workload("d", "", (4, 2), (1, 64), 16, causal=True)
    result = measure(workload, [], threads=1, seconds=0.01)
    assert result.unit == "GB/s"
    assert result.work == workload.kv_bytes()
    assert result.peak > 0


def test_interleave_takes_turns(monkeypatch):
    monkeypatch.setattr(timing, "MIN_SAMPLE_SECONDS", 0.0)
    monkeypatch.setattr(timing, "IDLE_WINDOW", 0.0)
    monkeypatch.setattr(timing, "WARM_CALL_LIMIT", 0.0)
    called = []
    runs = {name: lambda name=name: called.append(name) for name in "abc"}
    samples = interleave(runs, seconds=0.0)
    assert [len(times) for times in samples.values()] == [timing.MIN_ROUNDS] * 3
    calibration = "abc"
    assert "".join(called) == calibration + "abcbcacababcbca"


def test_ratios_are_taken_within_rounds():
    samples = {"selfattn": [1.0, 2.0, 4.0], "numpy": [3.0, 6.0, 12.0]}
    assert ratios(samples, "selfattn") == {"numpy": Quartiles(3.0, 3.0, 3.0)}


def test_peers_share_one_interface():
    assert all(isinstance(peer, Peer) for peer in PEERS.values())
    names = ["selfattn", "numpy", "pytorch", "onnxruntime", "openvino", "jax", "vllm", "plain", "single"]
    assert list(PEERS) == [*names, "heads-32", "heads-64", *(peer.name for peer in CACHE_VARIANTS)]
