"""Memory between two inaccessible pages: a read or write one element too far ends the process."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np

Side = Literal["start", "end"]
SIDES: tuple[Side, Side] = ("start", "end")

PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_NO_ACCESS = 0


def _map(size: int) -> tuple[int, int]:
    """Map whole pages for `size` bytes between two inaccessible ones; return their address and number of bytes."""
    inner = max(-(-size // PAGE), 1) * PAGE
    readable = mmap.PROT_READ | mmap.PROT_WRITE
    base = _libc.mmap(None, inner + 2 * PAGE, readable, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    assert base not in (None, ctypes.c_void_p(-1).value), "no memory"
    for guard in (base, base + PAGE + inner):
        assert _libc.mprotect(guard, PAGE, _NO_ACCESS) == 0
    return base + PAGE, inner


class Address:
    """Array interface of the memory at an address, whatever it holds."""

    def __init__(self, address: int, shape: tuple[int, ...], dtype: np.dtype[Any], strides: tuple[int, ...]) -> None:
        self.__array_interface__ = {
            "version": 3,
            "data": (address, False),
            "shape": shape,
            "typestr": dtype.str,
            "strides": strides,
        }


class Region:
    """Space for one array that borders on an inaccessible page."""

    def __init__(self, capacity: int) -> None:
        self._start, self._size = _map(capacity)
        self._bytes = np.asarray(Address(self._start, (self._size,), np.dtype(np.uint8), (1,)))

    def place(self, x: Any, side: Side, strides: tuple[int, ...], fill: int) -> tuple[Any, Any]:
        """Copy x to the region's first or last bytes, with `strides`; gaps between its elements hold `fill`.

        Return the array and all bytes from its lowest to its highest.
        """
        if x.size == 0:
            return x, self._bytes[:0]
        reach = [(n - 1) * stride for n, stride in zip(x.shape, strides, strict=True)]
        below, above = -sum(min(r, 0) for r in reach), sum(max(r, 0) for r in reach) + x.itemsize
        assert below + above <= self._size, f"{below + above} bytes do not fit"
        first = 0 if side == "start" else self._size - below - above
        extent = self._bytes[first : first + below + above]
        extent[...] = fill
        placed = array_at(self._start + first + below, x, strides)
        placed[...] = x
        return placed, extent


def shifted(x: Any, side: Side) -> Any:
    """Return x shifted by one element over the border on that side."""
    step = x.itemsize if side == "end" else -x.itemsize
    return array_at(x.ctypes.data + step, x, x.strides)


def array_at(address: int, like: Any, strides: tuple[int, ...]) -> Any:
    # The interface cannot express bfloat16: read bytes of its size, then view them as bfloat16.
    same_size = np.dtype(f"V{like.itemsize}")
    return np.asarray(Address(address, like.shape, same_size, strides)).view(like.dtype)


class _Allocator(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("ctx", "malloc", "calloc", "realloc", "free")]


class _Handler(ctypes.Structure):  # PyDataMem_Handler of NumPy's C interface
    _fields_ = [("name", ctypes.c_char * 127), ("version", ctypes.c_uint8), ("allocator", _Allocator)]


class Heap:
    """NumPy's own arrays, each in a separate mapping that borders on an inaccessible page."""

    def __init__(self) -> None:
        self.side: Side = "end"
        self.served = 0
        self._mappings: dict[int, tuple[int, int, int]] = {}
        address, size = ctypes.c_void_p, ctypes.c_size_t
        # Kept alive: NumPy calls them as long as an array exists.
        self._functions = [
            ctypes.CFUNCTYPE(address, address, size)(lambda _, n: self._new(n)),
            ctypes.CFUNCTYPE(address, address, size, size)(lambda _, n, each: self._new(n * each)),
            ctypes.CFUNCTYPE(address, address, address, size)(lambda _, old, n: self._resize(old, n)),
            ctypes.CFUNCTYPE(None, address, address, size)(lambda _, old, __: self._free(old)),
        ]
        pointers = [ctypes.cast(function, address) for function in self._functions]
        self._handler = _Handler(b"guarded", 1, _Allocator(None, *pointers))
        new_capsule = ctypes.pythonapi.PyCapsule_New
        new_capsule.restype = ctypes.py_object
        new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        self._capsule = new_capsule(ctypes.addressof(self._handler), b"mem_handler", None)

    def _new(self, size: int) -> int:
        start, inner = _map(size)
        address = start if self.side == "start" else start + inner - size
        self._mappings[address] = (start, inner, size)
        self.served += 1
        return address

    def _free(self, address: int | None) -> None:
        if address is not None:
            start, inner, _ = self._mappings.pop(address)
            _libc.munmap(start - PAGE, inner + 2 * PAGE)

    def _resize(self, old: int, size: int) -> int:
        address = self._new(size)
        ctypes.memmove(address, old, min(size, self._mappings[old][2]))
        self._free(old)
        return address

    @contextmanager
    def installed(self, side: Side) -> Iterator[None]:
        """Let NumPy allocate here."""
        self.side = side
        previous = _set_handler(self._capsule)
        try:
            yield
        finally:
            _set_handler(previous)


def _set_handler(capsule: Any) -> Any:
    try:
        from numpy._core import _multiarray_umath as core
    except ImportError:  # NumPy 1
        from numpy.core import _multiarray_umath as core
    get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    get_pointer.restype = ctypes.c_void_p
    get_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    table = ctypes.cast(get_pointer(core._ARRAY_API, None), ctypes.POINTER(ctypes.c_void_p))
    set_handler = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.py_object)(table[304])  # PyDataMem_SetHandler
    return set_handler(capsule)
