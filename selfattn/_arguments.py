"""Converts users' arguments to the arrays and options of the core, or raises an error that explains why not."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from . import _core
from ._errors import refusal
from ._foreign import ACCEPTED as ACCEPTED
from ._foreign import converted, from_foreign, is_masked, type_name

LAYOUTS = tuple(_core.LAYOUTS)
_Number = TypeVar("_Number")


def is_float(dtype: np.dtype[Any]) -> bool:
    """Whether the core computes with this dtype; bfloat16, from another package, is recognized by its name."""
    return dtype in (np.float32, np.float64, np.float16) or (type_name(dtype) == "bfloat16" and dtype.itemsize == 2)


def as_array(function: str, name: str, value: Any) -> NDArray[Any]:
    """Return `value` as an ndarray of native byte order, without a copy if possible."""
    if is_masked(value):
        raise refusal(
            TypeError,
            function,
            name,
            " is a MaskedArray, whose mask would be lost: pass .data, and what is hidden as mask=",
        )
    array = value if isinstance(value, np.ndarray) else from_foreign(function, name, value)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    return array if type(array) is np.ndarray else array.view(np.ndarray)


def integers(function: str, name: str, value: Any) -> NDArray[np.int64]:
    """Return integers of any width as int64. A copy, so that later changes by the caller have no effect."""
    array = as_array(function, name, value)
    if array.dtype.kind not in "iu":
        raise refusal(TypeError, function, name, f" has dtype {array.dtype}, but integers are needed")
    held = array
    if 0 in array.strides:  # an axis of stride 0 may have any length, but repeats one number
        held = array[tuple(slice(1) if stride == 0 else slice(None) for stride in array.strides)]
    if array.dtype == np.uint64 and held.size and int(held.max()) > np.iinfo(np.int64).max:
        raise refusal(ValueError, function, name, f" holds {int(held.max())}, which is beyond int64")
    own = held.astype(np.int64)
    return own if own.shape == array.shape else np.broadcast_to(own, array.shape)


def floats(function: str, name: str, value: Any, also: str = "") -> NDArray[Any]:
    """Return an array of a type that the core computes with; `also` tells what else is accepted."""
    array = as_array(function, name, value)
    if not is_float(array.dtype):
        raise refusal(TypeError, function, name, f" has dtype {array.dtype}, but {ACCEPTED}{also}")
    return array


def reals(function: str, name: str, value: Any) -> NDArray[np.float64]:
    """Return real numbers of any accepted type as float64."""
    return converted(floats(function, name, value), np.dtype(np.float64))


def real(function: str, name: str, value: Any) -> float:
    """Return a finite number as float."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.number)):
        raise refusal(TypeError, function, name, f" is {value!r}, but a real number is needed")
    if isinstance(value, np.complexfloating):
        raise refusal(TypeError, function, name, f" is {value!r}, but a real number is needed")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise refusal(ValueError, function, name, f" is {value!r}, but it must be finite")
    return number


def window_sides(function: str, value: Any) -> tuple[int, int]:
    """Return a window's two sides; −1 for unbounded."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise refusal(
            TypeError, function, "window", f" is {value!r}, but a pair (left, right) is needed, with None for unbounded"
        )
    left, right = value
    return _reach(function, value, left), _reach(function, value, right)


def _reach(function: str, window: Any, side: Any) -> int:
    if side is None:
        return -1
    if isinstance(side, (bool, np.bool_)) or not isinstance(side, (int, np.integer)):
        raise refusal(TypeError, function, "window", f" is {window!r}, but its entries are integers or None")
    if side < 0:
        raise refusal(
            ValueError,
            function,
            "window",
            f" is {window!r}, but its entries cannot be negative: use None for unbounded",
        )
    return min(int(side), (1 << 63) - 1)


def flag(function: str, name: str, value: Any) -> bool:
    """Return a bool; values that are merely truthy raise a TypeError."""
    if not isinstance(value, (bool, np.bool_)):
        raise refusal(TypeError, function, name, f" is {value!r}, but True or False is needed")
    return bool(value)


def integer(function: str, name: str, value: Any) -> int:
    """Return an integer; a bool does not count as one."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise refusal(TypeError, function, name, f" is {value!r}, but an integer is needed")
    return int(value)


def integer_in(function: str, name: str, value: Any, least: int, most: int) -> int:
    """Return an integer from `least` to `most`."""
    number = integer(function, name, value)
    if not least <= number <= most:
        raise refusal(ValueError, function, name, f" is {value}, but it must be in {least}..{most}")
    return number


def whole_number(function: str, name: str, value: Any, least: int) -> int:
    """Return an integer that is at least `least` and in the range of the core."""
    number = integer(function, name, value)
    if number < least:
        raise refusal(ValueError, function, name, f" is {value}, but it must be at least {least}")
    if number > 1 << 60:
        raise refusal(ValueError, function, name, f" is {value}, but it must be at most {1 << 60}")
    return number


def _dropout(function: str, rate: Any, seed: Any) -> tuple[float, int]:
    """Return the rate of dropout and its seed; without dropout the seed is 0. The core checks the rate's range."""
    number = real(function, "dropout", rate)
    if seed is not None:
        return number, integer_in(function, "seed", seed, 0, (1 << 64) - 1)
    if number > 0:
        text = f" is {rate!r} without a seed: pass an integer in 0..{(1 << 64) - 1}"
        raise refusal(ValueError, function, "dropout", text)
    return number, 0


def thread_count(function: str, value: Any) -> int:
    """Return a checked number of threads; None becomes 0, the default."""
    return 0 if value is None else integer_in(function, "num_threads", value, 1, 4096)


def choice(function: str, name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise unless `value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise refusal(ValueError, function, name, f" is {value!r}, but it must be one of {listed}")


def _number_of(function: str, name: str, chosen: Any, numbers: dict[str, _Number]) -> _Number:
    choice(function, name, chosen, tuple(numbers))
    return numbers[chosen]


def core_options(
    function: str,
    mask: Any = None,
    bias: Any = None,
    causal: Any = False,
    q_offset: Any = None,
    window: Any = None,
    q_lens: Any = None,
    kv_lens: Any = None,
    kv_starts: Any = None,
    scale: Any = None,
    softcap: Any = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    layout: Any = "bhsd",
    return_lse: Any = False,
    return_weights: Any = False,
    precision: Any = "highest",
    num_threads: Any = None,
    t5: Any = None,
    dropout: Any = 0.0,
    seed: Any = None,
    chunk: Any = None,
    prefix_lens: Any = None,
) -> _core.Options:
    """Return the options of `attention`, passed in its order, in the core's form; check what the core cannot check."""
    options = _core.Options()
    if mask is not None:
        options.mask = as_array(function, "mask", mask)
    if bias is not None:
        options.bias = as_array(function, "bias", bias)
    if causal is not False:
        options.causal = flag(function, "causal", causal)
    if q_offset is not None:
        options.q_offset = integers(function, "q_offset", q_offset)
    if window is not None:
        options.window_left, options.window_right = window_sides(function, window)
    if q_lens is not None:
        options.q_lens = integers(function, "q_lens", q_lens)
    if kv_lens is not None:
        options.kv_lens = integers(function, "kv_lens", kv_lens)
    if kv_starts is not None:
        options.kv_starts = integers(function, "kv_starts", kv_starts)
    if scale is not None:
        options.scale = real(function, "scale", scale)
    if softcap is not None:
        options.softcap = real(function, "softcap", softcap)
    if alibi_slopes is not None:
        options.alibi_slopes = reals(function, "alibi_slopes", alibi_slopes)
    if sinks is not None:
        options.sinks = reals(function, "sinks", sinks)
    if type(layout) is not str or layout != "bhsd":  # comparing an array would raise
        options.layout = _number_of(function, "layout", layout, _core.LAYOUTS)
    if return_lse is not False:
        options.return_lse = flag(function, "return_lse", return_lse)
    if return_weights is not False:
        options.return_weights = flag(function, "return_weights", return_weights)
    if type(precision) is not str or precision != "highest":
        options.precision = _number_of(function, "precision", precision, _core.PRECISIONS)
    if num_threads is not None:
        options.num_threads = thread_count(function, num_threads)
    if t5 is not None:
        options.distance_bias, options.distance_origin = _t5(function, t5)
    if type(dropout) is not float or dropout != 0.0 or seed is not None:
        options.dropout, options.seed = _dropout(function, dropout, seed)
    if chunk is not None:
        options.chunk = whole_number(function, "chunk", chunk, 1)
    if prefix_lens is not None:
        options.prefix_lens = integers(function, "prefix_lens", prefix_lens)
    return options


def _t5(function: str, value: Any) -> tuple[NDArray[np.float64], int]:
    from ._bias import T5Bias  # imported here, since _bias imports this module

    if not isinstance(value, T5Bias):
        raise no_t5_bias(function, value)
    return value.for_core()


def no_t5_bias(function: str, given: Any) -> TypeError:
    """Return the error for an argument `t5` that is not a T5Bias."""
    text = f" is a {type(given).__name__}, but a T5Bias is needed: T5Bias(table)"
    return refusal(TypeError, function, "t5", text)


def out_array(function: str, out: Any) -> NDArray[Any]:
    """Check that `out` is an ndarray; the core checks its shape and dtype."""
    if not isinstance(out, np.ndarray) or is_masked(out):
        raise refusal(TypeError, function, "out", f" is a {type(out).__name__}, but a numpy.ndarray is needed")
    return out
