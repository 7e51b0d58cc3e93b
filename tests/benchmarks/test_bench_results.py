"""A benchmark's results: as a table, as JSON, as a plot."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from selfattn._bench import plot, report
from selfattn._bench.measure import Result
from selfattn._bench.timing import Quartiles
from selfattn._bench.workloads import WORKLOADS


@pytest.fixture
def results():
    """Made-up figures of two workloads and two numbers of threads."""
    return [
        Result(
            workload=WORKLOADS[name],
            threads=threads,
            isa="avx2",
            rounds=5,
            times={peer: Quartiles(1e-3, 2e-3, 3e-3) for peer in ("selfattn", "numpy", "pytorch")},
            ratios={
                "numpy": Quartiles(3.0, factor * 4.0, 40.0),
                "pytorch": Quartiles(0.4, factor * 0.5, 4.0),
            },
            errors={"selfattn": 0.1, "numpy": 0.2, "pytorch": 0.3},
            skipped={"onnxruntime": "a reason"},
            flop_peak=1e12,
            bandwidth=1e12,
        )
        for threads in (1, 2)
        for name, factor in (("bert-512", 1.0), ("decode-4k-gqa", 4.0))
    ]


def test_table(results):
    pytest.importorskip("torch")
    lines = report.table(results).splitlines()
    assert any("bert-512" in line and "GFLOP/s" in line and "4.00x" in line for line in lines)
    assert any("decode-4k-gqa" in line and "GB/s" in line and "2.00x" in line for line in lines)
    means = [line.split() for line in lines if line.startswith("geometric mean")]
    assert means == [["geometric", "mean", n, "8.00x", "1.00x", "-"] for n in "12"]
    assert "  ONNX Runtime: bert-512, decode-4k-gqa: a reason" in lines


def test_json(results, tmp_path):
    pytest.importorskip("torch")
    report.write_json(results, tmp_path / "r.json")
    record = json.loads((tmp_path / "r.json").read_text())
    assert [entry["threads"] for entry in record["results"]] == [1, 1, 2, 2]
    assert record["results"][0]["fraction_of_peak"] == pytest.approx(WORKLOADS["bert-512"].flops() / 2e-3 / 1e12)
    assert {"selfattn", "NumPy", "PyTorch", "Python"} == set(record["versions"])
    assert record["machine"]["platform"]
    assert record["runtime"]


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot(results, tmp_path, suffix):
    pytest.importorskip("matplotlib")
    file = tmp_path / f"plot.{suffix}"
    plot.write_plot(results, file)
    assert file.stat().st_size > 2000
    if suffix == "svg":
        assert file.read_text().lstrip().startswith("<?xml")


def test_plot_without_peers_is_refused(results, tmp_path):
    pytest.importorskip("matplotlib")
    alone = [replace(result, ratios={}) for result in results]
    with pytest.raises(ValueError, match="no peer"):
        plot.write_plot(alone, tmp_path / "plot.png")
