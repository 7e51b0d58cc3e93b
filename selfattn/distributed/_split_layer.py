"""A layer whose heads are split over ranks (tensor parallelism: Shoeybi et al., "Megatron-LM", 2019)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .._errors import refusal
from .._keywords import clean_signature, hinted
from .._layer import SelfAttention
from .._layer_gradients import differentiable, self_attention_vjp
from .._products import rounded, rows_of
from .._typing import Array, LayerCallOptions, LayerScoreOptions, LayerSettings
from .._weights import head_counts
from ._agree import agree, together
from ._options import of_heads
from ._split_part import NAME, LayerCall, Part, Upstream, of_all_heads

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._group import Group

_VJP = f"{NAME}.vjp"
_TERMS = ("bias", "sinks", "alibi_slopes", "t5", "scale")
_OF_LAYER = (
    "b_q", "b_k", "b_v", "b_o", "num_heads", "num_kv_heads", "rope", "q_norm", "k_norm", "return_lse", "return_weights",
)  # fmt: skip
_LayerVjp = Callable[[ArrayLike], dict[str, Array]]


@hinted
class SplitSelfAttention:
    """`SelfAttention` whose heads are split over the ranks of a group; the outputs of all ranks are summed.

    Every rank gives the whole weights, for example read from a `numpy.memmap`, and keeps those of its own heads. The
    ranks compare all other arrays, but of the matrices only shapes and dtypes. Creating a layer and calling it are
    collective.

    Parameters
    ----------
    group : Group
        Has at most as many ranks as there are KV heads.
    w_q, w_k, w_v, w_o : array_like
        As for `SelfAttention`.
    num_heads : int
    **settings
        `b_q`, `b_k`, `b_v`, `b_o`, `num_kv_heads`, `rope`, `norm` and `post_norm`, as for `SelfAttention`.

    Attributes
    ----------
    heads, kv_heads : slice
        The query heads and the KV heads of this rank. A cache for this layer holds these KV heads only.

    Raises
    ------
    TypeError, ValueError, TimeoutError
        As `SelfAttention`, more ranks than KV heads, or ranks that differ; on every rank.

    Notes
    -----
    The outputs of the ranks are summed in the order of the ranks, in the type of computation, so that all ranks get the
    same bits. These depend on the number of ranks. The split is due to Shoeybi et al., "Megatron-LM" (2019).

    Examples
    --------
    >>> import numpy as np
    >>> from mpi4py import MPI
    >>> from selfattn.distributed import Group, SplitSelfAttention
    >>> w_q, w_k, w_v, w_o = np.random.default_rng(0).standard_normal((4, 64, 64)) / 8
    >>> layer = SplitSelfAttention(Group(MPI.COMM_WORLD), w_q, w_k, w_v, w_o, num_heads=8)
    >>> layer(np.ones((10, 64)), causal=True).shape
    (10, 64)
    """

    @clean_signature(SelfAttention.__init__)
    def __init__(
        self,
        group: Group,
        w_q: ArrayLike,
        w_k: ArrayLike,
        w_v: ArrayLike,
        w_o: ArrayLike,
        *,
        num_heads: int,
        **settings: Unpack[LayerSettings],
    ) -> None:
        others: dict[str, Any] = dict(settings)
        kv_heads = others.pop("num_kv_heads", None)
        weights: dict[str, Any] = {"w_q": w_q, "w_k": w_k, "w_v": w_v, "w_o": w_o}
        weights |= {name: others.pop(name, None) for name in ("b_q", "b_k", "b_v", "b_o")}
        self._group = group
        part, _ = agree(
            group._link, NAME, lambda: Part(group, weights, head_counts(NAME, num_heads, kv_heads), dict(others))
        )
        self._layer, self._post_norm = part.layer, part.post_norm
        self._norms = [name for name, x in others.items() if name != "rope" and x is not None]
        self.heads, self.kv_heads = part.heads, part.kv_heads

    @clean_signature(SelfAttention.__call__, without=("return_lse", "return_weights"))
    def __call__(self, x: ArrayLike, **options: Unpack[LayerCallOptions]) -> NDArray[Any]:
        """Apply the layer to x, which is the same on all ranks.

        Parameters
        ----------
        x : array_like, shape (..., S, d_model)
        **options
            Options of `SelfAttention` for all heads, except `return_lse` and `return_weights`. `cache` and `sequences`
            are this rank's.

        Returns
        -------
        y : ndarray, shape (..., S, d_out)
            The same on all ranks.
        """
        link = self._group._link

        def prepare() -> LayerCall:
            found = LayerCall(SplitSelfAttention.__call__, x, options)
            found.check_out(self._layer.d_out)
            return found

        call, _ = agree(link, NAME, prepare)
        given = of_heads(NAME, call.given, self.heads)
        if self._group.rank > 0:
            given.pop("residual", None)  # counts once
        given.setdefault("num_threads", self._group.num_threads)
        try:
            part = together(link, NAME, lambda: self._layer(call.x, **given))
            with link.flight(NAME):
                y = self._sum(part)
        except BaseException:
            if call.held is not None:
                call.held.restore()
            raise
        if self._post_norm is not None:
            y = self._post_norm(y)
        if call.out is None:
            return y
        call.out[...] = y
        return call.out

    @clean_signature(self_attention_vjp, without=_OF_LAYER)
    def vjp(
        self,
        x: ArrayLike,
        *,
        wrt: Sequence[str] = ("x", "w_q", "w_k", "w_v", "w_o"),
        context: ArrayLike | None = None,
        positions: ArrayLike | None = None,
        **options: Unpack[LayerScoreOptions],
    ) -> tuple[NDArray[Any], _LayerVjp]:
        """Apply the layer to x, and return a function that computes the gradients.

        Parameters
        ----------
        x, context, positions, **options
            As for `self_attention_vjp`, for all heads; the same on all ranks.
        wrt : sequence of str
            As for `self_attention_vjp`.

        Returns
        -------
        y : ndarray, shape (..., S, d_out)
            The same on all ranks.
        vjp : callable
            ``vjp(grad_y)`` is collective and returns a dict of the gradients by name. Those of the matrices, and of
            `b_q`, `b_k` and `b_v`, are those of this rank's heads: of the columns (for `w_o`, the rows) that this rank
            keeps. All others are the same on all ranks.

        Raises
        ------
        TypeError, ValueError, TimeoutError
            On every rank. Also if the layer has a norm: its gradient is not computed, so apply it outside the layer.
        """
        link = self._group._link
        given: dict[str, Any] = {"context": context, "positions": positions, **options}

        def prepare() -> LayerCall:
            for name in self._norms:
                raise refusal(ValueError, _VJP, name, " is part of the layer: apply it outside")
            return LayerCall(SplitSelfAttention.vjp, x, given, wrt)

        call, _ = agree(link, _VJP, prepare)
        own = of_heads(_VJP, {"rope": self._layer._rope, **call.given}, self.heads)
        own.setdefault("num_threads", self._group.num_threads)
        counts = (self._layer.num_heads, self._layer.num_kv_heads)
        names = [name for name in wrt if name != "b_o"]  # which only one rank has

        def forward() -> Any:
            return differentiable(call.x, self._layer._unpacked(), counts, names, own, self.heads.start)

        part, of_part = together(link, _VJP, forward)
        with link.flight(_VJP):
            y = self._sum(part)

        def vjp(grad_y: ArrayLike) -> dict[str, Array]:
            """Return the gradients, given that of y."""
            upstream, _ = agree(link, _VJP, lambda: Upstream(grad_y, y))
            found = together(link, _VJP, lambda: of_part(upstream.array))
            if "b_o" in wrt:
                total = rows_of(upstream.array, np.dtype(np.float64)).sum(axis=0)
                found["b_o"] = rounded(total, call.x.dtype)
            for name in [name for name in wrt if name in ("x", "context", *_TERMS)]:
                if name in _TERMS:
                    found[name] = of_all_heads(name, found[name], call.given.get(name), self.heads)
                with link.flight(_VJP):
                    found[name] = self._sum(found[name])
            return {name: found[name] for name in wrt}

        return y, vjp

    def _sum(self, part: NDArray[Any]) -> NDArray[Any]:
        """Return the sum over all ranks. Each rank sums one part of the numbers, and all get all parts."""
        group, link = self._group, self._group._link
        flat = np.ascontiguousarray(part).ravel()
        share = -(-flat.size // group.size)
        padded = np.zeros(share * group.size, flat.dtype)
        padded[: flat.size] = flat
        outgoing = [x.view(np.uint8) for x in np.split(padded, group.size)]
        incoming = [np.empty(x.size, np.uint8) for x in outgoing]
        link.swap(NAME, outgoing, incoming)
        kind = np.float64 if flat.dtype == np.float64 else np.float32
        total = np.zeros(share, kind)
        for buffer in incoming:
            total += buffer.view(flat.dtype)
        rows = link.gather(NAME, total.astype(flat.dtype).view(np.uint8))
        return rows.reshape(-1).view(flat.dtype)[: flat.size].reshape(part.shape)
