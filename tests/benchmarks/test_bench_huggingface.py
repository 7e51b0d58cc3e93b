"""The benchmark of whole models: that it runs, checks and reports. Nothing about speed."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from places import BENCHMARKS
from scripts import load_script

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("ml_dtypes")

import selfattn  # noqa: E402
from workbench import hf_caches, hf_command, hf_models  # noqa: E402

# Versions before 5.24 have no other name for it.
pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    selfattn.set_num_threads(None)


def test_the_decoder_of_the_example_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    script = load_script("llm")
    monkeypatch.setattr(script, "VOCABULARY", 64)
    monkeypatch.setattr(script, "LENGTHS", (9,))
    monkeypatch.setattr(script, "PROMPT", 5)
    for dtype in ("float32", "bfloat16"):
        models = script.Models(dtype, hf_models.LLAMA_1B.tiny(), 1)
        for name, calls in script.cases(models):
            script.check(name, calls, script.WORST[dtype])
            assert 0 < models.share_outside(calls["selfattn"]) < 1
    calls["sdpa"] = lambda: calls["selfattn"]() + 1
    with pytest.raises(hf_models.Mismatch, match="prompt of 5: logits differ by"):
        script.check(name, calls, 0.04)


def test_measures_every_group_and_writes_a_table(tmp_path: Path) -> None:
    answer = tmp_path / "rows.json"
    args = argparse.Namespace(
        groups=list(hf_models.GROUPS),
        dtype=["float32"],
        threads=[1],
        seconds=0.0,
        lengths=[9],
        tiny=True,
        answer=answer,
    )
    assert hf_command.measure(args) == 0
    rows = json.loads(answer.read_text())
    assert [row["group"] for row in rows] == list(hf_models.GROUPS)
    assert all(row["own_seconds"] > 0 and row["q1"] <= row["ratio"] <= row["q3"] for row in rows)
    rows.append({**rows[0], "dtype": "bfloat16", "threads": 2, "length": 10, "ratio": 7.5})
    text = hf_command.markdown(rows)
    assert text.count("###") == len(hf_models.GROUPS)
    assert "| length | float32, 1 thread | bfloat16, 2 threads |" in text
    assert [line for line in text.splitlines() if line.startswith("| 10 | – | 7.50× ")]


@pytest.mark.parametrize("name", hf_models.GROUPS)
def test_a_wrong_result_is_not_timed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = hf_models.Bench(hf_models.GROUPS[name], "bfloat16", tiny=True)
    assert set(bench.runs(20)) == {"selfattn", hf_models.GROUPS[name].peer}
    attention = selfattn._core.attention

    def forgetful(q, k, v, out, options):
        tokens = 1 if options.layout == selfattn._core.LAYOUTS["bshd"] else 2
        return attention(q, np.flip(k, tokens), v, out, options)

    monkeypatch.setattr(selfattn._core, "attention", forgetful)
    with pytest.raises(hf_models.Mismatch, match="length 20, bfloat16: results differ"):
        bench.runs(20)


def test_measures_every_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert hf_caches.main(["--tiny", "--batch", "2", "--length", "9", "--seconds", "0", "--dtype", "float32"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "### 2 × 9 tokens, float32, 1 thread"
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines[4:]] == list(hf_caches.RUNS)


def test_a_wrong_cache_is_not_timed() -> None:
    steps = hf_caches.Steps(hf_caches.SHAPE.tiny(), "float32", 2, 9)
    steps.check()
    steps.caches["Cache"].crop(-1)
    with pytest.raises(hf_caches.Mismatch, match="selfattn, Cache, float32: results differ by"):
        steps.check()


def test_overhead_has_a_line_for_each_case_and_type() -> None:
    command = [sys.executable, str(BENCHMARKS / "hf_overhead.py"), "--seconds", "0.01", "--dtype", "float32"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    cases = ("mask, one sequence", "attention, one sequence", "mask, 4 sequences", "attention, 4 sequences")
    lines = printed.splitlines()[1:]
    assert len(lines) == len(cases)
    assert all(case in line and "sdpa" in line for case, line in zip(cases, lines, strict=True))
