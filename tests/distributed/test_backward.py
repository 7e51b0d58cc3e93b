"""Gradients over 1 to 5 ranks are those of one process."""

from __future__ import annotations

from typing import Any

import pytest

NAME = "Group.attention_backward"
ERRORS = {
    "wrt": f"ValueError: {NAME}: wrt is ('q',) on rank 1 but ('k',) on rank 0",
    "sinks": f"ValueError: {NAME}: wrt names 'sinks', but ",
    "scale": f"ValueError: {NAME}: wrt names 'scale', but only 'q', 'k' and 'v' are possible over ranks",
    "grad_out": f"ValueError: {NAME}: grad_out has shape (2, 4, 30, 3) but (2, 4, 30, 16) is needed",
    "lse": f"ValueError: {NAME}: lse has shape (2, 2, 30) but (2, 4, 30) is needed",
    "mask": f"ValueError: {NAME}: mask has rows of its own on each rank",
    "dropout": f"ValueError: {NAME}: dropout cannot be used over ranks",
}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("check", ["options", "types", "layout"])
def test_gradients(checked: Any, check: str, size: int) -> None:
    checked("checks_backward", check, size)


def test_errors(checked: Any) -> None:
    found = checked("checks_backward", "errors", 2)
    assert found.keys() == ERRORS.keys()
    assert {name: text for name, text in found.items() if not text.startswith(ERRORS[name])} == {}
