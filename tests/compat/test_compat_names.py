"""A sweep: whatever is wrong with an argument, the error names compat's function and only that function's arguments."""

from __future__ import annotations

import inspect
import itertools
import re
from typing import Any

import numpy as np
import pytest
from compat_operands import OPERANDS, array

from selfattn import compat

pytestmark = pytest.mark.one_isa

# Each is wrong, or at least unusual, for most arguments.
ODD: list[Any] = [
    None,
    "odd",
    object(),
    True,
    -1,
    3,
    1e300,
    float("nan"),
    (1, 2),
    (-1, "odd"),
    [[0], [1]],
    [0, 1, 2],
    [5, -9],
    {},
    array(2),
    array(3, 3, dtype=bool),
    array(2, 5, 3, 8),
    array(1, 6, 2, 7),
    array(5, 4, 8, dtype=np.float64),
    array(2, 9, 2, 8, dtype=np.int32),
    array(0, 0, 0, 0),
    np.ma.masked_less(array(2, 5), 0),
]
# Messages about something else than one argument.
PROSE = re.compile(r"sequence \d|the (leading dimensions|result)|two rows of k|unexpected keyword|enable_gqa needs")


def calls(name: str) -> list[dict[str, Any]]:
    """Every argument wrong by itself, and the operands wrong in pairs."""
    given = OPERANDS[name]
    single = [{parameter: odd} for parameter in inspect.signature(getattr(compat, name)).parameters for odd in ODD]
    arrays = [x for x in ODD if isinstance(x, np.ndarray)]
    pairs = itertools.combinations([key for key, x in given.items() if isinstance(x, np.ndarray)], 2)
    return single + [{a: odd, b: odd} for a, b in pairs for odd in arrays]


@pytest.mark.parametrize("name", OPERANDS)
def test_errors_name_the_functions_own_arguments(name: str) -> None:
    own = set(inspect.signature(getattr(compat, name)).parameters)
    errors: list[Exception] = []
    for changed in calls(name):
        try:
            getattr(compat, name)(**{**OPERANDS[name], **changed})
        except (TypeError, ValueError) as error:
            errors.append(error)
    assert len(errors) > 100
    for error in errors:
        function, _, text = str(error).partition(": ")
        named = getattr(error, "message_parts", (name, "", *re.findall(r"^\w+", text)))[2::2]
        assert function == name, error
        assert PROSE.match(text) or (named and set(named) <= own), error
