"""Attention over 1 to 5 ranks: right, and with the same bits for any number of ranks."""

from __future__ import annotations

from typing import Any

import pytest

SIZES = [1, 2, 3, 4, 5]
CHECKS = [
    "rows",
    "tree",
    "sees",
    "heads",
    "layout_and_out",
    "any_rows",
    "single_rows",
    "threads_and_cuts",
    "part_of_a_communicator",
    "many_small_calls",
]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("check", CHECKS)
def test_attention(checked: Any, check: str, size: int) -> None:
    checked("checks_attention", check, size)


def test_bits_do_not_depend_on_the_number_of_ranks(checked: Any) -> None:
    hashes = {tuple(checked("checks_attention", "options", size)) for size in SIZES}
    assert len(hashes) == 1
