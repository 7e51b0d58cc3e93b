"""benchmarks/memory.py: peak, scratch and allocations of selfattn; the check of each can fail."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from places import BENCHMARKS
from scripts import load_script

from selfattn._bench.workloads import WORKLOADS
from workbench import allocations, memory
from workbench.grid import GROUPS

SCRIPT = BENCHMARKS / "memory.py"
needs_proc = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
needs_shim = pytest.mark.skipif(bool(allocations.why_not()), reason=allocations.why_not())


@pytest.fixture
def script():
    return load_script("memory")


def run_script(*options: str) -> str:
    return subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True, check=True).stdout


@needs_proc
def test_peaks_are_printed():
    printed = run_script("--parts", "peak", "--lengths", "256", "512", "--threads", "1")
    rows = [line.split() for line in printed.splitlines()[2:4]]
    assert [row[0] for row in rows] == ["256", "512"]
    assert all(float(cell) >= 0 for row in rows for cell in row)


@needs_proc
def test_peaks_tell_a_score_matrix_from_none():
    assert memory.measure_peak("numpy", 2048, 1) > 2048 * 2048 * 4
    assert memory.measure_peak("selfattn", 2048, 1) < 2048 * 2048 * 4 / 2
    assert memory.measure_peak("numpy", 2**16, 1) is None


def test_growth_is_the_exponent():
    lengths = [2**power for power in range(6, 14)]
    assert memory.growth(lengths, [5 * n for n in lengths]) == pytest.approx(1.0)
    assert memory.growth(lengths, [n * n for n in lengths]) == pytest.approx(2.0)


def test_a_quadratic_peak_is_a_failure(script, monkeypatch, capsys):
    monkeypatch.setattr(script, "measure_peak", lambda name, length, threads: length * length)
    assert not script.show_peaks([256, 512, 1024, 2048], 1)
    assert "S^2.00" in capsys.readouterr().out
    monkeypatch.setattr(script, "measure_peak", lambda name, length, threads: length)
    assert script.show_peaks([256, 512, 1024, 2048], 1)


def test_scratch_is_what_explain_says(script, monkeypatch, capsys):
    found = memory.scratch([WORKLOADS["tiny-16"], WORKLOADS["projection-layer"], WORKLOADS["decode-32k-gqa"]], 2)
    assert set(found) == {"tiny-16", "tiny-16, strided", "decode-32k-gqa", "decode-32k-gqa, strided"}
    assert found["tiny-16, strided"][0] > found["tiny-16"][0]
    assert found["decode-32k-gqa"][1] > found["tiny-16"][1]
    assert script.show_scratch(2)
    printed = [line.split()[0] for line in capsys.readouterr().out.splitlines()[3:-1]]
    assert set(printed) == {group.name for group in GROUPS.values() if group.family != "layer"} | {"wide"}
    monkeypatch.setattr(script, "scratch", lambda workloads, threads: {"x": (2**21 + 1, 0)})
    assert not script.show_scratch(2)


@needs_proc
def test_memory_of_gradients(script, monkeypatch, capsys):
    assert script.show_gradients(512, 1)
    assert "8 heads of 512 tokens" in capsys.readouterr().out
    scores = 8 * 512 * 512 * 4
    assert max(memory.measure_gradients(512, 2)) < scores
    monkeypatch.setattr(script, "measure_gradients", lambda length, threads: (0, 2**23 + 1))
    assert not script.show_gradients(512, 1)


@pytest.mark.uncounted
@needs_shim
@pytest.mark.parametrize("threads", [1, 2])
def test_repeated_calls_allocate_nothing_and_the_counter_sees_those_that_do(script, threads):
    counts = allocations.count(script.SHIM, threads)
    seen = counts.pop(allocations.RESULT_CASE + allocations.NO_OUT)
    assert seen[0] >= seen[1] >= allocations.CALLS
    assert set(counts) == set(allocations.CASES)
    assert set(counts.values()) == {(0, 0)}


def test_an_allocation_is_a_failure(script, monkeypatch):
    monkeypatch.setattr(allocations, "why_not", lambda: "")
    monkeypatch.setattr(allocations, "count", lambda source, threads, cases: {"a": (0, 0), "b, no out": (9, 9)})
    assert allocations.show(script.SHIM, 1)
    monkeypatch.setattr(allocations, "count", lambda source, threads, cases: {"a": (1, 0)})
    assert not allocations.show(script.SHIM, 1)


def test_without_a_compiler_nothing_is_claimed(script, monkeypatch, capsys):
    monkeypatch.setattr(allocations, "why_not", lambda: "needs a C compiler")
    assert allocations.show(script.SHIM, 1)
    assert "not counted, needs a C compiler" in capsys.readouterr().out
