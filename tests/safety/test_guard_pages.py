"""No byte outside an operand is accessed: each operand lies next to an inaccessible page."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from places import SUPPORT

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="maps memory as Linux does")

START = f"import sys; sys.path.insert(0, {str(SUPPORT)!r}); import guard_sweep; "
SEEDS = range(int(os.environ.get("SELFATTN_GUARD_SEEDS", "1")))


@pytest.mark.parametrize("seed", SEEDS)
def test_every_operand_next_to_a_guard_page(isa: str, seed: int, run_python: Any, tmp_path: Path) -> None:
    try:
        printed = run_python(START + f"guard_sweep.run(guard_sweep.sweep, {isa!r}, {seed})")
    except AssertionError as failure:
        last = (tmp_path / "case").read_text(encoding="utf8")
        pytest.fail(f"{failure}\nThe last case: {last}")
    met = {name: int(count) for name, count in re.findall(r"(\w+)=(\d+)", printed)}
    assert met.keys() == {
        "attention",
        "chosen",
        "gradients",
        "layer",
        "piece",
        "ranges",
        "relative",
        "relative_gradients",
        "rope",
        "row",
        "threads",
        "tile",
    }
    assert min(met.values()) >= 20


@pytest.mark.unsanitized
def test_one_element_too_far_is_caught(isa: str, run_python: Any) -> None:
    lines = run_python(START + f"guard_sweep.run(guard_sweep.reach, {isa!r})").splitlines()
    assert [line for line in lines if not line.endswith(" SIGSEGV")] == []
    names = {tuple(line.split()[:-1]) for line in lines}
    operands = ["q", "k", "v", "mask", "bias", "kv_lens", "q_lens", "q_offset", "alibi_slopes", "sinks", "out"]
    for side in ("start", "end"):
        assert {("attention", side, name) for name in operands} < names
        upstream = ("grad_out", "result", "lse", "grad_lse", "grad_weights")
        assert {("gradients", side, name) for name in ("q", "k", "v", *upstream)} < names
        assert {("layer", side, name) for name in ("x", "context", "w_q", "w_o", "b_q", "b_o", "positions")} < names
        assert {("relative", side, name) for name in ("q", "k", "v", "r", "u", "w", "out")} < names
        of_both = ("q", "k", "v", "r", "u", "w", "grad_out", "result", "lse")
        assert {("relative_gradients", side, name) for name in of_both} < names
        assert {("rope", side, name) for name in ("x", "positions", "out")} < names
        kinds = ("attention", "gradients", "relative_gradients", "layer")
        assert {(kind, side, "result", "0") for kind in kinds} < names
