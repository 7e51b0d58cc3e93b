"""The options of attention over ranks: which there are, and their values for some of the rows and keys."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import _core
from .._arguments import as_array, core_options, integers
from .._attention import _DEFAULTS
from .._bias import T5Bias
from .._errors import refusal
from .._keywords import refuse_unknown
from .._norm import LayerNorm, RMSNorm
from ._agree import Fact
from ._rows import Owners

REFUSED = {
    "q_offset": "the positions of queries are those of rows",
    "return_weights": "no rank has all keys at once",
}
# Options that differ between rows or keys.
_LENGTHS = ("q_lens", "kv_lens", "kv_starts", "prefix_lens")
_BY_ROW = ("mask", "bias", *_LENGTHS)
# Each rank has its own rows of mask and bias, and may have its own number of threads.
_COMPARED = [name for name in _DEFAULTS if name not in ("mask", "bias", "num_threads", *REFUSED)]


_FAR = 1 << 62


class _Reach(NamedTuple):
    """What queries may see: keys so far to the left and right, before the end of a prefix, and in their own chunk.

    Also the positions of valid queries and keys.
    """

    left: int
    right: int
    q_end: int
    kv_begin: int
    kv_end: int
    prefix: int
    chunk: int


class Options:
    """Checked options of one call."""

    def __init__(self, function: str, like: Callable[..., Any], given: Mapping[str, Any]) -> None:
        """Check the options of the public function `like`, as far as one rank can."""
        self.function = function
        self.given = {name: x for name, x in given.items() if x is not None and x is not False}
        if type(self.given.get("dropout")) in (int, float) and self.given["dropout"] == 0:
            del self.given["dropout"]
        for name, reason in REFUSED.items():
            if name in self.given:
                raise refusal(ValueError, function, name, f" cannot be used over ranks: {reason}")
        refuse_unknown(like, [name for name in given if name not in REFUSED])
        core_options(function, **{name: x for name, x in self.given.items() if name != "out"})
        self.out = self.given.pop("out", None)
        self.layout = self.given.pop("layout", "bhsd")
        self.return_lse = bool(self.given.pop("return_lse", False))
        self.num_threads = self.given.pop("num_threads", None)
        for name in ("mask", "bias"):
            if name in self.given:
                self.given[name] = as_array(function, name, self.given[name])
        for name in _LENGTHS:
            if name in self.given:
                self.given[name] = integers(function, name, self.given[name])
        self.with_rows = {name for name in self._with_axis() if self.given[name].shape[-2] != 1}
        self.checked = dict(self.given)
        # Queries and keys are the same tokens.
        if "kv_lens" in self.given and "q_lens" not in self.given:
            self.given["q_lens"] = self.given["kv_lens"]

    def facts(self) -> list[Fact]:
        """Return what must be equal on all ranks."""
        known = {**self.checked, "layout": self.layout, "return_lse": self.return_lse}
        facts = [Fact(name, " is ", value_text(known.get(name))) for name in _COMPARED]
        for name in ("mask", "bias"):
            array = self.given.get(name)
            facts.append(Fact(name, " has dtype ", "not given" if array is None else array.dtype.name))
            facts.append(Fact(name, " has shape ", "not given" if array is None else _shape_but_rows(array.shape)))
        return facts

    def scores(self) -> dict[str, Any]:
        """Return the options that are the same for all rows and keys."""
        return {name: x for name, x in self.given.items() if name not in _BY_ROW}

    def lengths(self, queries: tuple[int, int], keys: tuple[int, int]) -> dict[str, Any]:
        """Return offset and lengths for the queries and the keys in two ranges of positions."""
        found: dict[str, Any] = {"q_offset": queries[0] - keys[0]}
        for name in _LENGTHS:
            if name in self.given:
                first, stop = queries if name == "q_lens" else keys
                found[name] = np.clip(self.given[name] - first, 0, stop - first)
        return found

    def sees(self, queries: tuple[int, int], keys: tuple[int, int]) -> bool:
        """Whether queries in one range of positions may see keys in another one."""
        reach = self._reach
        near = keys[0] < max(queries[1] + reach.right, reach.prefix) and keys[1] > queries[0] - reach.left
        if reach.chunk:
            near = near and len(_common_chunks(reach.chunk, queries, keys)) > 0
        return near and queries[0] < reach.q_end and reach.kv_begin < keys[1] and keys[0] < reach.kv_end

    @cached_property
    def _reach(self) -> _Reach:
        left, right = (_FAR if side is None else int(side) for side in self.given.get("window", (None, None)))
        ends = [int(self.given[name].max(initial=0)) if name in self.given else _FAR for name in ("q_lens", "kv_lens")]
        begin = int(self.given["kv_starts"].min(initial=_FAR)) if "kv_starts" in self.given else 0
        prefix = int(self.given["prefix_lens"].max(initial=0)) if "prefix_lens" in self.given else 0
        chunk = int(self.given.get("chunk", 0))
        return _Reach(left, 0 if self.given.get("causal") else right, ends[0], begin, ends[1], prefix, chunk)

    def parts(
        self, queries: tuple[int, int], keys: tuple[int, int]
    ) -> Sequence[tuple[tuple[int, int], tuple[int, int]]]:
        """Return the queries and keys of each chunk that has both; without chunks, all of them."""
        size = self._reach.chunk
        if not size or keys[0] == keys[1]:
            return [(queries, keys)]

        def within(chunk: int, span: tuple[int, int]) -> tuple[int, int]:
            return max(span[0], chunk * size), min(span[1], (chunk + 1) * size)

        return [(within(chunk, queries), within(chunk, keys)) for chunk in _common_chunks(size, queries, keys)]

    def of_heads(self, heads: slice) -> dict[str, Any]:
        """Return all options for some of the query heads."""
        return of_heads(self.function, self.given, heads)

    def settle(
        self, with_rows: Sequence[Collection[str]], checksums: Sequence[Mapping[str, str]], owners: Owners, rank: int
    ) -> None:
        """Find whether mask and bias differ between rows, given what all ranks see; give each row of this rank its own.

        If no rank has two rows, shapes do not tell: an array that is the same on all ranks is shared by all rows.
        """
        self.with_rows = set().union(*with_rows)
        if all(owners.count(other) <= 1 for other in range(len(with_rows))):
            for name in self._with_axis() - self.with_rows:
                if len({sums[name] for sums in checksums}) > 1:
                    self.with_rows.add(name)
        for name in self.with_rows:
            array = self.given[name]
            self.given[name] = np.broadcast_to(array, (*array.shape[:-2], owners.count(rank), array.shape[-1]))

    def _with_axis(self) -> set[str]:
        """Return which of mask and bias have an axis of rows."""
        return {name for name in ("mask", "bias") if name in self.given and self.given[name].ndim > 1}

    def checksums(self) -> dict[str, str]:
        """Return a checksum of the mask and of the bias, each if this rank's array may be meant for all rows."""
        names = [name for name in ("mask", "bias") if name in self.given and name not in self.with_rows]
        return {name: checksum(self.given[name]) for name in names}

    def shared(self) -> list[str]:
        """Return which of mask and bias are the same for all rows, and so must be the same on all ranks."""
        return [name for name in ("mask", "bias") if name in self.given and not self.has_rows(name)]

    def has_rows(self, name: str) -> bool:
        """Whether the mask or bias differs between rows."""
        return name in self.with_rows

    def piece(self, keys: tuple[int, int], rows: Callable[[str], NDArray[Any]]) -> dict[str, Any]:
        """Return mask and bias for a range of keys. `rows` gives the rows of one that differs between rows."""
        found: dict[str, Any] = {}
        for name in ("mask", "bias"):
            if name in self.given:
                array = rows(name) if self.has_rows(name) else self.given[name]
                found[name] = array[..., slice(*keys)] if array.ndim and array.shape[-1] != 1 else array
        return found

    def check_whole(self, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], length: int) -> None:
        """Check all shapes as `attention` would if one rank had all rows; equal on all ranks."""
        whole = dict(self.checked)
        for name in ("mask", "bias"):
            if self.has_rows(name):
                whole[name] = _of_length(whole[name], length)
        q, k, v = (_of_length(array, length) for array in (q, k, v))
        _core.explain(q, k, v, core_options(self.function, q_offset=0, **whole))


def _common_chunks(size: int, queries: tuple[int, int], keys: tuple[int, int]) -> range:
    """Return the chunks of `size` positions that have some of these queries and some of these keys."""
    return range(max(queries[0], keys[0]) // size, (min(queries[1], keys[1]) - 1) // size + 1)


def of_heads(function: str, given: Mapping[str, Any], heads: slice) -> dict[str, Any]:
    """Return options for some of the query heads."""
    found = dict(given)
    for name in ("alibi_slopes", "sinks", "mask", "bias"):
        if found.get(name) is not None:
            found[name] = heads_of(name, as_array(function, name, found[name]), heads)
    if found.get("t5") is not None:
        table = heads_of("t5", as_array(function, "t5", found["t5"].table), heads)
        found["t5"] = T5Bias(table, found["t5"].bidirectional, found["t5"].max_distance)
    return found


def heads_of(name: str, array: NDArray[Any], heads: slice) -> NDArray[Any]:
    """Return the part of an option for some of the query heads: all of it if all heads share it."""
    axis = -3 if name in ("mask", "bias") else -1
    if array.ndim < -axis or array.shape[axis] == 1:
        return array
    return array[..., heads] if axis == -1 else array[..., heads, :, :]


def widened(array: NDArray[Any], before: int, after: int) -> NDArray[Any]:
    """Return an array of rows with rows of zeros before and after them."""
    if not before and not after:
        return array
    wide = np.zeros((*array.shape[:-2], before + array.shape[-2] + after, array.shape[-1]), array.dtype)
    wide[..., before : before + array.shape[-2], :] = array
    return wide


def _of_length(array: NDArray[Any], length: int) -> NDArray[Any]:
    """Return an array like this one with another number of rows, which takes no memory."""
    return np.broadcast_to(np.zeros((), array.dtype), (*array.shape[:-2], length, array.shape[-1]))


def _shape_but_rows(shape: tuple[int, ...]) -> str:
    return f"({', '.join('rows' if axis == len(shape) - 2 else str(n) for axis, n in enumerate(shape))})"


def value_text(value: Any) -> str:
    """Return a short text that is equal for equal values."""
    if isinstance(value, T5Bias):
        table = np.asarray(value.table)
        return f"T5Bias({value_text(table)}, {value.bidirectional}, {value.max_distance})"
    if isinstance(value, (LayerNorm, RMSNorm)):
        return f"{type(value).__name__}({value_text(value.weight)}, {value_text(value.bias)}, {value.eps})"
    if value is None or isinstance(value, np.generic):
        return "not given" if value is None else repr(value.item())
    if not hasattr(value, "__array__") and not hasattr(value, "__dlpack__"):
        return repr(value)
    array = np.ascontiguousarray(as_array("", "", value))
    if array.size <= 8:
        return f"{array.tolist()}"
    return f"an array {array.shape} of {array.dtype} with checksum {checksum(array)}"


def checksum(array: NDArray[Any]) -> str:
    """Return a short text that is equal for equal arrays of one shape."""
    return f"{zlib.crc32(np.ascontiguousarray(array).tobytes()):08x}"
