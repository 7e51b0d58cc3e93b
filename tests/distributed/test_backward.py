"""Gradients over 1 to 5 ranks are those of one process."""

from __future__ import annotations

from typing import Any

import pytest

NAME = "Group.attention_backward"
ERRORS = {
    "sinks": f"ValueError: {NAME}: wrt names 'sinks', but there is no sinks",
    "r": f"ValueError: {NAME}: wrt names 'r', but it must be one of ",
    "grad_out": f"ValueError: {NAME}: grad_out has shape (2, 4, 30, 3) but (2, 4, 30, 16) is needed",
    "lse": f"ValueError: {NAME}: lse has shape (2, 2, 30) but (2, 4, 30) is needed",
    "mask": f"ValueError: {NAME}: mask has 60 rows but rows has 30 positions",
    "dropout": f"ValueError: {NAME}: dropout is 0.5 without a seed",
}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("check", ["options", "types", "layout", "bias_of_one_row", "bias_of_few_rows"])
def test_gradients(checked: Any, check: str, size: int) -> None:
    checked("checks_backward", check, size)


def test_bits_do_not_depend_on_the_number_of_ranks(checked: Any) -> None:
    hashes = {tuple(checked("checks_attention", "gradients", size)) for size in (1, 2, 3, 4, 5)}
    assert len(hashes) == 1


def test_errors(checked: Any) -> None:
    found = checked("checks_backward", "errors", 2)
    assert found.keys() == ERRORS.keys()
    assert {name: text for name, text in found.items() if not text.startswith(ERRORS[name])} == {}
