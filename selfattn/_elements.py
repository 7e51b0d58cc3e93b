"""How the core stores numbers; csrc/dtype.h has the table."""

from __future__ import annotations

from typing import Any, NamedTuple, TypedDict

import numpy as np
from numpy.typing import NDArray

from . import _core


class ElementFields(TypedDict):
    """What the core says of a type: the fields of ElementType."""

    number: _core.DType
    memory: str
    elements: int
    word_bytes: int
    codes: int


class ElementType(NamedTuple):
    """A type of stored numbers. Rows consist of words of whole bytes; elements of less than a byte share a word."""

    number: _core.DType
    """By which the core knows the type."""
    memory: str
    """The name of NumPy's dtype of a word in memory."""
    elements: int
    """Of a word."""
    word_bytes: int
    codes: int
    """Elements are codes up to ±codes, and each row has a float32 scale; 0: elements are numbers."""

    def row_bytes(self, count: int) -> int:
        """Return the size of `count` adjacent elements, without a scale."""
        return self.words(count) * self.word_bytes

    def words(self, count: int) -> int:
        """Return the number of words of `count` adjacent elements."""
        return -(-count // self.elements)

    @property
    def element_bytes(self) -> float:
        """The size of one element."""
        return self.word_bytes / self.elements

    def numbers(self, words: NDArray[Any], scales: NDArray[np.float32] | None, width: int) -> NDArray[np.float32]:
        """Return rows of words, (..., words), as the numbers (..., width) that they represent, rounded to float32."""
        numbers = _core.unpack(np.ascontiguousarray(words), self.number, width)
        return numbers if scales is None else np.multiply(numbers, scales[..., None], out=numbers)


ELEMENT_TYPES = {name: ElementType(**fields) for name, fields in _core.ELEMENT_TYPES.items()}
