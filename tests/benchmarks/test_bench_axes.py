"""The benchmark's axes: types of numbers, precisions and instruction sets. Nothing about speed."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict, replace

import numpy as np
import pytest

import selfattn
from selfattn._bench import command, numbers
from selfattn._bench.check import (
    COARSE_ERRORS,
    Mismatch,
    Units,
    check,
    check_coarsely,
    coarse_error,
    expected_parts,
    unit_of,
)
from selfattn._bench.measure import check_all, measure
from selfattn._bench.peer import NumPy
from selfattn._bench.peers import OWN, PEERS, others
from selfattn._bench.report import table
from selfattn._bench.timing import Peaks
from selfattn._bench.workload import Workload
from selfattn._bench.workloads import WORKLOADS, attention_workload, block_workload
from workbench import limits, targets_command
from workbench.grid import GROUPS
from workbench.peers import NARROW_HEADS
from workbench.target import Group, Target, judge

AXES = [("float32", "high"), ("float32", "medium"), ("bfloat16", "highest"), ("float16", "highest")]
NARROW = ("bfloat16", "float16")
SUFFIX = {"high": "high", "medium": "medium", "bfloat16": "bf16", "float16": "f16"}
axes = pytest.mark.parametrize(("dtype", "precision"), AXES)

CASES = (
    attention_workload("square", "a test", (4, 2), 40, 32, causal=True),
    attention_workload("wide", "a test", 2, 33, 128),
    attention_workload("few", "a test", (4, 2), (4, 70), 32, causal=True),
    attention_workload("decode", "a test", (8, 2), (1, 300), 64, causal=True),
    attention_workload("masked", "a test", 2, (20, 30), 16, mask="pairs", bias=True, alibi=True),
    block_workload("block", "a test", 2, 30, 64, 4),
)


def by_name(workloads):
    return pytest.mark.parametrize("workload", workloads, ids=lambda w: w.name)


def arguments(*options, of=targets_command):
    parser = argparse.ArgumentParser()
    of.add_arguments(parser, *((None,) if of is command else ()))
    return parser.parse_args(options)


@axes
def test_a_workload_in_another_type_is_the_same_case_under_its_own_name(dtype, precision):
    first = WORKLOADS["decode-4k-gqa"]
    varied = first.varied(dtype, precision)
    suffix = SUFFIX[dtype if precision == "highest" else precision]
    assert varied == replace(first, name=f"decode-4k-gqa-{suffix}", dtype=dtype, precision=precision)
    assert varied.varied(dtype, precision) == varied
    assert Workload.from_dict(json.loads(json.dumps(asdict(varied)))) == varied
    assert varied.flops() == first.flops()
    assert varied.memory_bound
    assert varied.kv_bytes() == first.kv_bytes() * numbers.numpy_dtype(dtype).itemsize // 4


def test_results_from_before_there_were_precisions_are_read():
    record = asdict(WORKLOADS["bert-512"])
    del record["precision"]
    assert Workload.from_dict(record) == WORKLOADS["bert-512"]


@pytest.mark.parametrize("dtype", NARROW)
def test_arrays_are_rounded_to_the_type(dtype):
    for case in CASES:
        wide, narrow = case.make_arrays(), case.varied(dtype).make_arrays()
        for name in set(narrow) - {"mask", "alibi_slopes"}:
            assert narrow[name].dtype == numbers.numpy_dtype(dtype)
            assert np.array_equal(narrow[name], wide[name].astype(narrow[name].dtype))


@pytest.mark.parametrize("name", [peer.name for peer in (OWN, *others(), *NARROW_HEADS)])
@axes
@by_name(CASES)
def test_peers_are_right(name, workload, dtype, precision):
    peer, workload = PEERS[name], workload.varied(dtype, precision)
    if not peer.available():
        pytest.skip(f"{peer.label} is not installed")
    reason = peer.why_not(workload)
    if reason:
        pytest.skip(reason)
    arrays = workload.make_arrays()
    runs = {"selfattn": OWN.prepare(workload, arrays, 2), name: peer.prepare(workload, arrays, 2)}
    assert np.asarray(runs[name]()).dtype == numbers.numpy_dtype(dtype)
    assert 0 <= check_all(workload, arrays, runs, [peer])[name] <= 1


def test_precision_reaches_selfattn_and_pytorch(monkeypatch):
    asked = []
    monkeypatch.setattr(selfattn, "attention", lambda *qkv, **options: asked.append(options.get("precision")))
    for precision in numbers.PRECISIONS:
        workload = CASES[0].varied("float32", precision)
        OWN.prepare(workload, workload.make_arrays(), 1)()
    assert asked == [None, "high", "medium"]
    torch = pytest.importorskip("torch")
    for precision in reversed(numbers.PRECISIONS):
        workload = CASES[0].varied("float32", precision)
        PEERS["pytorch"].prepare(workload, workload.make_arrays(), 1)
        assert torch.get_float32_matmul_precision() == precision


@pytest.mark.parametrize(
    ("name", "dtype", "reason"),
    [
        ("onnxruntime", "bfloat16", "have no bfloat16"),
        ("openvino", "float16", "float32 or bfloat16"),
        ("jax", "float16", "no products of float16"),
        ("numpy", "bfloat16", "16-bit numbers"),
        ("numpy", "float16", "16-bit numbers"),
        ("vllm", "float64", "not float64"),
    ],
)
def test_peers_say_what_they_cannot_do(name, dtype, reason):
    assert reason in PEERS[name].why_not(CASES[0].varied(dtype))
    supported = PEERS[name].why_not(CASES[0])
    assert not supported


def test_what_a_peer_cannot_do_is_below_the_table():
    result = measure(CASES[0].varied("float16"), [NumPy()], threads=1, seconds=0.01)
    assert "NumPy: square-f16: it multiplies 16-bit numbers" in table([result])


@pytest.mark.parametrize("dtype", NARROW)
@by_name([case for case in CASES if case.name != "masked"])
def test_our_own_results_keep_the_tight_bound(workload, dtype):
    workload = workload.varied(dtype)
    arrays = workload.make_arrays()
    with selfattn.use_isa("portable"):  # which rounds nothing but results
        expected = expected_parts(workload, arrays)
        right = np.asarray(OWN.prepare(workload, arrays, threads=1)())
    assert 0.5 < check("right", right, expected) <= 1
    ulp = np.spacing(right.astype(np.float32)) * 2.0 ** (16 if dtype == "bfloat16" else 13)
    changed = (right.astype(np.float32) + 1.5 * ulp).astype(right.dtype)
    with pytest.raises(Mismatch):
        check("an ulp off", changed, expected)


def test_a_matrix_unit_may_round_what_it_multiplies():
    def units(dtype, precision, unit):
        return Units.of(2.0, dtype, precision, unit)

    assert units("float64", "highest", "amx") == units("float32", "high", "fma") == Units(24, 24, 24)
    assert units("float32", "highest", "amx") == units("bfloat16", "highest", "fma") == Units(24, 24, 24)
    assert units("bfloat16", "highest", "amx") == Units(24 + 2**16, 24, 24)
    assert units("float16", "highest", "amx") == Units(24 + 3 * 2**8, 24 + 2 * 2**8, 24 + 12 * 2**8)
    assert units("float32", "medium", "pairs") == Units(24 + 3 * 2**17, 24 + 2 * 2**17, 24 + 12 * 2**17)


@pytest.mark.parametrize("dtype", NARROW)
@by_name(CASES)
def test_the_unit_is_the_one_that_explain_names(workload, dtype, monkeypatch):
    workload, asked = workload.varied(dtype), []
    monkeypatch.setattr(selfattn, "explain", lambda *qkv, **options: asked.append((qkv, options)) or {"unit": "amx"})
    tight = workload.make_arrays()
    assert unit_of(workload) == "amx"
    (shapes, options), w = asked.pop(), workload
    assert [x.shape for x in shapes] == [
        (w.batch, w.num_heads, w.q_len, w.head_dim),
        (w.batch, w.num_kv_heads, w.kv_len, w.head_dim),
        (w.batch, w.num_kv_heads, w.kv_len, w.value_dim),
    ]
    assert {x.dtype for x in shapes} == {numbers.numpy_dtype(dtype)}
    assert options == {"precision": "highest"}
    rounded = expected_parts(workload, tight)
    monkeypatch.setattr(selfattn, "explain", lambda *qkv, **options: {"unit": "fma"})
    exact = expected_parts(workload, tight)
    assert all((r.bound > e.bound).all() for r, e in zip(rounded, exact, strict=True))


class Wrong(NumPy):
    """Selfattn's own answer, modified."""

    def __init__(self, spoil):
        self.spoil = spoil

    def why_not(self, workload):
        return ""

    def prepare(self, workload, arrays, threads):
        run = OWN.prepare(workload, arrays, threads)
        return lambda: self.spoil(np.asarray(run()).astype(np.float64))


@axes
def test_a_peer_may_lose_bits_but_not_keys(dtype, precision):
    workload = replace(CASES[0], q_len=200, kv_len=200).varied(dtype, precision)
    allowed = COARSE_ERRORS[dtype if precision == "highest" else precision]
    assert coarse_error(workload) == allowed
    measure(workload, [Wrong(lambda out: out * (1 + 0.9 * allowed))], threads=1, seconds=0.0)
    for spoil in (
        lambda out: out * (1 + 1.1 * allowed),
        lambda out: np.where(np.arange(200)[:, None] < 190, out, np.roll(out, 1, axis=-2)),
        lambda out: np.where(np.arange(200)[:, None] < 199, out, np.nan),
    ):
        with pytest.raises(Mismatch, match="differs from selfattn"):
            measure(workload, [Wrong(spoil)], threads=1, seconds=0.0)


def test_the_coarse_check_refuses_other_shapes():
    with pytest.raises(Mismatch, match="shape"):
        check_coarsely("x", np.ones((2, 3)), np.ones((3, 2)), 0.1)
    assert check_coarsely("x", np.full(3, 1.01), np.ones(3), 0.02) == pytest.approx(0.5)
    assert coarse_error(CASES[0]) == coarse_error(CASES[0].varied("float64")) == 0


def test_peaks_are_of_the_products_type(monkeypatch):
    asked = []
    monkeypatch.setattr(Peaks, "flops", lambda self, dtype: asked.append(dtype) or 1e9)
    for dtype, precision in [("float32", "highest"), *AXES]:
        measure(CASES[0].varied(dtype, precision), [], threads=1, seconds=0.0)
    assert asked[::2] == asked[1::2] == ["float32", "bfloat16", "bfloat16", "bfloat16", "float16"]


def test_every_family_has_a_group_of_every_kind():
    for family in ("prefill", "decode", "few", "tiny", "block"):
        for dtype, precision in AXES:
            group = GROUPS[f"{family}-{SUFFIX[dtype if precision == 'highest' else precision]}"]
            assert (group.family, group.dtype, group.precision) == (family, dtype, precision)
            assert group.workloads == tuple(w.varied(dtype, precision) for w in GROUPS[family].workloads)
            assert (dtype if precision == "highest" else precision) in group.title
    assert {group.family for group in GROUPS.values() if group.name != group.family} == {
        "prefill", "decode", "few", "tiny", "block",
    }  # fmt: skip


def wanted(name):
    return {
        (t.against, t.each, t.mean, t.needs, t.without, len(t.only)) for t in GROUPS[name].targets
    }  # fmt: skip


def test_targets_are_the_promised_ones():
    assert wanted("prefill-bf16") == {
        ("pytorch", 2.5, 3.5, "amx", "", 0),
        ("pytorch", 1.0, 1.5, "", "amx", 0),
        ("peak", 0.45, None, "amx", "", 6),
        ("vllm", 2.0, None, "amx", "", 0),
    }
    assert wanted("prefill-f16") == {("pytorch", 2.5, 4.0, "amx", "", 0), ("pytorch", 1.0, 1.5, "", "amx", 0)}
    assert ("pytorch", 1.3, 2.0, "amx", "", 0) in wanted("prefill")
    assert wanted("prefill-high") == {("pytorch", 1.0, 3.0, "amx", "", 0)}
    for suffix in ("bf16", "f16"):
        assert wanted(f"tiny-{suffix}") == {("pytorch", 2.0, None, "", "", 3)}
        assert wanted(f"decode-{suffix}") == {("pytorch", 3.5, None, "", "", 0), ("peak", 0.85, None, "", "", 0)}
    assert wanted("block-bf16") == {("pytorch", 1.5, None, "", "", 6)}
    assert all(target.threads is None for name in ("prefill-bf16", "block-bf16") for target in GROUPS[name].targets)


def made_group(*targets):
    return Group("g", "a test", GROUPS["tiny"].workloads, targets)


def test_targets_that_need_a_unit_are_not_judged_without(made_up):
    group = made_group(Target("pytorch", each=3.0, needs="amx"), Target("pytorch", each=1.5, without="amx"))
    for isa, states in (
        ("avx512", ["needs AMX", "met"]),
        ("amx", ["missed"]),
        ("avx512_amx", ["missed"]),
    ):
        result = replace(made_up("tiny-64", pytorch=2.0), isa=isa)
        assert [verdict.state for verdict in judge(group, [result])] == states
    verdict = judge(group, [made_up("tiny-64", pytorch=2.0)])[0]
    assert str(verdict) == "PyTorch, 1 thread: needs AMX"
    assert not verdict.missed
    assert str(group.targets[0]) == "PyTorch, needs AMX: each 3.00x"
    assert str(group.targets[1]) == "PyTorch, without AMX: each 1.50x"


def test_a_peer_must_not_be_faster_where_its_target_is_not_judged(made_up):
    group = made_group(Target("pytorch", each=3.0, needs="amx"))
    states = [verdict.state for verdict in judge(group, [made_up("tiny-64", pytorch=0.9)])]
    assert states == ["needs AMX", "missed"]
    states = [v.state for v in judge(group, [replace(made_up("tiny-64", pytorch=0.9), isa="amx")])]
    assert states == ["missed"]


def chosen(*options):
    return [group.name for group, _ in targets_command._chosen(arguments(*options))]


def test_groups_are_chosen_by_family_type_and_precision():
    with_targets = [group.name for group in GROUPS.values() if group.targets]
    assert chosen() == with_targets
    assert "few-bf16" not in with_targets
    assert chosen("--groups", "decode") == ["decode", "decode-bf16", "decode-f16"]
    assert chosen("--groups", "few-bf16", "tiny-f16") == ["few-bf16", "tiny-f16"]
    assert chosen("--groups", "few", "tiny", "--dtype", "bfloat16") == ["few-bf16", "tiny-bf16"]
    assert chosen("--groups", "block", "--precision", "high", "medium") == ["block-high", "block-medium"]
    assert chosen("--dtype", "float64") == ["float64"]
    assert chosen("--workloads", "few-2x3000-high") == ["few-high"]
    with pytest.raises(ValueError, match="no group"):
        chosen("--dtype", "float16", "--precision", "medium")


def test_the_benchmark_runs_types_and_precisions_side_by_side():
    def names(*options):
        return [w.name for w in command._chosen_workloads(arguments(*options, of=command))]

    one = ("--workloads", "tiny-16")
    assert names(*one, "--dtype", "float32", "bfloat16") == ["tiny-16", "tiny-16-bf16"]
    assert names(*one, "--precision", "highest", "medium") == ["tiny-16", "tiny-16-medium"]
    types = ("--dtype", "float16", "float32", "--precision", "high", "highest")
    assert names(*one, *types) == ["tiny-16-f16", "tiny-16-high", "tiny-16"]
    assert names("--shape", "1,2,3,4", "--dtype", "float64") == ["1,2,3,4-f64"]
    with pytest.raises(ValueError, match="precision high is for float32"):
        names(*one, "--dtype", "bfloat16", "--precision", "high")


def test_without_ml_dtypes_there_is_no_bfloat16(monkeypatch, capsys, made_up):
    monkeypatch.setattr(numbers.importlib.util, "find_spec", lambda name: None if name == "ml_dtypes" else object())
    with pytest.raises(ValueError, match="bfloat16 needs the package ml_dtypes"):
        command.varied([CASES[0]], ["bfloat16"], None)
    monkeypatch.setattr(targets_command, "choose", lambda names: [OWN])
    monkeypatch.setattr(
        targets_command, "measure_in_process", lambda workloads, *rest: [made_up(w.name) for w in workloads]
    )
    targets_command.run(arguments("--groups", "tiny", "--dtype", "bfloat16", "float16", "--threads", "1"))
    printed = capsys.readouterr()
    assert "tiny-bf16: not measured: bfloat16 needs" in printed.err
    assert "tiny-16-f16" in printed.out


@pytest.mark.parametrize("isa", list(limits.LIMITS))
def test_every_peer_is_limited_to_an_instruction_set(isa, monkeypatch):
    monkeypatch.setattr(selfattn, "isas", lambda: [isa, "portable"])
    monkeypatch.setattr(os, "environ", {"PATH": "kept"})
    limits.hold(isa)
    assert os.environ["SELFATTN_ISA"] == isa
    assert isa.startswith(os.environ["ATEN_CPU_CAPABILITY"])
    assert os.environ["ONEDNN_MAX_CPU_ISA"].startswith(os.environ["ATEN_CPU_CAPABILITY"].upper())
    assert "AMX" not in "".join(os.environ.values())
    assert os.environ["PATH"] == "kept"


def test_an_instruction_set_that_is_not_there_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(selfattn, "isas", lambda: ["portable"])
    before = dict(os.environ)
    assert targets_command.run(arguments("--isa", "avx2", "--list")) == 1
    assert "this machine has no avx2, only portable" in capsys.readouterr().err
    assert dict(os.environ) == before
