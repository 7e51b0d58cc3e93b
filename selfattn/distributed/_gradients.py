"""Gradients over ranks: keys travel to the gradients of queries, then queries travel to those of keys and values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._backward import Gradients, checked_names, computed_in
from .._errors import refusal
from .._gradients import attention_backward
from ._agree import Fact
from ._by_keys import wants_keys
from ._call import Call
from ._link import Link
from ._rows import Run
from ._travel import Travel, Wants

BLOCK = 512  # rows of a chunk are a multiple of this
_NAMES = ("q", "k", "v")


class GradientCall(Call):
    """The arguments of `Group.attention_backward` on one rank."""

    def __init__(
        self,
        function: str,
        like: Callable[..., Any],
        arrays: Mapping[str, Any],
        rows: Any,
        wrt: Any,
        options: Mapping[str, Any],
    ) -> None:
        super().__init__(function, like, arrays, rows, options)
        self.wrt = checked_names(function, wrt, {}, _NAMES)
        if "scale" in self.wrt:
            raise refusal(
                ValueError, function, "wrt", " names 'scale', but only 'q', 'k' and 'v' are possible over ranks"
            )
        for name in ("grad_out", "out", "lse", "grad_lse"):
            if name in self.arrays:
                shape = self.out_shape if name in ("grad_out", "out") else (*self.out_shape[:-1], 1)
                if self.arrays[name].shape != shape:
                    kept = slice(None) if name in ("grad_out", "out") else slice(-1)
                    text = f" has shape {self.arrays[name].shape[kept]} but {shape[kept]} is needed (heads before rows)"
                    raise refusal(ValueError, function, name, text)
        for name in ("mask", "bias"):
            if self.options.has_rows(name) and self.wrt != ("q",):
                text = " has rows of its own on each rank, which do not travel to the gradients of k and v"
                raise refusal(ValueError, function, name, text)
        self.more = [Fact("wrt", " is ", repr(self.wrt))]

    def inner(self) -> NDArray[Any]:
        """Return ``Σ_d ∂out_d · out_d − ∂lse`` of each row."""
        total: NDArray[Any] = np.einsum(
            "...d,...d->...", self.arrays["grad_out"], self.arrays["out"], dtype=np.float64, casting="unsafe"
        )[..., None]
        return total - self.arrays["grad_lse"].astype(np.float64) if "grad_lse" in self.arrays else total


def differentiate(link: Link, call: GradientCall, num_threads: int) -> Gradients:
    """Return the gradients of this rank's rows."""
    kind = computed_in(call.q.dtype)
    sums = {name: np.zeros(call.arrays[name].shape, kind) for name in call.wrt}
    backward = _Backward(call, call.inner(), kind, num_threads)
    if "q" in sums:
        for chunk in Travel(link, call, (call.k, call.v), BLOCK, wants_keys(call)).chunks():
            with link.moving(chunk.coming):
                backward.add_of_queries(sums["q"], (chunk.start, chunk.stop), chunk.arrays)
    of_keys = {name: x for name, x in sums.items() if name != "q"}
    if of_keys:
        queries = (call.q, call.arrays["grad_out"], call.arrays["lse"], backward.inner)
        for chunk in Travel(link, call, queries, BLOCK, _wants_queries(call)).chunks():
            with link.moving(chunk.coming):
                backward.add_of_keys(of_keys, (chunk.start, chunk.stop), chunk.arrays)
    rounded = {name: call.to_layout(x.astype(call.arrays[name].dtype, copy=False)) for name, x in sums.items()}
    return Gradients(**rounded)


def _wants_queries(call: GradientCall) -> Wants:
    def wants(rank: int, start: int, stop: int) -> bool:
        return any(call.options.sees((start, stop), (run.start, run.stop)) for run in call.owners.runs[rank])

    return wants


class _Backward:
    """What all pieces of a backward pass share. All sums are in the type of computation, and are rounded once."""

    def __init__(self, call: GradientCall, inner: NDArray[Any], kind: np.dtype[Any], num_threads: int) -> None:
        self.call, self.inner, self._kind = call, inner, kind
        self._options = {**call.options.scores(), "num_threads": num_threads, "accumulate": True}

    def add_of_queries(self, total: NDArray[Any], keys: tuple[int, int], arrays: list[NDArray[Any]]) -> None:
        """Add what some keys contribute to the gradients of this rank's queries."""
        call = self.call
        k, v = (x.astype(self._kind, copy=False) for x in arrays)
        for run in call.runs:
            if not call.options.sees((run.start, run.stop), keys):
                continue
            q, grad_out, lse, inner = (
                x[..., run.rows, :] for x in (call.q, call.arrays["grad_out"], call.arrays["lse"], self.inner)
            )
            given = (q.astype(self._kind, copy=False), grad_out.astype(self._kind, copy=False), lse, inner)
            into = {"q": total[..., run.rows, :]}
            self._add(into, run, ((run.start, run.stop), keys), given, (k, v))

    def add_of_keys(
        self, totals: dict[str, NDArray[Any]], queries: tuple[int, int], arrays: list[NDArray[Any]]
    ) -> None:
        """Add what some queries contribute to the gradients of this rank's keys and values."""
        call = self.call
        q, grad_out, lse, inner = arrays
        given = (q.astype(self._kind, copy=False), grad_out.astype(self._kind, copy=False), lse, inner)
        for run in call.runs:
            if not call.options.sees(queries, (run.start, run.stop)):
                continue
            k, v = (x[..., run.rows, :].astype(self._kind, copy=False) for x in (call.k, call.v))
            into = {name: x[..., run.rows, :] for name, x in totals.items()}
            self._add(into, run, (queries, (run.start, run.stop)), given, (k, v))

    def _add(
        self,
        into: dict[str, NDArray[Any]],
        run: Run,
        places: tuple[tuple[int, int], tuple[int, int]],
        given: tuple[NDArray[Any], ...],
        keys: tuple[NDArray[Any], NDArray[Any]],
    ) -> None:
        q, grad_out, lse, inner = given
        options = {**self._options, **self.call.options.lengths(*places)}
        options |= self.call.options.piece(run, 0, 0, places[1])
        # Only D = Σ ∂out · out − ∂lse is needed of out: with out = 0 it is −∂lse.
        nothing = np.broadcast_to(np.zeros((), self._kind), grad_out.shape)
        attention_backward(
            grad_out, q, *keys, nothing, lse[..., 0], grad_lse=-inner[..., 0], wrt=tuple(into), into=into, **options
        )
