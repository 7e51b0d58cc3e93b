"""The command line: info, selftest, bench. `test_demo.py` tests demo."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import selfattn
from selfattn import _selftest
from selfattn.__main__ import main


def test_info_prints_build_and_run_time_facts(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert selfattn.active_isa() in printed
    assert len(printed.splitlines()) > 3


def test_info_json_holds_both_dictionaries(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert set(facts) == {"config", "runtime"}
    expected = json.loads(json.dumps(selfattn.show_config(mode="dicts"), default=str))
    assert facts["config"] == expected
    assert facts["runtime"]


def test_without_arguments_it_says_what_there_is(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    for command in ("info", "selftest", "demo", "bench"):
        assert f"selfattn {command} " in printed
    missing = [name for name in selfattn.__all__ if name[0] != "_" and f"  sa.{name} " not in printed]
    assert missing == []
    assert "selfattn.integrations.torch" in printed
    assert max(map(len, printed.splitlines())) <= 160
    assert all(line.split(maxsplit=1)[1:] for line in printed.splitlines() if line.startswith("  "))


def test_module_runs_as_a_command(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "selfattn", "info", "--json"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    assert json.loads(done.stdout)["config"]


@pytest.mark.parametrize("arguments", [["info"], ["info", "--json"], ["--help"], ["--version"], ["bench", "--list"]])
def test_ends_quietly_if_no_one_reads(arguments, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "selfattn", *arguments]
    where = {"cwd": tmp_path, "env": {**os.environ, "PYTHONUNBUFFERED": ""}}
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False, **where)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize(
    ("in_sources", "message"),
    [(True, "Python found the source code in {folder}"), (False, "{folder} has no compiled core for Python 3.")],
)
def test_a_missing_core_says_what_to_do(tmp_path, run_python, in_sources, message):
    folder = tmp_path / "elsewhere" / "selfattn"
    sources = Path(selfattn.__file__).parent
    shutil.copytree(sources, folder, ignore=shutil.ignore_patterns("_core*", "__pycache__"))
    if in_sources:
        (folder.parent / "csrc").mkdir()
    # An editable install finds its modules through sys.meta_path.
    code = f"""
        import sys
        sys.meta_path = [finder for finder in sys.meta_path if "_editable_" not in repr(finder)]
        sys.path.insert(0, {str(folder.parent)!r})
        import selfattn
    """
    printed = run_python(code, expected_exit=1)
    assert "ImportError: selfattn: " + message.format(folder=folder) in printed
    assert "circular" not in printed


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert selfattn.__version__ in capsys.readouterr().out


@pytest.mark.parametrize("argv", [["nonsense"], ["bench", "--threads", "0"]])
def test_wrong_usage_exits_with_2(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_selftest_passes_and_reports_every_group(capsys):
    assert main(["selftest"]) == 0
    printed = capsys.readouterr().out
    for group in {case.group for case in _selftest.cases()} | {"layer"}:
        assert f"{group} " in printed
    for isa in selfattn.isas():
        assert isa in printed
    assert "passed" in printed
    assert "FAILED" not in printed


def test_selftest_sweeps_more_than_50_cases_and_is_deterministic():
    first, second = list(_selftest.cases()), list(_selftest.cases())
    assert len(first) > 50
    for one, other in zip(first, second, strict=True):
        assert one.shape == other.shape
        for a, b in zip(one.arrays, other.arrays, strict=True):
            assert np.array_equal(a, b)


def slightly_wrong(q, k, v, **options):
    answer = selfattn.attention(q, k, v, **options)
    out = answer[0] if isinstance(answer, tuple) else answer
    out *= 1 + 1e-4
    return answer


def ignores_masks(q, k, v, *, mask=None, **options):
    return selfattn.attention(q, k, v, **options)


def raises(q, k, v, **options):
    raise ValueError("attention: refused")


def not_a_number(q, k, v, **options):
    answer = selfattn.attention(q, k, v, **options)
    out = answer[0] if isinstance(answer, tuple) else answer
    out[..., -1:, -1:] = np.nan
    return answer


@pytest.fixture
def one_isa(monkeypatch):
    monkeypatch.setattr(selfattn, "isas", lambda: ["portable"])


@pytest.mark.usefixtures("one_isa")
@pytest.mark.parametrize("wrong", [slightly_wrong, ignores_masks, raises, not_a_number])
def test_selftest_exits_with_1_on_a_wrong_kernel(wrong, capsys):
    assert main(["selftest"], attention=wrong) == 1
    printed = capsys.readouterr().out
    assert "FAILED" in printed
    assert "passed" not in printed


@pytest.mark.usefixtures("one_isa")
def test_selftest_names_the_failing_group_only(capsys):
    main(["selftest"], attention=ignores_masks)
    lines = capsys.readouterr().out.splitlines()
    failed = {line.split("  ")[0] for line in lines if line.endswith("FAILED")}
    assert failed == {"masks", "everything", "lse, weights"}


def test_bench_prints_a_table_and_writes_json(tmp_path, capsys):
    file = tmp_path / "results.json"
    options = ["--workloads", "tiny-16", "--seconds", "0.05", "--threads", "1"]
    assert main(["bench", *options, "--peers", "numpy", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "tiny-16" in printed
    assert "vs NumPy" in printed
    record = json.loads(file.read_text())
    (result,) = record["results"]
    assert result["workload"]["name"] == "tiny-16"
    assert result["threads"] == 1
    assert result["isa"] == selfattn.active_isa()
    assert record["runtime"]


def test_bench_of_a_shape(capsys):
    options = ["--shape", "1,2,8,4", "--dtype", "float64", "--seconds", "0.01"]
    assert main(["bench", *options, "--threads", "1", "--peers", "numpy"]) == 0
    assert "1,2,8,4" in capsys.readouterr().out


def test_bench_lists_the_workloads(capsys):
    assert main(["bench", "--list"]) == 0
    assert "decode-4k-gqa" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workloads", "nonsense"], "no workload 'nonsense'; known are tiny-64"),
        (["--peers", "nonsense"], "no peer 'nonsense'; known are selfattn"),
        (["--shape", "1,2,3"], "four positive integers"),
        (["--shape", "1,2,0,4"], "four positive integers"),
    ],
)
def test_bench_refuses_what_it_does_not_know(options, message, capsys):
    assert main(["bench", *options]) == 1
    assert message in capsys.readouterr().err
