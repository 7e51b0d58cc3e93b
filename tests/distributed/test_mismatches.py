"""Ranks that pass different values of one argument: all of them raise an error that names it and the rank."""

from __future__ import annotations

from typing import Any

import pytest

METHODS = {"attention": "attention", "backward": "attention_backward", "caches": "attention_with_kvcache"}


@pytest.mark.parametrize("check", METHODS)
def test_each_argument_in_turn(checked: Any, check: str) -> None:
    found = checked("checks_mismatches", check, 3)
    assert len(found) > 15
    for name, text in found.items():
        kind, _, rest = text.partition(": ")
        assert kind == ("TypeError" if " has dtype " in rest else "ValueError"), text
        assert rest.startswith(f"Group.{METHODS[check]}: {name.removeprefix('values of ')} "), text
        assert " on rank 2 but " in rest, text
        assert rest.endswith(" on rank 0"), text
