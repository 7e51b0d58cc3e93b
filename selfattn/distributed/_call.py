"""One call on one rank: its arrays, its rows, its options, and what it knows of the other ranks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _core
from .._arguments import as_array, floats, out_array
from .._errors import refusal, renamed
from ._agree import Fact, compare
from ._options import Options
from ._rows import Owners, Run, runs_of


class Call:
    """The arguments of `Group.attention` or of its gradients on one rank. Arrays have their heads before their rows."""

    owners: Owners
    more: Sequence[Fact] = ()  # what else must be equal on all ranks

    def __init__(
        self, function: str, like: Callable[..., Any], arrays: Mapping[str, Any], rows: Any, options: Mapping[str, Any]
    ) -> None:
        """Check what one rank can check."""
        self.function = function
        found = {name: as_array(function, name, value) for name, value in arrays.items()}
        self.runs = runs_of(function, rows)
        self.options = Options(function, like, options)
        self.rows = sum(run.stop - run.start for run in self.runs)
        for name in ("mask", "bias"):
            if self.options.has_rows(name):
                self._check_rows(name, self.options.given[name])
        self.arrays = {name: self._checked(name, array) for name, array in found.items()}
        self.q, self.k, self.v = (self.arrays[name] for name in "qkv")
        lead = [x.shape[:-3] for x in (self.q, self.k, self.v)]
        heads = self.q.shape[-3:-2]
        self.out_shape = (*_broadcast(function, lead), *heads, self.rows, self.v.shape[-1])
        if self.options.out is not None:
            out = out_array(function, self.options.out)
            like_out = np.broadcast_to(np.empty((), self.q.dtype), self.out_shape)
            _core.check_out(function, out, self.to_layout(like_out), "q")

    def _checked(self, name: str, array: NDArray[Any]) -> NDArray[Any]:
        """Return an array with its heads before its rows."""
        array = floats(self.function, name, array)
        numbers = name in ("lse", "grad_lse")  # one per row
        if array.ndim < 2 - numbers:
            raise refusal(
                ValueError, self.function, name, f" has shape {array.shape}, but at least {2 - numbers} axes are needed"
            )
        array = array[..., None] if numbers else self.to_layout(array)
        self._check_rows(name, array)
        return array

    def _check_rows(self, name: str, array: NDArray[Any]) -> None:
        if array.shape[-2] != self.rows:
            text = f" has {array.shape[-2]} rows but "
            raise refusal(ValueError, self.function, name, text, "rows", f" has {self.rows} positions")

    def to_layout(self, array: NDArray[Any]) -> NDArray[Any]:
        """Exchange the axes of heads and rows if the caller's arrays have them so."""
        return array.swapaxes(-2, -3) if self.options.layout == "bshd" and array.ndim > 2 else array

    def facts(self) -> Sequence[Fact]:
        """Return what must be equal on all ranks."""
        found = []
        for name, array in self.arrays.items():
            found.append(Fact(name, " has dtype ", array.dtype.name))
            shape = [str(n) for n in array.shape]
            shape[-2] = "rows"
            found.append(Fact(name, " has shape ", f"({', '.join(shape)})"))
        return [*self.more, *found, *self.options.facts()]

    def own(self) -> tuple[list[Run], set[str], dict[str, str]]:
        """Return what all ranks must know of this one."""
        return self.runs, self.options.with_rows, self.options.checksums()

    def settle(self, owns: Sequence[tuple[Sequence[Run], Collection[str], Mapping[str, str]]], rank: int) -> None:
        """Check what depends on all ranks. All of them know the same now, and raise the same errors."""
        self.owners = Owners(self.function, [runs for runs, _, _ in owns])
        checksums = [sums for _, _, sums in owns]
        self.options.settle([names for _, names, _ in owns], checksums, self.owners, rank)
        for name in self.options.shared():
            compare(self.function, name, " has checksum ", [sums[name] for sums in checksums])
        try:
            self.options.check_whole(self.q, self.k, self.v, self.owners.length)
        except (TypeError, ValueError) as error:
            raise renamed(error, self.function, {}) from None

    def results(self, out: NDArray[Any], lse: NDArray[Any]) -> Any:
        """Return the results in the form that the caller asked for."""
        out = self.to_layout(out)
        if self.options.out is not None:
            self.options.out[...] = out
            out = self.options.out
        return (out, lse) if self.options.return_lse else out


def _broadcast(function: str, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    try:
        return np.broadcast_shapes(*shapes)
    except ValueError:
        text = f" has leading axes {shapes[0]}, which do not broadcast with those of "
        raise refusal(ValueError, function, "q", text, "k", f" {shapes[1]} and of ", "v", f" {shapes[2]}") from None
