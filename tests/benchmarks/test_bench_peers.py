"""The benchmark's peers whose tests need special workloads: vLLM, and selfattn called differently."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from selfattn._bench.check import Mismatch, check, expected_parts
from selfattn._bench.measure import check_all, measure
from selfattn._bench.peer import CannotRun, Own
from selfattn._bench.peers import OWN, PEERS, choose
from selfattn._bench.workload import TILE, Options, Workload
from selfattn._bench.workloads import attention_workload
from workbench import vllm_peer
from workbench.variants import OneThread, WithoutOption

MASKED = attention_workload("masked", "a test", 2, (20, 30), 8, mask="pairs", alibi=True)
MASKED = replace(MASKED, baseline=Options(alibi=True))
LENS = {"prefill": 200, "decode": (1, 300), "few": (6, 300)}


@pytest.mark.parametrize("head_dim", [64, 80])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lens", list(LENS.values()), ids=list(LENS))
def test_vllm_is_right(lens, causal, head_dim):
    peer = PEERS["vllm"]
    if not peer.available():
        pytest.skip(f"{vllm_peer.LIBRARY_VARIABLE} names no library, or PyTorch is not installed")
    workload = attention_workload("x", "", (8, 2), lens, head_dim, batch=2, causal=causal)
    assert peer.supports(workload)
    arrays = workload.make_arrays()
    run = peer.prepare(workload, arrays, threads=2)
    for _ in range(2):
        assert check("vllm", np.asarray(run()), expected_parts(workload, arrays)) <= 1


def test_vllm_is_there_only_when_its_library_is(monkeypatch, tmp_path):
    monkeypatch.delenv(vllm_peer.LIBRARY_VARIABLE, raising=False)
    assert not PEERS["vllm"].available()
    with pytest.raises(ValueError, match="vLLM is not installed"):
        choose(["vllm"])
    monkeypatch.setenv(vllm_peer.LIBRARY_VARIABLE, str(tmp_path / "absent.so"))
    assert not PEERS["vllm"].available()


def test_a_library_that_is_none_is_refused(monkeypatch, tmp_path):
    pytest.importorskip("torch")
    library = tmp_path / "wrong.so"
    library.write_text("no library")
    monkeypatch.setenv(vllm_peer.LIBRARY_VARIABLE, str(library))
    workload = attention_workload("x", "", 2, 32, 64)
    with pytest.raises(CannotRun):
        PEERS["vllm"].prepare(workload, workload.make_arrays(), threads=1)


def test_the_call_without_the_option_is_checked_as_such():
    plain = WithoutOption()
    answered = plain.answered(MASKED)
    assert answered.options == Options(alibi=True)
    arrays = MASKED.make_arrays()
    out = np.asarray(plain.prepare(MASKED, arrays, threads=1)())
    assert check("plain", out, expected_parts(answered, arrays)) <= 1
    with pytest.raises(Mismatch):
        check("plain", out, expected_parts(MASKED, arrays))


def test_a_wrong_call_without_the_option_is_found():
    arrays = MASKED.make_arrays()
    with_mask = OWN.prepare(MASKED, arrays, threads=1)
    with pytest.raises(Mismatch, match="plain on masked"):
        check_all(MASKED, arrays, {"selfattn": with_mask, "plain": with_mask}, [WithoutOption()])


def test_variants_are_measured_with_the_call():
    result = measure(MASKED, [PEERS["plain"], PEERS["single"]], threads=2, seconds=0.01)
    assert set(result.ratios) == {"plain", "single"}
    assert not result.skipped
    without = measure(replace(MASKED, baseline=None), [PEERS["plain"]], threads=1, seconds=0.01)
    assert "plain" in without.skipped


def test_one_thread_is_one_thread(monkeypatch):
    asked = []
    monkeypatch.setattr(Own, "prepare", lambda self, workload, arrays, threads: asked.append(threads))
    OneThread().prepare(MASKED, {}, threads=7)
    assert asked == [1]


def test_choose_knows_torch_and_leaves_variants_out():
    assert not {"plain", "single"} & {peer.name for peer in choose(None)}
    assert [peer.name for peer in choose(["single", "numpy"])] == ["selfattn", "numpy", "single"]
    pytest.importorskip("torch")
    assert choose(["torch"]) == choose(["pytorch"])


def test_tiles_show_every_fourth_square():
    workload = attention_workload("x", "", 2, 4 * TILE, 4, mask="tiles")
    mask = workload.make_arrays()["mask"]
    assert mask.shape == (1, 1, 1024, 1024)
    assert mask[0, 0].any(axis=1).all()
    assert mask.mean() == 1 / 4
    assert all(len(set(mask[0, 0, TILE * i : TILE * (i + 1), :TILE].flat)) == 1 for i in range(4))
    assert workload.visible_pairs() == 1024 * 256
    causal = replace(workload, options=replace(workload.options, causal=True))
    assert causal.visible_pairs() == 4 * (256 * 257 // 2)


def test_bytes_of_operands():
    workload = attention_workload("x", "", (4, 2), (3, 5), (8, 16), batch=2, mask="pairs", bias=True)
    q, k, v, out, bias = 2 * 4 * 3 * 8, 2 * 2 * 5 * 8, 2 * 2 * 5 * 16, 2 * 4 * 3 * 16, 4 * 3 * 5
    assert workload.operand_bytes() == 4 * (q + k + v + out + bias) + 15


def test_baselines_survive_json():
    import json
    from dataclasses import asdict

    windowed = replace(MASKED, baseline=Options(window=(3, None), kv_lens=(5,)))
    assert Workload.from_dict(json.loads(json.dumps(asdict(windowed)))) == windowed
