"""Code shared by the functions that compute gradients: checks, the operands of a call, and the return of results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _core
from ._arguments import as_array, core_options, flag, floats
from ._errors import refusal
from ._foreign import converted, is_masked
from ._typing import Array


class Gradients(NamedTuple):
    """The gradients that ``wrt`` names; the others are None.

    Attributes
    ----------
    q, k, v, bias : ndarray or None
        In the shape and the dtype of the argument.
    sinks, alibi_slopes, t5, scale, r, u, w : ndarray or None
        In the shape of the argument and in the type of computation; t5 is the gradient of its table.

    Examples
    --------
    >>> import numpy as np
    >>> import selfattn as sa
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 4, 8))
    >>> out, vjp = sa.attention_vjp(q, k, v, wrt=("q", "v"))
    >>> grads = vjp(np.ones_like(out))
    >>> grads.q.shape, grads.k is None
    ((4, 8), True)
    """

    q: Array | None = None
    k: Array | None = None
    v: Array | None = None
    bias: Array | None = None
    sinks: Array | None = None
    alibi_slopes: Array | None = None
    t5: Array | None = None
    scale: Array | None = None
    r: Array | None = None
    u: Array | None = None
    w: Array | None = None


Vjp = Callable[..., Gradients]
_Operands = TypeVar("_Operands", bound="Operands")
_OPTIONAL = ("bias", "sinks", "alibi_slopes", "t5")


class Upstream(NamedTuple):
    """The gradients of the results."""

    out: ArrayLike
    lse: ArrayLike | None
    weights: ArrayLike | None


class Operands:
    """The arguments of a forward pass, converted."""

    always: tuple[str, ...] = ("q", "k", "v")  # names of arguments that every call has

    def __init__(
        self, function: str, arrays: Sequence[ArrayLike], options: Mapping[str, Any], wrt: tuple[str, ...]
    ) -> None:
        self.function = function
        self.given = options
        self.convert(arrays, options)
        self.wrt = wrt

    @classmethod
    def check(
        cls: type[_Operands],
        function: str,
        arrays: Sequence[ArrayLike],
        options: Mapping[str, Any],
        wrt: Sequence[str],
    ) -> _Operands:
        """Return the converted arguments for a caller's `wrt`."""
        operands = cls(function, arrays, options, ())
        operands.wrt = checked_names(function, wrt, {**dict.fromkeys(cls.always, True), **score_arguments(options)})
        return operands

    def convert(self, arrays: Sequence[ArrayLike], options: Mapping[str, Any]) -> None:
        """Set the attributes that hold converted arguments."""
        self.q, self.k, self.v = (as_array(self.function, name, x) for name, x in zip("qkv", arrays, strict=True))
        self.options = core_options(self.function, **options)

    def forward(self, options: _core.Options) -> Any:
        """Compute the forward pass."""
        return _core.attention_for(self.function, self.q, self.k, self.v, options)

    def differentiate(self, given: _core.GradientInputs) -> dict[str, NDArray[Any]]:
        """Compute the backward pass."""
        return _core.attention_backward(self.function, (self.q, self.k, self.v), given, self.wrt, self.options)

    def deliver(
        self,
        upstream: Upstream,
        out: ArrayLike,
        lse: ArrayLike,
        into: Gradients | Mapping[str, Array] | None,
        accumulate: bool,
    ) -> Gradients:
        """Return the gradients, or write them to the caller's arrays."""
        targets = targets_of(self.function, into, accumulate, self.wrt)
        self.options.exact = bool(accumulate)  # gradients are rounded after they are added
        out_array = as_array(self.function, "out", out)
        lse_array = as_array(self.function, "lse", lse)
        totals = self.in_shape(self.backward(upstream, out_array, lse_array))
        return Gradients(**delivered(self.function, totals, self.dtype_of, targets, accumulate))

    def vjp(self) -> tuple[Any, Vjp]:
        """Compute the forward pass and return the function that computes its gradients."""
        options = self.options.copy()
        options.return_lse = options.exact = True
        exact_out, exact_lse, *weights = self.forward(options)
        out = exact_out.astype(self.q.dtype, copy=True)

        def vjp(
            grad_out: ArrayLike, grad_lse: ArrayLike | None = None, grad_weights: ArrayLike | None = None
        ) -> Gradients:
            """Return the gradients, given the gradients of out, lse and weights."""
            upstream = Upstream(grad_out, grad_lse, grad_weights)
            return Gradients(**self.rounded(self.backward(upstream, exact_out, exact_lse)))

        lse = [exact_lse.astype(exact_out.dtype)] if self.options.return_lse else []
        return (out, *lse, *weights) if lse or weights else out, vjp

    def backward(self, upstream: Upstream, out: NDArray[Any], lse: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """Return what the core computes: arrays with all axes of heads and batch."""
        grad_out = as_array(self.function, "grad_out", upstream.out)
        grad_lse = None if upstream.lse is None else floats(self.function, "grad_lse", upstream.lse)
        grad_weights = None
        if upstream.weights is not None:
            grad_weights = floats(self.function, "grad_weights", upstream.weights)
            grad_weights = np.ascontiguousarray(grad_weights, dtype=computed_in(self.q.dtype))
            through = self._through_weights(grad_weights)
            if grad_lse is not None:
                _core.check_shape(self.function, "grad_lse", grad_lse, through)
            grad_lse = -through if grad_lse is None else grad_lse - through
        return self.differentiate(
            _core.GradientInputs(grad_out=grad_out, out=out, lse=lse, grad_lse=grad_lse, grad_weights=grad_weights)
        )

    def _through_weights(self, grad_weights: NDArray[Any]) -> NDArray[Any]:
        """Return each row's sum of weights times their gradients, which is subtracted from the gradients of scores."""
        options = self.options.copy()
        options.return_lse, options.return_weights = False, True
        _, weights = self.forward(options)
        _core.check_shape(self.function, "grad_weights", grad_weights, weights)
        counted = np.where(weights == 0, 0, grad_weights)  # gradients of hidden keys' weights may be anything
        total: NDArray[Any] = np.einsum("...j,...j->...", weights, counted, dtype=np.float64, casting="safe")
        return total

    def rounded(self, found: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Return the gradients in the shapes and dtypes of the arguments, given the core's results."""
        return delivered(self.function, self.in_shape(found), self.dtype_of, {}, False)

    def in_shape(self, found: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Sum the core's results over the axes along which arguments were broadcast; the sums are not rounded."""
        totals: dict[str, NDArray[Any]] = {}
        for name, array in found.items():
            if name in ("q", "k", "v", "bias"):
                totals[name] = sum_to(array, self._argument(name).shape)
            else:
                totals[name] = self._of_numbers(name, array)
        return totals

    def dtype_of(self, name: str) -> np.dtype[Any]:
        """Return the dtype of a gradient."""
        if name in ("q", "k", "v", "bias"):
            return self._argument(name).dtype
        return computed_in(self.q.dtype)

    def _argument(self, name: str) -> NDArray[Any]:
        return self.options.bias if name == "bias" else getattr(self, name)  # type: ignore[return-value]

    def _of_numbers(self, name: str, array: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sum what the core returns for each row of queries (sinks, slopes, scale) or each distance (T5's table)."""
        if name == "scale":
            return np.asarray(array.sum())
        if name == "t5":
            return self.given["t5"].gradient(sum_to(np.atleast_2d(array), (self._heads(), array.shape[-1])))  # type: ignore[no-any-return]
        per_head = np.atleast_1d(array.sum(axis=-1))
        given = getattr(self.options, name)
        return sum_to(per_head, given.shape)

    def _heads(self) -> int:
        axis = -2 if self.options.layout == _core.LAYOUTS["bshd"] else -3
        return self.q.shape[axis] if self.q.ndim > 2 else 1


def sum_to(array: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """Sum over the axes along which an array of this shape was broadcast."""
    extra = array.ndim - len(shape)
    axes = tuple(range(extra)) + tuple(
        axis + extra for axis, n in enumerate(shape) if n == 1 and array.shape[axis + extra] != 1
    )
    return (array.sum(axis=axes) if axes else array).reshape(shape)


def computed_in(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype in which the core computes for operands of this dtype."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def score_arguments(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that may have a gradient, by name; None for those that are not given. Scale has a default."""
    return {**{name: options.get(name) for name in _OPTIONAL}, "scale": True}


def checked_names(function: str, wrt: Sequence[str], arguments: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the checked names of arguments whose gradients are wanted; an argument that is not given is None."""
    if isinstance(wrt, (str, memoryview)) or not isinstance(wrt, Sequence):
        raise refusal(TypeError, function, "wrt", f" is {wrt!r}, but a sequence of names is needed")
    for name in wrt:
        if not isinstance(name, str) or name not in arguments:
            known = ", ".join(map(repr, arguments))
            raise refusal(ValueError, function, "wrt", f" names {name!r}, but it must be one of {known}")
        if arguments[name] is None:
            raise refusal(ValueError, function, "wrt", f" names {name!r}, but there is no ", name, "")
    return tuple(wrt)


def targets_of(
    function: str, into: Gradients | Mapping[str, Array] | None, accumulate: bool, wrt: tuple[str, ...]
) -> dict[str, Array]:
    """Return the arrays of `into` by name."""
    add = flag(function, "accumulate", accumulate)
    if into is None:
        if add:
            raise refusal(ValueError, function, "accumulate", " is True, but there is no ", "into", " to add to")
        return {}
    if isinstance(into, Gradients):
        into = into._asdict()
    if not isinstance(into, Mapping):
        raise refusal(
            TypeError, function, "into", f" is of type {type(into).__name__}, but Gradients or a mapping is needed"
        )
    targets = {name: array for name, array in into.items() if array is not None}
    for name, array in targets.items():
        if name not in wrt:
            raise refusal(ValueError, function, "into", f" has {name!r}, which ", "wrt", " does not name")
        if not isinstance(array, np.ndarray) or is_masked(array):
            raise refusal(
                TypeError, function, "into", f"[{name!r}] is of type {type(array).__name__}, but an ndarray is needed"
            )
        if not array.flags.writeable:
            raise refusal(ValueError, function, "into", f"[{name!r}] is read-only")
        _core.check_own_memory(function, "into", f"[{name!r}]", array)
    for first, second in combinations(targets, 2):
        if np.shares_memory(targets[first], targets[second]):
            raise refusal(ValueError, function, "into", f"[{first!r}] and [{second!r}] share memory")
    return targets


def delivered(
    function: str,
    totals: Mapping[str, NDArray[Any]],
    dtype_of: Callable[[str], np.dtype[Any]],
    targets: Mapping[str, Array],
    accumulate: bool,
) -> dict[str, NDArray[Any]]:
    """Return gradients in their dtypes, in the caller's arrays where there are any. `totals` may be overwritten."""
    for name, target in targets.items():
        shape, dtype = totals[name].shape, dtype_of(name)
        if target.shape != shape or target.dtype != dtype:
            raise refusal(
                ValueError,
                function,
                "into",
                f"[{name!r}] has shape {target.shape} and dtype {target.dtype}, but the gradient has {shape} "
                f"and {dtype}",
            )
    gradients: dict[str, NDArray[Any]] = {}
    with np.errstate(all="ignore"):  # as in the core, where a sum that is too large becomes inf
        for name, total in totals.items():
            if accumulate and name in targets:
                # The caller's array may be wider than the computation, as that of a float64 bias of float32 queries.
                wider = np.promote_types(total.dtype, computed_in(targets[name].dtype))
                gradients[name] = converted(converted(total, wider) + converted(targets[name], wider), dtype_of(name))
            else:
                gradients[name] = converted(total, dtype_of(name))
    for name, own in targets.items():  # after all sums, so that an error leaves the caller's arrays as they were
        own[...] = gradients[name]
    return {**gradients, **targets}
