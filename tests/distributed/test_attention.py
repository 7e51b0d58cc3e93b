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


@pytest.mark.parametrize("size", [1, 2, 4])
def test_memory_of_a_rank_is_that_of_its_rows_and_some_chunks(checked: Any, size: int) -> None:
    """What NumPy allocates. The core keeps the sums of the rank's rows besides."""
    found = checked("checks_attention", "memory", size)
    assert len(found) == 2 * size
    for rows, chunk, peak in found:
        # Of each row: q, a copy of k and v to send, and out twice, 2 heads of 16 numbers each; and lse twice.
        of_rows = rows * 4 * (5 * 2 * 16 + 2 * 2)
        assert rows == 8192 // size
        assert peak < of_rows + 3 * chunk + 100_000, (rows, chunk)


def test_bits_do_not_depend_on_the_number_of_ranks(checked: Any) -> None:
    hashes = {tuple(checked("checks_attention", "options", size)) for size in SIZES}
    assert len(hashes) == 1
