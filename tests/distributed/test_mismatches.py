"""Ranks that pass different values of one argument: all of them raise an error that names it and the rank."""

from __future__ import annotations

from typing import Any

import pytest

METHODS = {
    "attention": "Group.attention",
    "backward": "Group.attention_backward",
    "caches": "Group.attention_with_kvcache",
    "layer": "SplitSelfAttention",
    "layer_gradients": "SplitSelfAttention.vjp",
}


@pytest.mark.parametrize("check", METHODS)
def test_each_argument_in_turn(checked: Any, check: str) -> None:
    found = checked("checks_mismatches", check, 3)
    assert len(found) > 15
    for name, text in found.items():
        kind, _, rest = text.partition(": ")
        assert kind == ("TypeError" if " has dtype " in rest else "ValueError"), text
        argument = name.removeprefix("values of ").split()[0]
        assert rest.startswith(f"{METHODS[check]}: {argument} "), text
        assert " on rank 2 but " in rest, text
        assert rest.endswith(" on rank 0"), text
