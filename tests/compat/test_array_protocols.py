"""Arrays whose protocols (DLPack, `__array__`) refuse, lie or raise: errors name the argument."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import selfattn as sa

pytestmark = pytest.mark.one_isa


class OnlyDLPack:
    def __init__(self, array: Any) -> None:
        self.array = array

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


@pytest.fixture
def x(normal: Any) -> Any:
    return normal(2, 3, 40, 8)


def test_dlpack_of_types_that_numpy_lacks(x: Any) -> None:
    class Strange(OnlyDLPack):
        def __dlpack__(self, **options: Any) -> Any:
            raise RuntimeError("Unsupported dtype in DLTensor.")  # NumPy's own words

    with pytest.raises(TypeError, match=r"attention: k of type Strange is not for NumPy to read .*float16, bfloat16"):
        sa.attention(x, Strange(x), x)


class Spread:
    """An array spread over several devices, as JAX has them: DLPack cannot describe it, `__array__` works."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __dlpack_device__(self) -> tuple[int, int]:
        raise BufferError("the array is on several devices")

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return self.array


def test_array_protocol_serves_where_dlpack_refuses(x: Any) -> None:
    assert np.array_equal(sa.attention(Spread(x), x, Spread(x)), sa.attention(x, x, x))


class Hostile:
    """An array whose protocols raise what they like."""

    def __init__(self, array: Any, error: Exception) -> None:
        self.array, self.error = array, error

    def __dlpack_device__(self) -> tuple[int, int]:
        raise self.error

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        if self.array is None:
            raise self.error
        return self.array


class OwnError(Exception):
    pass


ERRORS = [KeyError("k"), OwnError("own"), ZeroDivisionError("zero"), TypeError("t"), OSError(5, "io"), IndexError("i")]


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_whatever_protocols_raise_names_the_argument(x: Any, error: Exception) -> None:
    assert np.array_equal(sa.attention(x, Hostile(x, error), x), sa.attention(x, x, x))
    with pytest.raises(TypeError, match="attention: k of type Hostile is not an array of numbers: ") as found:
        sa.attention(x, Hostile(None, error), x)
    assert found.value.__cause__ is error

    class Refusing(OnlyDLPack):
        def __dlpack__(self, **options: Any) -> Any:
            raise error

    with pytest.raises(TypeError, match=r"attention: k of type Refusing is not for NumPy to read") as found:
        sa.attention(x, Refusing(x), x)
    assert found.value.__cause__ is error


@pytest.mark.parametrize("device", [None, (1,), ("cpu", 0), 1])
def test_a_device_that_makes_no_sense_counts_as_none(x: Any, device: Any) -> None:
    strange = Spread(x)
    strange.__class__ = type("Odd", (Spread,), {"__dlpack_device__": lambda self: device})
    assert np.array_equal(sa.attention(x, strange, x), sa.attention(x, x, x))


def test_errors_of_conversions_name_the_argument(x: Any) -> None:
    with pytest.raises(ValueError, match=r"attention: k of type list is not an array of numbers: .*inhomogeneous"):
        sa.attention(x, [[1.0], [1.0, 2.0]], x)
    with pytest.raises(ValueError, match=r"merge_states: lses\[1\] of type list is not an array"):
        sa.merge_states([x, x], [x[..., 0], [[1.0], [1.0, 2.0]]])
    with pytest.raises(TypeError, match=r"merge_states: outs is .*, but a sequence of arrays is needed"):
        sa.merge_states(3, [1.0])  # type: ignore[arg-type]
    torch = pytest.importorskip("torch")
    with pytest.raises((TypeError, RuntimeError), match="attention: v of type Tensor is not an array of numbers"):
        sa.attention(x, x, torch.empty(x.shape, device="meta"))
