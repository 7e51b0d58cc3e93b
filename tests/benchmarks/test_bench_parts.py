"""The picture of a call's parts: calls with narrower heads, the estimate, and the drawing. Nothing about speed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from selfattn._bench.check import Mismatch, check, expected_parts
from selfattn._bench.measure import check_all, measure
from selfattn._bench.peers import OWN
from selfattn._bench.report import table
from selfattn._bench.timing import Quartiles
from selfattn._bench.workloads import attention_workload, layer_workload
from workbench import parts
from workbench.grid import GROUPS
from workbench.peers import NARROW_HEADS

TYPES = {"bfloat16": "bf16", "float16": "f16"}
WIDE = attention_workload("wide", "a test", 2, 33, 128)
LAYER = layer_workload("layer", "a test", 2, 30, 64, 4)


def with_heads(result, **seconds):
    times = {name.replace("_", "-"): Quartiles(x, x, x) for name, x in seconds.items()}
    return replace(result, times={**result.times, **times})


def test_the_softmax_is_what_does_not_grow_with_head_dim(made_up):
    wide = made_up("prefill-512-d128-bf16", seconds=10e-3, fraction=0.5)
    assert parts.parts(wide) is None
    found = parts.parts(with_heads(wide, heads_32=4e-3, heads_64=6e-3))
    assert found == pytest.approx((5e-3, 2e-3, 10e-3))
    narrow = made_up("prefill-512-d64-f16", seconds=6e-3, fraction=0.25)
    assert parts.parts(with_heads(narrow, heads_32=4e-3)) == pytest.approx((1.5e-3, 2e-3, 6e-3))
    assert parts.parts(with_heads(narrow, heads_32=2e-3)).softmax == 0


@pytest.mark.parametrize("dtype", TYPES)
def test_prefill_is_also_measured_with_narrower_heads(dtype):
    group = GROUPS[f"prefill-{TYPES[dtype]}"]
    assert group.peers(["pytorch"], 1)[:1] == ["pytorch"]
    assert {"heads-32", "heads-64"} <= set(group.peers([], 2))
    by_dim = {w.head_dim: {h.name for h in NARROW_HEADS if h.supports(w)} for w in group.workloads}
    assert by_dim == {64: {"heads-32"}, 128: {"heads-32", "heads-64"}}
    small = WIDE.varied(dtype)
    result = measure(small, NARROW_HEADS, threads=1, seconds=0.01)
    assert parts.parts(result).reached == result.times["selfattn"].median
    assert "narrow" not in table([result])
    assert "heads of" not in table([result])


def test_narrower_heads_are_another_question():
    heads, workload = NARROW_HEADS[0], WIDE.varied("float16")
    arrays = workload.make_arrays()
    out = np.asarray(heads.prepare(workload, arrays, threads=1)())
    assert out.shape[-1] == 32
    answered = heads.answered(workload)
    assert check("narrow", out, expected_parts(answered, heads.operands(workload, arrays))) <= 1
    with pytest.raises(Mismatch):
        check_all(
            workload, arrays, {"selfattn": OWN.prepare(workload, arrays, 1), heads.name: lambda: out * 2}, [heads]
        )
    assert heads.why_not(LAYER)


def test_parts_are_drawn(made_up, monkeypatch, tmp_path):
    figure_class = pytest.importorskip("matplotlib.figure").Figure
    figures = []
    save = figure_class.savefig
    monkeypatch.setattr(figure_class, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    results = [
        with_heads(made_up(w.name, threads, fraction=0.4), heads_32=1e-3, heads_64=1.2e-3)
        for name in ("prefill-bf16", "prefill-f16")
        for w in GROUPS[name].workloads
        for threads in (1, 2)
    ]
    parts.write_parts([*results, made_up("tiny-16")], tmp_path / "parts.png")
    panels = figures[0].axes
    assert [axes.get_title() for axes in panels] == [
        f"{dtype}, {count}, ISA avx2" for dtype in TYPES for count in ("1 thread", "2 threads")
    ]
    assert all(len(axes.patches) == 2 * 28 for axes in panels)
    assert panels[0].patches[0].get_width() == pytest.approx(0.4)
    assert panels[0].patches[28].get_width() == pytest.approx(0.4)  # 0.8 of 2 ms
    with pytest.raises(ValueError, match="narrower heads"):
        parts.write_parts([made_up("tiny-16")], tmp_path / "none.png")
