"""Keys and values in pages that the caller owns; the core reads them in place."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _core
from .._arguments import core_options, integers
from .._elements import ELEMENT_TYPES
from .._foreign import type_name

_TYPES = ("float32", "float64", "float16", "bfloat16")


class Pages:
    """Arrays (pages, page_size, Hkv, ·) of keys and values, and the pages of each sequence."""

    def __init__(
        self,
        function: str,
        name: str,
        arrays: tuple[NDArray[Any], NDArray[Any]],
        table: Any,
        count: int,
        suffix: str = "",
    ) -> None:
        k, v = arrays
        self.function, self.k, self.v = function, k, v
        for side, array in ((f"k{suffix}", k), (f"v{suffix}", v)):
            if array.ndim != 4 or array.shape[:3] != k.shape[:3]:
                raise ValueError(
                    f"{function}: {side} has shape {array.shape}, but (pages, page_size, heads, size) is needed, "
                    "the same for keys and values except for the size"
                )
            if array.shape[1] == 0:
                raise ValueError(f"{function}: {side} has shape {array.shape}, but there must be room for a token")
            strided = array.size > 0 and array.shape[3] > 1 and array.strides[3] != array.itemsize
            if strided or not array.flags.aligned:
                raise ValueError(f"{function}: {side} holds pages whose last dimension is not contiguous")
            if type_name(array.dtype) not in _TYPES or array.dtype != k.dtype:
                raise TypeError(f"{function}: {side} has dtype {array.dtype}, but one of {', '.join(_TYPES)} is needed")
        found = integers(function, name, table)
        if found.ndim != 2 or len(found) != count:
            raise ValueError(f"{function}: {name} has shape {found.shape}, but ({count}, pages) is needed")
        self.name = name
        self.table = np.ascontiguousarray(np.clip(found, -1, len(k)), dtype=np.int32)

    @property
    def page_size(self) -> int:
        """Number of tokens per page."""
        return int(self.k.shape[1])

    def check_lengths(self, lengths: NDArray[np.int64]) -> None:
        """Raise for sequences that are longer than their pages. The core checks the numbers of the pages."""
        room = self.table.shape[1] * self.page_size
        for b in np.flatnonzero((lengths < 0) | (lengths > room))[:1]:
            raise ValueError(
                f"{self.function}: sequence {b} has {lengths[b]} tokens, but {self.name} has room for {room}"
            )

    def slots(self, first: NDArray[np.int64], count: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return the (page, slot) of `count` tokens of each sequence, starting at its token `first`."""
        tokens = first[:, None] + np.arange(count)
        return np.take_along_axis(self.table, tokens // self.page_size, axis=1), tokens % self.page_size

    def step(
        self, rows: NDArray[Any], lengths: NDArray[np.int64], starts: NDArray[np.int64] | None = None
    ) -> _core.Step:
        """Describe a call on the sequences in these rows of the table to the core."""
        stored = ELEMENT_TYPES[type_name(self.k.dtype)]
        k, v = (x.view(stored.memory) for x in (self.k, self.v))
        store = _core.make_cache_store(
            k=_core.CacheTokens(rows=k.swapaxes(1, 2), width=k.shape[3]),
            v=_core.CacheTokens(rows=v.swapaxes(1, 2), width=v.shape[3]),
            dtype=stored.number,
            window=-1,
        )
        table = _core.make_page_table(pages=self.table[rows], lengths=np.ascontiguousarray(lengths), starts=starts)
        return _core.Step(store=store, sequences=table)

    def attend(
        self,
        step: _core.Step,
        q: NDArray[Any],
        options: dict[str, Any],
        out: NDArray[Any] | None = None,
        new: tuple[NDArray[Any], NDArray[Any]] | None = None,
    ) -> Any:
        """Store new keys and values (B, T, Hkv, ·), then attend with q (B, Sq, H, D) to the pages of a step."""
        values = core_options(self.function, layout="bshd", **options)
        inputs = _core.CacheInputs(q=q)
        if new is not None:
            inputs.k, inputs.v = new
            inputs.tokens = new[0].shape[1]
        return _core.attend_cache(self.function, step, inputs, out, values)
