"""Gradients over ranks: keys travel to the gradients of queries, then queries travel to those of keys and values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._backward import Gradients, Operands, Upstream, checked_names, computed_in, score_arguments, sum_to
from .._errors import refusal
from ._agree import Fact
from ._by_keys import wants_keys
from ._call import Call
from ._link import Link
from ._rows import Run
from ._travel import Travel, Wants

BLOCK = 512  # rows of a chunk are a multiple of this
_SHARED = ("sinks", "alibi_slopes", "t5", "scale")  # arguments that all rows share


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
        arguments = {**dict.fromkeys("qkv", True), **score_arguments(self.options.given)}
        self.wrt = checked_names(function, wrt, arguments)
        for name in ("grad_out", "out", "lse", "grad_lse"):
            if name in self.arrays:
                shape = self.out_shape if name in ("grad_out", "out") else (*self.out_shape[:-1], 1)
                if self.arrays[name].shape != shape:
                    kept = slice(None) if name in ("grad_out", "out") else slice(-1)
                    text = f" has shape {self.arrays[name].shape[kept]} but {shape[kept]} is needed (heads before rows)"
                    raise refusal(ValueError, function, name, text)
        grad_lse = "given" if "grad_lse" in self.arrays else "not given"
        self.more = [Fact("wrt", " is ", repr(self.wrt)), Fact("grad_lse", " is ", grad_lse)]

    def inner(self) -> NDArray[Any]:
        """Return ``Σ_d ∂out_d · out_d − ∂lse`` of each row."""
        total: NDArray[Any] = np.einsum(
            "...d,...d->...", self.arrays["grad_out"], self.arrays["out"], dtype=np.float64, casting="unsafe"
        )[..., None]
        return total - self.arrays["grad_lse"].astype(np.float64) if "grad_lse" in self.arrays else total


def differentiate(link: Link, call: GradientCall, num_threads: int) -> Gradients:
    """Return the gradients of this rank's rows, and of what all ranks share."""
    backward = _Backward(call, num_threads)
    of_queries = [name for name in call.wrt if name not in ("k", "v", "sinks")]
    if of_queries:
        for chunk in Travel(link, call, (call.k, call.v), BLOCK, wants_keys(call)).chunks():
            keys = (chunk.start, chunk.stop)
            with link.moving(chunk.coming):
                for run in call.runs:
                    if call.options.sees((run.start, run.stop), keys):
                        backward.add_of_queries(of_queries, run, keys, chunk.arrays)
    if "sinks" in call.wrt:  # no key is needed
        for run in call.runs:
            backward.add_of_queries(["sinks"], run, (0, 0), [call.k[..., :0, :], call.v[..., :0, :]])
    of_keys = [name for name in call.wrt if name in ("k", "v")]
    if of_keys:
        for chunk in Travel(link, call, backward.queries, BLOCK, _wants_queries(call)).chunks():
            queries = (chunk.start, chunk.stop)
            with link.moving(chunk.coming):
                for run in call.runs:
                    if call.options.sees(queries, (run.start, run.stop)):
                        backward.add_of_keys(of_keys, run, queries, chunk.arrays)
    sums = backward.sums
    _sum_over_ranks(link, call, [sums[name] for name in call.wrt if _is_shared(call, name)])
    return Gradients(**{name: backward.rounded(name) for name in call.wrt})


def _is_shared(call: Call, name: str) -> bool:
    return name in _SHARED or (name == "bias" and not call.options.has_rows("bias"))


def _sum_over_ranks(link: Link, call: Call, arrays: Sequence[NDArray[np.float64]]) -> None:
    """Replace each array by the sum of those of all ranks, in the order of the ranks."""
    if not arrays:
        return
    mine = np.concatenate([array.ravel() for array in arrays])
    ends = np.cumsum([array.size for array in arrays])
    for rank, numbers in enumerate(link.gather(call.function, mine.view(np.uint8)).view(np.float64)):
        for array, part in zip(arrays, np.split(numbers, ends[:-1]), strict=True):
            array[...] = part.reshape(array.shape) + (array if rank else 0)


def _wants_queries(call: Call) -> Wants:
    def wants(rank: int, start: int, stop: int) -> bool:
        return any(call.options.sees((start, stop), (run.start, run.stop)) for run in call.owners.runs[rank])

    return wants


class _Backward:
    """What all pieces of a backward pass share. All sums are in the type of computation or wider, and rounded once."""

    def __init__(self, call: GradientCall, num_threads: int) -> None:
        self.call = call
        self._kind = computed_in(call.q.dtype)
        self._options = {**call.options.scores(), "num_threads": num_threads}
        self._options.pop("chunk", None)  # each piece lies in one chunk
        self._with_rows = [name for name in ("mask", "bias") if call.options.has_rows(name)]
        rows = [call.options.given[name] for name in self._with_rows]
        self.queries = (call.q, call.arrays["grad_out"], call.arrays["lse"], call.inner(), *rows)
        self.sums = {name: self._zeros(name) for name in call.wrt}

    def _zeros(self, name: str) -> NDArray[Any]:
        if name in ("q", "k", "v"):
            return np.zeros(self.call.arrays[name].shape, self._kind)
        given: Any = self.call.options.given.get(name)
        return np.zeros(() if name == "scale" else np.shape(given.table if name == "t5" else given), np.float64)

    def rounded(self, name: str) -> NDArray[Any]:
        """Return the sum of all pieces in the dtype of the result."""
        found = self.sums[name]
        if name in ("q", "k", "v"):
            return self.call.to_layout(found.astype(self.call.arrays[name].dtype, copy=False))
        if name != "bias":
            return found.astype(self._kind)
        bias = self.call.options.checked["bias"]  # may have one row for all rows of this rank
        return sum_to(found, bias.shape).astype(bias.dtype)

    def add_of_queries(
        self, names: Sequence[str], run: Run, keys: tuple[int, int], arrays: Sequence[NDArray[Any]]
    ) -> None:
        """Add what a run of this rank's queries and some keys contribute to gradients of anything but k and v."""
        for rows, columns in self.call.options.parts((run.start, run.stop), keys):
            part = run.part(*rows)
            queries = [x[..., part.rows, :] for x in self.queries]
            own = [x[..., columns[0] - keys[0] : columns[1] - keys[0], :] for x in arrays]
            for name, array in self._piece(names, (rows, columns), queries, own).items():
                total = self.sums[name]
                if name == "bias" and total.ndim and total.shape[-1] != 1:
                    total = total[..., slice(*columns)]
                if name == "q" or (name == "bias" and name in self._with_rows):
                    total = total[..., part.rows, :]
                total[...] += array

    def add_of_keys(
        self, names: Sequence[str], run: Run, queries: tuple[int, int], arrays: Sequence[NDArray[Any]]
    ) -> None:
        """Add what some queries contribute to the gradients of a run of this rank's keys and values."""
        for rows, columns in self.call.options.parts(queries, (run.start, run.stop)):
            part = run.part(*columns)
            keys = [x[..., part.rows, :] for x in (self.call.k, self.call.v)]
            own = [x[..., rows[0] - queries[0] : rows[1] - queries[0], :] for x in arrays]
            for name, array in self._piece(names, (rows, columns), own, keys).items():
                self.sums[name][..., part.rows, :] += array

    def _piece(
        self,
        names: Sequence[str],
        places: tuple[tuple[int, int], tuple[int, int]],
        queries: Sequence[NDArray[Any]],
        keys: Sequence[NDArray[Any]],
    ) -> dict[str, NDArray[Any]]:
        """Return the gradients of some queries and keys, whose positions are `places`."""
        q, grad_out, k, v = (x.astype(self._kind, copy=False) for x in (*queries[:2], *keys))
        lse, inner = (x[..., 0] for x in queries[2:4])
        terms = self.call.options.piece(places[1], dict(zip(self._with_rows, queries[4:], strict=True)).__getitem__)
        if "bias" in terms and terms["bias"].dtype.itemsize == 2:
            terms["bias"] = terms["bias"].astype(np.float32)
        options = {**self._options, **self.call.options.lengths(*places), **terms}
        operands = Operands(self.call.function, (q, k, v), options, tuple(names))
        operands.options.first_query, operands.options.first_key = places[0][0], places[1][0]
        # Only D = Σ ∂out · out − ∂lse is needed of out: with out = 0 it is −∂lse.
        nothing = np.broadcast_to(np.zeros((), self._kind), grad_out.shape)
        found = operands.backward(Upstream(grad_out, -inner, None), nothing, lse)
        like: dict[str, Any] = {"q": q, "k": k, "v": v, "bias": terms.get("bias")}
        return {
            name: operands._of_numbers(name, x) if name in _SHARED else sum_to(x, np.shape(like[name]))
            for name, x in found.items()
        }
