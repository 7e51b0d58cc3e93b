"""How the core stores numbers; csrc/dtype.h has the table."""

from __future__ import annotations

from typing import NamedTuple

from . import _core


class ElementType(NamedTuple):
    """A type of stored numbers. Rows consist of units of whole bytes; elements of less than a byte share a unit."""

    number: _core.DType
    """By which the core knows the type."""
    memory: str
    """The name of NumPy's dtype in memory."""
    elements: int
    """Of a unit."""
    unit_bytes: int
    codes: int
    """Elements are codes up to ±codes, and each row has a float32 scale; 0: elements are numbers."""

    def row_bytes(self, count: int) -> int:
        """Return the size of `count` adjacent elements, without a scale."""
        return -(-count // self.elements) * self.unit_bytes

    @property
    def element_bytes(self) -> float:
        """The size of one element."""
        return self.unit_bytes / self.elements


ELEMENT_TYPES = {name: ElementType(*fields) for name, fields in _core.ELEMENT_TYPES.items()}
