"""The memory of a cache: keys, values, and the scales of codes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _core
from ._arguments import choice, integer_in
from ._elements import ELEMENT_TYPES
from ._errors import refusal

_ALIGNMENT = 64


def storage_name(function: str, dtype: Any) -> str:
    """Return the name of an accepted storage type; bfloat16 is recognized by its name."""
    try:
        name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    except TypeError:
        name = repr(dtype)
    if name not in ELEMENT_TYPES:
        raise refusal(TypeError, function, "dtype", f" is {name}, but {', '.join(ELEMENT_TYPES)} are accepted")
    return name


def values_width(function: str, head_dim: int, value_dim: Any, values: Any, dtype: str) -> tuple[int, bool]:
    """Return the checked size of v's heads, and whether values are a prefix of the keys."""
    choice(function, "values", values, ("own", "prefix"))
    width = head_dim if value_dim is None else count(function, "value_dim", value_dim)
    prefix = values == "prefix"
    elements = ELEMENT_TYPES[dtype].elements
    if prefix and (width > head_dim or width % elements):
        rule = f"at most head_dim = {head_dim}" + (
            f", and a multiple of {elements} for {dtype}" if elements > 1 else ""
        )
        raise refusal(ValueError, function, "value_dim", f" is {width}, but as a prefix of the keys it must be {rule}")
    return width, prefix


def count(function: str, name: str, value: Any, least: int = 1) -> int:
    """Return `value` checked to be an integer from `least` to 2^31 - 1."""
    return integer_in(function, name, value, least, (1 << 31) - 1)


@dataclass(frozen=True)
class Layout:
    """Where the arrays of a cache are in its buffer, which begins with a header."""

    name: str
    pages: int  # a cache without pages has one for each batch entry
    heads: int
    slots: int  # tokens per page
    head_dim: int
    value_dim: int
    header_bytes: int = 0
    prefix: bool = False  # values are the first value_dim numbers of keys

    def arrays(self) -> list[tuple[int, Any, tuple[int, ...]]]:
        """Return (offset, type, shape) of k, v and, for codes, their scales; without v if it is a prefix of k."""
        stored = ELEMENT_TYPES[self.name]
        memory_type = np.dtype(stored.memory)
        rows = (self.pages, self.heads, self.slots)
        wanted: list[tuple[Any, tuple[int, ...]]] = [
            (memory_type, (*rows, stored.words(n))) for n in (self.head_dim, self.value_dim)
        ]
        if stored.codes:
            wanted += [(np.dtype(np.float32), rows)] * 2
        if self.prefix:
            wanted = wanted[::2]
        found, offset = [], _aligned(self.header_bytes)
        for kind, shape in wanted:
            found.append((offset, kind, shape))
            offset += _aligned(math.prod(shape) * kind.itemsize)
        return found

    def nbytes(self) -> int:
        """Return the size of the whole block."""
        offset, kind, shape = self.arrays()[-1]
        return offset + _aligned(math.prod(shape) * kind.itemsize)


class Store:
    """The arrays of a cache in one block of memory, and their description for the core."""

    def __init__(self, function: str, layout: Layout, window: int | None, buffer: Any) -> None:
        self.name = layout.name
        self.memory = _memory(function, layout.nbytes(), buffer)
        arrays = [np.ndarray(shape, kind, self.memory.data, offset) for offset, kind, shape in layout.arrays()]
        self._arrays = arrays
        stored = ELEMENT_TYPES[layout.name]
        self.k: NDArray[Any] = arrays[0]
        self.v: NDArray[Any] = arrays[0][..., : stored.words(layout.value_dim)] if layout.prefix else arrays[1]
        self.k_scales: NDArray[np.float32] | None = None
        self.v_scales: NDArray[np.float32] | None = None
        if stored.codes:
            self.k_scales, self.v_scales = arrays[1 if layout.prefix else 2], arrays[-1]
        self.core = _core.make_cache_store(
            k=_core.CacheTokens(rows=self.k, scales=self.k_scales, width=layout.head_dim),
            v=_core.CacheTokens(rows=self.v, scales=self.v_scales, width=layout.value_dim),
            dtype=stored.number,
            window=-1 if window is None else int(window),
        )

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype that users see. NumPy knows bfloat16 only after ml_dtypes has been imported."""
        try:
            return np.dtype(self.name)
        except TypeError:
            raise TypeError(f"NumPy knows no {self.name}: import ml_dtypes first") from None

    def arrays(self) -> list[NDArray[Any]]:
        """Return all arrays that hold tokens, each (pages, heads, slots, ...)."""
        return list(self._arrays)

    def view(self, array: NDArray[Any]) -> NDArray[Any]:
        """Return a read-only view in the dtype that users see; of words with several elements, their bytes."""
        stored = ELEMENT_TYPES[self.name]
        tokens = array.dtype == stored.memory
        view = array.view((np.uint8 if stored.elements > 1 else self.dtype) if tokens else array.dtype)
        view.flags.writeable = False
        return view


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _memory(function: str, nbytes: int, buffer: Any) -> NDArray[np.uint8]:
    if buffer is None:
        # One cache line more, to align the start; the system zeroes pages when they are first touched.
        block = np.zeros(nbytes + _ALIGNMENT, np.uint8)
        start = -block.ctypes.data % _ALIGNMENT
        return block[start : start + nbytes]
    try:
        given = memoryview(buffer)
        view = given.cast("B")
    except (TypeError, ValueError) as error:
        raise refusal(
            TypeError, function, "buffer", f" is a {type(buffer).__name__}, but C-contiguous memory is needed"
        ) from error
    if "O" in given.format:
        raise refusal(TypeError, function, "buffer", " holds Python objects, but plain bytes are needed")
    if view.readonly:
        raise refusal(ValueError, function, "buffer", " is read-only")
    if view.nbytes < nbytes:
        raise refusal(ValueError, function, "buffer", f" has {view.nbytes} bytes, but {nbytes} are needed")
    memory = np.frombuffer(view, np.uint8, nbytes)
    if memory.ctypes.data % 8:
        raise refusal(ValueError, function, "buffer", " starts at an odd address, but a multiple of 8 bytes is needed")
    return memory
