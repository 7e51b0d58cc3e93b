"""With any arguments: only the documented exceptions, and nothing changes except what the caller asked for."""

from __future__ import annotations

import ast
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from places import SUPPORT

pytestmark = [
    pytest.mark.one_isa,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux' own accounts"),
]

START = f"import sys; sys.path.insert(0, {str(SUPPORT)!r}); import hostile_run; "
CALLS = int(os.environ.get("SELFATTN_HOSTILE_CALLS", "150000"))  # of them about 27 % are good
ROUNDS = int(os.environ.get("SELFATTN_HOSTILE_ROUNDS", "1"))  # of as many calls


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_bad_calls_raise_what_is_documented_and_change_nothing(seed: int, run_python: Any, tmp_path: Path) -> None:
    try:
        printed = run_python(START + f"hostile_run.many({seed}, {CALLS})")
    except AssertionError as failure:
        pytest.fail(f"{failure}\nThe last call: {(tmp_path / 'case').read_text(encoding='utf8')}")
    counts = ast.literal_eval(printed)
    assert sum(counts.values()) == CALLS
    assert CALLS - counts["done"] >= CALLS * 2 / 3
    assert min(counts[name] for name in ("done", "TypeError", "ValueError")) > CALLS / 15
    assert counts["MemoryError"] > CALLS / 3000


@pytest.mark.unsanitized
def test_good_and_bad_calls_leave_no_memory_behind(run_python: Any) -> None:
    assert int(run_python(START + "hostile_run.grow(3, 6_000)")) < 1 << 17


def test_lengths_of_a_claimed_batch_are_looked_at_once(run_python: Any) -> None:
    # A loop over all the entries that the view claims to have would exceed run_python's time limit.
    run_python(
        """
        import numpy as np
        import selfattn as sa

        x = np.lib.stride_tricks.as_strided(np.ones(1, np.float32), (1 << 46, 1, 1, 1), (0,) * 4)
        for lengths in ({"kv_lens": 1}, {"q_lens": [1]}, {"kv_lens": np.broadcast_to(1, 1 << 46)}):
            try:
                sa.attention(x, x, x, **lengths)
            except MemoryError:
                continue
            raise AssertionError("256 TiB of result")
        try:
            sa.attention(x, x, x, kv_lens=np.broadcast_to(2, 1 << 46))
        except ValueError as error:
            assert "kv_lens holds 2" in str(error), error
        """
    )
