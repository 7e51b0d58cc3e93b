"""The benchmark's axes in groups and commands: targets, choosing, instruction sets. Nothing about speed."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace

import pytest
from bench_axes import AXES, SUFFIX

import selfattn
from selfattn._bench import command, numbers
from selfattn._bench.peers import OWN
from selfattn._bench.workloads import WORKLOADS
from workbench import limits, targets_command
from workbench.grid import GROUPS
from workbench.target import Group, Target, judge


def arguments(*options, of=targets_command):
    parser = argparse.ArgumentParser()
    of.add_arguments(parser, *((None,) if of is command else ()))
    return parser.parse_args(options)


def test_every_family_has_a_group_of_every_kind():
    for family in ("prefill", "decode", "few", "tiny", "layer"):
        for dtype, precision in AXES:
            group = GROUPS[f"{family}-{SUFFIX[dtype if precision == 'highest' else precision]}"]
            assert (group.family, group.dtype, group.precision) == (family, dtype, precision)
            assert group.workloads == tuple(w.varied(dtype, precision) for w in GROUPS[family].workloads)
            assert (dtype if precision == "highest" else precision) in group.title
    assert {group.family for group in GROUPS.values() if group.name != group.family} == {
        "prefill", "short", "decode", "few", "tiny", "layer",
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
    assert wanted("layer-bf16") == {("pytorch", 1.5, None, "", "", 6)}
    assert all(target.threads is None for name in ("prefill-bf16", "layer-bf16") for target in GROUPS[name].targets)


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
    assert chosen("--groups", "layer", "--precision", "high", "medium") == ["layer-high", "layer-medium"]
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
        command.varied([WORKLOADS["tiny-16"]], ["bfloat16"], None)
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
