"""The benchmark's reports: JSON read back, Markdown, the roofline, and the targets' command."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from places import BENCHMARKS

from selfattn._bench import report
from selfattn._bench.peers import PEERS
from selfattn._bench.worker import WorkerFailed
from workbench import markdown, roofline, targets_command
from workbench.grid import GROUPS
from workbench.record import read_records

SCRIPT = BENCHMARKS / "targets.py"
MARKS = f"{markdown.BEGIN}\n{markdown.END}\n"


@pytest.fixture
def results(made_up):
    return [
        made_up(name, threads, pytorch=2.0 * threads)
        for name in ("tiny-16", "decode-4k-gqa", "f64-512")
        for threads in (1, 2)
    ]


@pytest.fixture
def file(results, tmp_path, monkeypatch):
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    monkeypatch.setattr(PEERS["pytorch"], "version", lambda: "2.0", raising=False)
    path = tmp_path / "results.json"
    report.write_json(results, path)
    return path


def test_records_are_read_back(results, file):
    record, read = read_records([file])
    assert read == results
    assert record["versions"]["PyTorch"] == "2.0"
    head = report.heading(record)
    assert "ISA avx2;" in head
    assert "ATEN_CPU_CAPABILITY avx2" in head


def test_the_heading_names_what_is_missing_and_not_set(file, monkeypatch):
    record = json.loads(file.read_text())
    head = report.heading({**record, "missing": ["JAX", "vLLM"], "environment": {}})
    assert "not installed: JAX, vLLM" in head
    assert "SELFATTN_ISA not set, ATEN_CPU_CAPABILITY not set" in head


def test_later_files_replace_what_was_measured_again(made_up, results, file, tmp_path):
    later = tmp_path / "later.json"
    record = json.loads(file.read_text())
    again = made_up("tiny-16", 1, jax=7.0).to_dict()
    later.write_text(json.dumps({**record, "versions": {"JAX": "1"}, "missing": ["vLLM"], "results": [again]}))
    merged, read = read_records([file, later])
    assert len(read) == len(results)
    assert read[0].ratios["jax"].median == 7.0
    assert {"PyTorch", "JAX"} <= set(merged["versions"])
    other = {**record, "machine": {**record["machine"], "processor": "another"}}
    later.write_text(json.dumps(other))
    with pytest.raises(ValueError, match="do not belong together: "):
        read_records([file, later])
    later.write_text(json.dumps({**record, "results": [{**again, "isa": "avx512"}]}))
    with pytest.raises(ValueError, match="avx2, avx512"):
        read_records([file, later])


def test_markdown_shows_every_group_that_was_measured(file):
    text = markdown.markdown(*read_records([file]))
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == ["decode-4k-gqa", "tiny-16", "f64-512"]
    assert rows[0].endswith("| 17 GB/s / 17 GB/s | 50% / 50% | 2.00× / 4.00× |")
    assert "- PyTorch, 1 thread: geomean 2.00x, worst 2.00x (target 3.00x) decode-4k-gqa: missed" in text
    assert "- PyTorch, 2 threads: geomean 4.00x" in text
    assert GROUPS["prefill"].title not in text


def test_markdown_leaves_out_what_one_number_of_threads_lacks(made_up, results):
    alone = made_up("decode-4k-gqa")
    some = [results[0], made_up("tiny-16", 2), replace(alone, skipped={"pytorch": "a reason"})]
    text = markdown.markdown(report.to_record([]), some)
    assert "| 2.00× / – |" in text
    assert next(line for line in text.splitlines() if "decode-4k" in line).endswith("| – |")


def test_fill_replaces_what_is_between_the_marks(file, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{markdown.BEGIN}\nold\n{markdown.END}\nafter\n")
    for _ in range(2):
        markdown.fill(page, *read_records([file]))
        text = page.read_text()
        assert text.startswith(f"before\n{markdown.BEGIN}\n\n- ISA avx2")
        assert text.endswith(f"\n\n{markdown.END}\nafter\n")
        assert "old" not in text
        assert text.count("| `tiny-16`") == 1


@pytest.mark.parametrize("text", ["no marks", f"{markdown.END} {markdown.BEGIN}", MARKS * 2])
def test_fill_refuses_a_page_without_marks(file, tmp_path, text):
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(ValueError, match="once each"):
        markdown.fill(page, *read_records([file]))
    assert page.read_text() == text


def test_the_documents_have_their_marks():
    page = (SCRIPT.parent.parent / "docs" / "performance.md").read_text(encoding="utf-8")
    assert page.count(markdown.BEGIN) == page.count(markdown.END) == 1
    assert page.index(markdown.BEGIN) < page.index(markdown.END)


def test_roofs_are_the_peak_and_the_streams(made_up, results):
    small, large = made_up("few-2x3000"), made_up("decode-32k-gqa")
    peak, memory, cache = roofline.roofs([large, results[0], small])
    assert peak == max(result.flop_peak for result in (small, large, results[0]))
    assert memory == (large.workload.kv_bytes(), large.bandwidth)
    assert cache == (small.workload.kv_bytes(), small.bandwidth)


def test_intensity_counts_each_operand_once(made_up):
    tiny = made_up("tiny-64")
    assert roofline.intensity(tiny) == pytest.approx(4 * 64**3 / (4 * 64 * 64 * 4))


def drawn(results, monkeypatch, path):
    """Return the positions of the points of every panel."""
    figures = []
    figure_class = pytest.importorskip("matplotlib.figure").Figure
    save = figure_class.savefig
    monkeypatch.setattr(figure_class, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    roofline.write_roofline(results, path)
    points = [[c.get_offsets() for c in axes.collections] for axes in figures[0].axes]
    return [np.concatenate([np.empty((0, 2)), *found]) for found in points]


def test_roofline_draws_a_point_per_workload(made_up, results, monkeypatch, tmp_path):
    panels = drawn([*results, made_up("tiny-1")], monkeypatch, tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").stat().st_size > 2000
    assert [len(points) for points in panels] == [2, 2]
    tiny, decode = results[0], results[2]
    expected = {(roofline.intensity(r), r.workload.flops() / 2e-3 / 1e9) for r in (tiny, decode)}
    assert {tuple(point) for point in panels[0]} == expected


def test_roofline_has_a_row_per_type_of_numbers(made_up, results, monkeypatch, tmp_path):
    more = [made_up(f"few-{count}x3000-{suffix}") for count in (2, 4, 6) for suffix in ("bf16", "high")]
    panels = drawn([*results, *more], monkeypatch, tmp_path / "roofline.png")
    assert [len(points) for points in panels] == [2, 2, 3, 0]


def test_roofline_without_types_to_draw_is_refused(results, tmp_path):
    with pytest.raises(ValueError, match="no result of float32, bfloat16, float16"):
        roofline.write_roofline(results[4:], tmp_path / "roofline.png")


def run_script(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True, check=False)


def test_the_script_measures_judges_and_writes(tmp_path):
    file = tmp_path / "r.json"
    done = run_script(
        "--groups", "tiny", "--workloads", "tiny-16", "--peers", "numpy", "--seconds", "0.02", "--json", str(file)
    )
    assert done.stdout.startswith(GROUPS["tiny"].title)
    assert "PyTorch, 2 threads: not measured" in done.stdout
    assert done.returncode == (done.stdout.splitlines()[-1] != "no target missed")
    assert [(r["workload"]["name"], r["threads"]) for r in json.loads(file.read_text())["results"]] == [
        ("tiny-16", 1),
        ("tiny-16", 2),
    ]


def test_the_script_reports_a_file(file, tmp_path):
    done = run_script("--from", str(file))
    assert done.returncode == 1
    assert done.stdout.count(": not measured\n") == sum(bool(group.targets) for group in GROUPS.values()) - 3 + 1
    assert "time of a call, 1 thread: not measured" in done.stdout
    missed = done.stdout.split("missed:\n")[-1]
    assert "tiny: PyTorch, 1 thread, 1 workload: geomean 2.00x" in missed
    page = tmp_path / "page.md"
    page.write_text(f"{markdown.BEGIN}{markdown.END}")
    done = run_script("--from", str(file), "--markdown", "--fill", str(page))
    assert done.stdout.strip() in page.read_text()
    assert "![" not in page.read_text()


def test_fill_shows_the_picture(file, tmp_path):
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "page.md"
    page.write_text(MARKS)
    markdown.fill(page, *read_records([file]), picture=tmp_path / "roofline.png")
    assert "](../roofline.png)\n\n- ISA" in page.read_text()


def test_the_script_lists(tmp_path):
    listed = run_script("--list", "--groups", "decode").stdout
    assert "decode-32k-gqa" in listed
    assert "target PyTorch: each 3.00x" in listed
    done = run_script("--workloads", "nothing")
    assert done.returncode == 1
    assert "no workload 'nothing'" in done.stderr


def arguments(*options):
    parser = argparse.ArgumentParser()
    targets_command.add_arguments(parser)
    return parser.parse_args(options)


def test_a_group_that_fails_leaves_the_others(made_up, monkeypatch, capsys):
    def measured(workloads, peers, threads, *rest):
        if workloads[0].name == "tiny-64":
            raise WorkerFailed("a test")
        return [made_up(workload.name, threads) for workload in workloads]

    monkeypatch.setattr(targets_command, "measure_in_process", measured)
    args = arguments("--groups", "tiny", "decode", "--peers", "numpy")
    assert targets_command.run(args) == 1
    printed = capsys.readouterr()
    assert f"{GROUPS['tiny'].title}: not measured" in printed.out
    assert "decode-32k-gqa" in printed.out
    assert "tiny: a test" in printed.err


def test_the_exit_code_tells_whether_targets_are_met(made_up, monkeypatch):
    ratio = {"fraction": 0.9, "pytorch": 3.0}
    monkeypatch.setattr(
        targets_command,
        "measure_in_process",
        lambda workloads, peers, threads, *rest: [made_up(w.name, threads, **ratio) for w in workloads],
    )
    args = arguments("--groups", "decode", "--dtype", "float32", "--peers", "numpy")
    monkeypatch.setattr(PEERS["pytorch"], "version", lambda: "2.0", raising=False)
    assert targets_command.run(args) == 0
    ratio["fraction"] = 0.84
    assert targets_command.run(args) == 1
