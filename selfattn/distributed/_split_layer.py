"""A layer whose heads are split over ranks (tensor parallelism: Shoeybi et al., "Megatron-LM", 2019)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .._arguments import as_array
from .._attention import _DEFAULTS
from .._errors import refusal
from .._keywords import clean_signature, hinted, refuse_unknown
from .._layer import SelfAttention
from .._weights import head_counts
from ._agree import Fact, agree, failure, raise_failures
from ._by_heads import split
from ._decode import Held
from ._options import of_heads, value_text

if TYPE_CHECKING:
    from ._group import Group

_NAME = "SplitSelfAttention"
_REFUSED = ("return_lse", "return_weights", "dropout", "seed", "out")
_COMPARED = [
    *(name for name in _DEFAULTS if name not in ("mask", "bias", "layout", "num_threads", *_REFUSED)), "positions",
]  # fmt: skip


@hinted
class SplitSelfAttention:
    """`SelfAttention` whose heads are split over the ranks of a group; the outputs of all ranks are summed.

    Every rank gives the whole weights, for example read from a `numpy.memmap`, and keeps those of its own heads.
    Creating a layer and calling it are collective.

    Parameters
    ----------
    group : Group
        Has at most as many ranks as there are KV heads.
    w_q, w_k, w_v, w_o : array_like
        As for `SelfAttention`.
    b_q, b_k, b_v, b_o : array_like, optional
    num_heads, num_kv_heads : int
    rope : RoPE or True, optional
    norm : LayerNorm or RMSNorm, optional
        The norm of x, before the projections.

    Attributes
    ----------
    heads, kv_heads : slice
        The query heads and the KV heads of this rank. A cache for this layer holds these KV heads only.

    Notes
    -----
    The outputs of the ranks are summed in the order of the ranks, in the type of computation, so that all ranks get the
    same bits. These depend on the number of ranks.
    """

    def __init__(
        self,
        group: Group,
        w_q: ArrayLike,
        w_k: ArrayLike,
        w_v: ArrayLike,
        w_o: ArrayLike,
        *,
        b_q: ArrayLike | None = None,
        b_k: ArrayLike | None = None,
        b_v: ArrayLike | None = None,
        b_o: ArrayLike | None = None,
        num_heads: int,
        num_kv_heads: int | None = None,
        rope: Any = None,
        norm: Any = None,
    ) -> None:
        matrices = {"w_q": w_q, "w_k": w_k, "w_v": w_v, "w_o": w_o}
        biases = {"b_q": b_q, "b_k": b_k, "b_v": b_v, "b_o": b_o}
        self._group = group

        def prepare() -> _Part:
            counts = head_counts(_NAME, num_heads, num_kv_heads)
            return _Part(group, {**matrices, **biases}, counts, {"rope": rope, "norm": norm})

        part, _ = agree(group._link, _NAME, prepare)
        self._layer, self.heads, self.kv_heads = part.layer, part.heads, part.kv_heads

    @clean_signature(SelfAttention.__call__, without=_REFUSED)
    def __call__(self, x: ArrayLike, **options: Any) -> NDArray[Any]:
        """Apply the layer to x, which is the same on all ranks.

        Parameters
        ----------
        x : array_like, shape (..., S, d_model)
        **options
            Options of `SelfAttention` for all heads, except `return_lse`, `return_weights`, `dropout`, `seed` and
            `out`. `cache` and `sequences` are this rank's.

        Returns
        -------
        y : ndarray, shape (..., S, d_out)
            The same on all ranks.
        """
        link = self._group._link
        call, _ = agree(link, _NAME, lambda: _LayerCall(x, options))
        error: Exception | None = None
        part = np.empty((*call.x.shape[:-1], self._layer.d_out), call.x.dtype)
        given = of_heads(_NAME, call.given, self.heads)
        if self._group.rank > 0:
            given.pop("residual", None)  # counts once
        given.setdefault("num_threads", self._group.num_threads)
        try:
            with link.flight(_NAME):
                try:
                    part = self._layer(call.x, **given)
                except Exception as raised:
                    error = raised
                found = link.exchange(_NAME, error and failure(error, _NAME))
            raise_failures(found, error)
            with link.flight(_NAME):
                return self._sum(part)
        except BaseException:
            if call.held is not None:
                call.held.restore()
            raise

    def _sum(self, part: NDArray[Any]) -> NDArray[Any]:
        """Return the sum over all ranks. Each rank sums one part of the numbers, and all get all parts."""
        group, link = self._group, self._group._link
        flat = np.ascontiguousarray(part).ravel()
        share = -(-flat.size // group.size)
        padded = np.zeros(share * group.size, flat.dtype)
        padded[: flat.size] = flat
        outgoing = [x.view(np.uint8) for x in np.split(padded, group.size)]
        incoming = [np.empty(x.size, np.uint8) for x in outgoing]
        link.swap(_NAME, outgoing, incoming)
        kind = np.float64 if flat.dtype == np.float64 else np.float32
        total = np.zeros(share, kind)
        for buffer in incoming:
            total += buffer.view(flat.dtype)
        rows = link.gather(_NAME, total.astype(flat.dtype).view(np.uint8))
        return rows.reshape(-1).view(flat.dtype)[: flat.size].reshape(part.shape)


class _Part:
    """This rank's part of the weights."""

    def __init__(self, group: Group, given: Mapping[str, Any], counts: tuple[int, int], others: dict[str, Any]) -> None:
        heads, kv_heads = counts
        if kv_heads < group.size:
            text = f" is {kv_heads}, but every one of {group.size} ranks needs a KV head"
            raise refusal(ValueError, _NAME, "num_kv_heads", text)
        self.kv_heads = split(kv_heads, group.size)[group.rank]
        ratio = heads // kv_heads
        self.heads = slice(self.kv_heads.start * ratio, self.kv_heads.stop * ratio)
        arrays = {name: as_array(_NAME, name, x) for name, x in given.items() if x is not None}
        if "w_o" not in arrays:
            raise refusal(ValueError, _NAME, "w_o", " is missing: without it there is nothing to sum")
        self._facts = [Fact("num_heads", " is ", str(heads)), Fact("num_kv_heads", " is ", str(kv_heads))]
        for name in given:
            array = arrays.get(name)
            text = "none" if array is None else f"{array.shape} of {array.dtype.name}"
            self._facts.append(Fact(name, " is ", text))
        self.layer = SelfAttention(**self._own(arrays, counts), **others)

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
                raise refusal(ValueError, _NAME, name, text)
            width = array.shape[axis] // count
            part = slice(which.start * width, which.stop * width)
            own[name] = array[part] if axis == 0 else array[..., part]
        return own

    def facts(self) -> list[Fact]:
        """Return what must be equal on all ranks."""
        return self._facts

    def own(self) -> None:
        """Return what all ranks must know of this one."""


class _LayerCall:
    """The arguments of a call on one rank."""

    def __init__(self, x: Any, options: Mapping[str, Any]) -> None:
        for name in _REFUSED:
            if options.get(name):
                raise refusal(ValueError, _NAME, name, " cannot be used over ranks")
        self.given = {name: value for name, value in options.items() if name not in _REFUSED}
        refuse_unknown(SplitSelfAttention.__call__, self.given)
        self.x = as_array(_NAME, "x", x)
        cache = self.given.get("cache")
        self.held = None if cache is None else Held(_NAME, cache, self.given.get("sequences"))

    def facts(self) -> list[Fact]:
        """Return what must be equal on all ranks."""
        found = [Fact("x", " has dtype ", self.x.dtype.name), Fact("x", " has shape ", str(self.x.shape))]
        return [*found, *(Fact(name, " is ", value_text(self.given.get(name))) for name in _COMPARED)]

    def own(self) -> None:
        """Return what all ranks must know of this one."""
