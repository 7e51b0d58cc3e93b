"""What one rank has of a layer whose heads are split: its part of the weights, and of the arguments of a call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .. import _core
from .._arguments import as_array, out_array
from .._attention import _DEFAULTS
from .._errors import refusal
from .._keywords import refuse_unknown
from .._layer import SelfAttention
from .._norm import norm_or_none
from .._typing import LayerSettings
from ._agree import Fact
from ._by_heads import split
from ._decode import Held
from ._options import checksum, heads_of, value_text

if TYPE_CHECKING:
    from ._group import Group

NAME = "SplitSelfAttention"
_REFUSED = ("return_lse", "return_weights")
_COMPARED = [
    *(name for name in _DEFAULTS if name not in ("layout", "num_threads", *_REFUSED)),
    "positions",
    "context",
    "residual",
]


class Part:
    """This rank's part of the weights."""

    def __init__(self, group: Group, given: Mapping[str, Any], counts: tuple[int, int], others: dict[str, Any]) -> None:
        heads, kv_heads = counts
        if kv_heads < group.size:
            text = f" is {kv_heads}, but every one of {group.size} ranks needs a KV head"
            raise refusal(ValueError, NAME, "num_kv_heads", text)
        self.kv_heads = split(kv_heads, group.size)[group.rank]
        ratio = heads // kv_heads
        self.heads = slice(self.kv_heads.start * ratio, self.kv_heads.stop * ratio)
        arrays = {name: as_array(NAME, name, x) for name, x in given.items() if x is not None}
        if "w_o" not in arrays:
            raise refusal(ValueError, NAME, "w_o", " is missing: without it there is nothing to sum")
        self._facts = [Fact("num_heads", " is ", str(heads)), Fact("num_kv_heads", " is ", str(kv_heads))]
        for name in given:
            array = arrays.get(name)
            text = "none" if array is None else f"{array.shape} of {array.dtype.name}"
            if array is not None and name[0] == "b":  # matrices need not be read as a whole
                text += f" with checksum {checksum(array)}"
            self._facts.append(Fact(name, " is ", text))
        for name in sorted(LayerSettings.__annotations__.keys() - given.keys() - {"num_kv_heads"}):
            self._facts.append(Fact(name, " is ", value_text(others.get(name))))
        self.post_norm = others.pop("post_norm", None)
        self.layer = SelfAttention(**self._own(arrays, counts), **others)
        self.layer._set({"_first_head": self.heads.start})
        norm_or_none(NAME, "post_norm", self.post_norm, self.layer.d_out, self.layer.dtype)

    def _own(self, arrays: Mapping[str, NDArray[Any]], counts: tuple[int, int]) -> dict[str, Any]:
        own: dict[str, Any] = {
            "num_heads": self.heads.stop - self.heads.start,
            "num_kv_heads": self.kv_heads.stop - self.kv_heads.start,
        }
        for name, array in arrays.items():
            which, count = (self.heads, counts[0]) if name[-1] in "qo" else (self.kv_heads, counts[1])
            if name == "b_o":
                own[name] = array if which.start == 0 else None  # counts once
                continue
            axis = 0 if name == "w_o" else -1
            if not array.ndim or array.shape[axis] % count:
                text = f" has shape {array.shape}, which {count} heads do not divide"
                raise refusal(ValueError, NAME, name, text)
            width = array.shape[axis] // count
            part = slice(which.start * width, which.stop * width)
            own[name] = array[part] if axis == 0 else array[..., part]
        return own

    def facts(self) -> list[Fact]:
        """Return what must be equal on all ranks."""
        return self._facts

    def own(self) -> None:
        """Return what all ranks must know of this one."""


class LayerCall:
    """The arguments of a call on one rank; `wrt` for its gradients."""

    def __init__(self, like: Callable[..., Any], x: Any, options: Mapping[str, Any], wrt: Sequence[str] = ()) -> None:
        for name in _REFUSED:
            if options.get(name):
                raise refusal(ValueError, NAME, name, " cannot be used over ranks")
        self.given = {name: value for name, value in options.items() if name not in _REFUSED}
        refuse_unknown(like, self.given)
        self.x = as_array(NAME, "x", x)
        out = self.given.pop("out", None)
        self.out = None if out is None else out_array(NAME, out)
        cache = self.given.get("cache")
        self.held = None if cache is None else Held(NAME, cache, self.given.get("sequences"))
        self._wrt = wrt

    def check_out(self, d_out: int) -> None:
        """Check the caller's array for the result."""
        shape = (*self.x.shape[:-1], d_out)
        if self.out is not None and (self.out.shape != shape or self.out.dtype != self.x.dtype):
            text = f" has shape {self.out.shape} and dtype {self.out.dtype}, but y has {shape} and {self.x.dtype}"
            raise refusal(ValueError, NAME, "out", text)

    def facts(self) -> list[Fact]:
        """Return what must be equal on all ranks."""
        found = [Fact("x", " has dtype ", self.x.dtype.name), Fact("x", " has shape ", str(self.x.shape))]
        found.append(Fact("x", " has checksum ", checksum(self.x)))
        found.append(Fact("wrt", " is ", repr(tuple(self._wrt))))
        found.append(Fact("cache", " has lengths ", "none" if self.held is None else str(self.held.lengths)))
        found.append(Fact("cache", " has window ", str(getattr(self.given.get("cache"), "window", None))))
        return [*found, *(Fact(name, " is ", value_text(self.given.get(name))) for name in _COMPARED)]

    def own(self) -> None:
        """Return what all ranks must know of this one."""


class Upstream:
    """The gradient of a layer's result on one rank."""

    def __init__(self, grad_y: Any, like: NDArray[Any]) -> None:
        self.array = as_array(NAME, "grad_y", grad_y)
        _core.check_gradient(NAME, "grad_y", self.array, like)

    def facts(self) -> list[Fact]:
        """Return what must be equal on all ranks."""
        return [
            Fact("grad_y", " has dtype ", self.array.dtype.name),
            Fact("grad_y", " has checksum ", checksum(self.array)),
        ]

    def own(self) -> None:
        """Return what all ranks must know of this one."""


def of_all_heads(name: str, part: NDArray[Any], given: Any, heads: slice) -> NDArray[Any]:
    """Return the gradient of an option: `part` for these heads, and 0 for the others."""
    whole = np.zeros(np.shape(given.table if name == "t5" else given) if name != "scale" else (), part.dtype)
    heads_of(name, whole, heads)[...] = part
    return whole
