"""Whole messages of compat's functions: each names the function and its own arguments, and changes nothing else."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
from compat_cases import CASES, Broken
from compat_operands import OPERANDS

from selfattn import compat

pytestmark = pytest.mark.one_isa

CALLS = [(name, *case) for name, cases in CASES.items() for case in cases]


def failure(name: str, changed: dict[str, Any]) -> Exception:
    """Return the exception of a call with these arguments instead of good ones."""
    with pytest.raises((TypeError, ValueError, RuntimeError)) as raised:
        getattr(compat, name)(**{**OPERANDS[name], **changed})
    return raised.value


def test_every_function_has_a_table() -> None:
    assert set(CASES) == set(OPERANDS) == set(compat.__all__)
    for name, given in OPERANDS.items():
        getattr(compat, name)(**given)


@pytest.mark.parametrize(("name", "changed", "kind", "message"), CALLS, ids=lambda x: str(x)[:60])
def test_messages(name: str, changed: dict[str, Any], kind: type[Exception], message: str) -> None:
    error = failure(name, changed)
    assert type(error) is kind
    assert str(error) == f"{name}: {message}"


@pytest.mark.parametrize("name", CASES)
def test_renamed_errors_keep_their_cause(name: str) -> None:
    option = "softmax_scale" if name.startswith("flash") else "scale"
    error = failure(name, {option: 1e300})
    assert type(error.__cause__) is ValueError
    assert "scale is 1e+300" in str(error.__cause__)
    reason = failure(name, {next(iter(OPERANDS[name])): Broken("reason")})
    assert str(reason.__cause__) == "reason"


def test_renamed_errors_can_be_pickled_and_copied() -> None:
    error: Any = failure("flash_attn_func", {"softcap": 1e-300})
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(again) is ValueError
        assert str(again) == str(error)
        assert again.message_parts == error.message_parts
    assert error.message_parts[::2] == ("flash_attn_func", "softcap", "softmax_scale", "softcap")
