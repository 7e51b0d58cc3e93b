"""A group of ranks that compute attention together."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from mpi4py import MPI
from numpy.typing import ArrayLike, NDArray

from .._arguments import choice, real, thread_count
from .._attention import ONLY_HERE, attention
from .._backward import Gradients
from .._cached import attention_with_kvcache
from .._errors import refusal
from .._gradients import attention_backward
from .._keywords import clean_signature
from .._threads import get_num_threads
from ._agree import Fact, agree
from ._by_heads import attend_by_heads, check_by_heads
from ._by_keys import attend_by_keys
from ._call import Call
from ._decode import CacheCall, attend_cache
from ._gradients import GradientCall, differentiate
from ._link import Link
from ._messages import MessageComm
from ._rows import rows_of

_BY = ("keys", "heads")

_NOT_OVER_RANKS = (
    "return_weights", "dropout", "seed", "kv_starts", "prefix_lens", "chunk", "cascade", "out", "q_norm", "k_norm",
)  # fmt: skip


class Group:
    """The ranks of a communicator, which compute attention over sequences that are spread over them.

    All methods except `rows` are collective: every rank of the communicator must call them, in the same order. Ranks
    compare shapes, dtypes and options before they compute; if those do not fit, every rank raises the same error, which
    names the rank that differs.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm or MessageComm
        The communicator, for example ``MPI.COMM_WORLD``. It is duplicated: messages of the caller cannot be mixed up
        with those of the group.
    num_threads : int, optional
        Threads of this rank. By default the ranks on one machine share its cores: a rank has the cores that its
        affinity allows, each divided by the number of ranks that may use it.
    timeout : float, default 600.0
        Seconds after which a rank that waits for others raises a TimeoutError. None: it waits for ever.

    Attributes
    ----------
    rank, size : int
    num_threads : int

    Raises
    ------
    TypeError, ValueError
        `comm` is not a communicator, or a number is out of range.

    Notes
    -----
    A rank that waits sleeps, so that other processes can use its core. A group must not be used by two threads at once.
    Ring attention is due to Liu et al. (2023), the split by heads to Jacobs et al., "DeepSpeed-Ulysses" (2023).

    Examples
    --------
    Started by ``mpiexec -n 4 python -m mpi4py program.py``, each rank gets its own rows; here, one rank has all:

    >>> import numpy as np
    >>> from mpi4py import MPI
    >>> from selfattn.distributed import Group
    >>> group = Group(MPI.COMM_WORLD)
    >>> rows = group.rows(100)
    >>> q, k, v = np.random.default_rng(group.rank).standard_normal((3, 8, len(rows), 64))
    >>> group.attention(q, k, v, rows=rows, causal=True).shape == (8, len(rows), 64)
    True
    """

    def __init__(self, comm: Any, *, num_threads: int | None = None, timeout: float | None = 600.0) -> None:
        if not isinstance(comm, (MPI.Intracomm, MessageComm)) or comm == MPI.COMM_NULL:
            text = f" is a {type(comm).__name__}, but an mpi4py communicator is needed: Group(MPI.COMM_WORLD)"
            raise refusal(TypeError, "Group", "comm", text)
        if timeout is not None and real("Group", "timeout", timeout) <= 0:
            raise refusal(ValueError, "Group", "timeout", f" is {timeout!r}, but it must be positive")
        threads = thread_count("Group", num_threads)
        self._link = Link(comm, timeout)
        self.rank: int = self._link.rank
        self.size: int = self._link.size
        self.num_threads = threads or _share_of_cores(self._link)

    def __repr__(self) -> str:
        return f"Group(rank={self.rank}, size={self.size}, num_threads={self.num_threads})"

    def close(self) -> None:
        """Free the group's communicator; all ranks must call it. A group that lives as long as the program need not."""
        self._link.close()

    def rows(self, length: int, order: str = "zigzag") -> NDArray[np.int64]:
        """Return the positions of the tokens that this rank has.

        Parameters
        ----------
        length : int
            Number of tokens of the whole sequence; it may be smaller than the number of ranks.
        order : {"zigzag", "contiguous"}
            "zigzag": one part near the start and its mirror image near the end, which balances causal attention.
            "contiguous": one part.

        Returns
        -------
        ndarray of int64
            Ascending. Every token is on one rank.
        """
        return rows_of("Group.rows", length, order, self.rank, self.size)

    @clean_signature(attention, without=("q_offset", "return_weights", *ONLY_HERE))
    def attention(
        self, q: ArrayLike, k: ArrayLike, v: ArrayLike, *, rows: ArrayLike, by: str = "keys", **options: Any
    ) -> Any:
        """Compute `selfattn.attention` over a sequence whose tokens are spread over the ranks.

        Parameters
        ----------
        q : array_like, shape (..., H, rows, D)
            This rank's queries, in the order of `rows`.
        k : array_like, shape (..., Hkv, rows, D)
        v : array_like, shape (..., Hkv, rows, Dv)
            This rank's keys and values: those of the same tokens.
        rows : integer array
            The positions of this rank's tokens, see `rows`. All ranks together have every position once.
        by : {"keys", "heads"}
            What travels. "keys": every rank gets all keys and values, a chunk at a time, in ascending order, and
            computes while the next chunk travels. Besides its own rows, it holds two chunks, or three where a chunk
            joins tokens of several ranks. "heads": every rank gets all rows of some heads; needs at least as many KV
            heads as ranks.
        **options
            Options of `selfattn.attention`, except `q_offset` and `return_weights`. They speak of the whole
            sequence: `kv_lens` counts its valid tokens (and serves as `q_lens`, as queries and keys are the same
            tokens), `chunk` counts positions from its start, and `dropout` drops the weights that one process would
            drop. `mask` and `bias` broadcast to (..., H, rows, length of the whole sequence). `num_threads` and `out`
            may differ between ranks.

        Returns
        -------
        out : ndarray, shape (..., H, rows, Dv)
        lse : ndarray, shape (..., H, rows)
            Only with `return_lse`.

        Raises
        ------
        TypeError, ValueError
            As `selfattn.attention`, or ranks differ; on every rank.
        TimeoutError
            Another rank did not answer in time. The group cannot be used any more.

        Notes
        -----
        With ``by="keys"`` the results do not depend on the number of ranks, not even in the last bit: they are those of
        `AttentionState`. With ``by="heads"`` they are those of `selfattn.attention`.
        """
        function = "Group.attention"

        def prepare() -> Call:
            choice(function, "by", by, _BY)
            found = Call(function, Group.attention, {"q": q, "k": k, "v": v}, rows, options)
            found.more = [Fact("by", " is ", repr(by))]
            return found

        call, runs = agree(self._link, function, prepare)
        call.settle(runs, self.rank)
        threads = call.options.num_threads or self.num_threads
        if by == "heads":
            check_by_heads(call, self.size)
        with self._link.flight(function):
            attend = attend_by_keys if by == "keys" else attend_by_heads
            return call.results(*attend(self._link, call, threads))

    @clean_signature(attention_backward, without=("q_offset", "grad_weights", "into", "accumulate"))
    def attention_backward(
        self,
        grad_out: ArrayLike,
        q: ArrayLike,
        k: ArrayLike,
        v: ArrayLike,
        out: ArrayLike,
        lse: ArrayLike,
        *,
        rows: ArrayLike,
        wrt: Sequence[str] = ("q", "k", "v"),
        grad_lse: ArrayLike | None = None,
        **options: Any,
    ) -> Gradients:
        """Compute the gradients of `Group.attention` from its results, for this rank's rows.

        Parameters
        ----------
        grad_out, q, k, v, out, lse : array_like
            This rank's rows. `out` and `lse` are what `attention` returned, with ``by="keys"`` or ``by="heads"``.
        rows : integer array
            As for `attention`.
        wrt : sequence of str
            As for `selfattn.attention_backward`: "q", "k", "v", "bias", "sinks", "alibi_slopes", "t5", "scale".
        grad_lse : array_like, shape (..., H, rows), optional
            ∂L/∂lse.
        **options
            The options that were passed to `attention`.

        Returns
        -------
        Gradients
            Those of this rank's rows of q, k, v, and of a bias that has rows of its own. The others are the same on all
            ranks. If no rank has more than one row, a bias that is the same on all ranks counts as one that all rows
            share. Dtypes are those of `selfattn.attention_backward`.

        Raises
        ------
        TypeError, ValueError, TimeoutError
            As `attention`.

        Notes
        -----
        Keys and values travel for the gradient of q; then queries, the gradient of `out`, lse and one number per row
        (``Σ_d ∂out_d · out_d``) travel for the gradients of k and v, with the rows of mask and bias. So a gradient of
        q, k or v is summed on one rank, in ascending order, and does not depend on the number of ranks; only with ALiBi
        the last bits for k and v depend on where runs of rows begin and end. Gradients that all rows share are summed
        in the order of the ranks: their last bits depend on which rank has which rows.
        """
        function = "Group.attention_backward"
        arrays = {"q": q, "k": k, "v": v, "grad_out": grad_out, "out": out, "lse": lse}
        if grad_lse is not None:
            arrays["grad_lse"] = grad_lse
        call, runs = agree(
            self._link, function, lambda: GradientCall(function, Group.attention_backward, arrays, rows, wrt, options)
        )
        call.settle(runs, self.rank)
        with self._link.flight(function):
            return differentiate(self._link, call, call.options.num_threads or self.num_threads)

    @clean_signature(attention_with_kvcache, without=_NOT_OVER_RANKS)
    def attention_with_kvcache(
        self, q: ArrayLike, cache: Any, k: ArrayLike | None = None, v: ArrayLike | None = None, **options: Any
    ) -> Any:
        """Append new tokens to one rank's cache and attend to what is in all ranks' caches.

        Keys and values stay where they are; only results travel, with their log-sum-exps.

        Parameters
        ----------
        q : array_like, shape (B, H, Sq, D)
            Queries of the newest Sq tokens: the same on all ranks.
        cache : KVCache, PagedKVCache or SpreadCache
            This rank's cache, of any storage type. A cache with a window must be in a `SpreadCache`.
        k, v : array_like, shape (B, Hkv, Sq, D) and (B, Hkv, Sq, Dv), optional
            Keys and values of the newest tokens: the same on all ranks. The rank whose cache has the fewest tokens
            appends them (those of all sequences count; of equal ranks the first).
        **options
            `sequences` (this rank's), `rope` and `positions`, `mask` (of the newest tokens), `causal`, `scale`,
            `softcap`, `sinks`, `layout`, `return_lse`, `precision`, `num_threads`: as for
            `selfattn.attention_with_kvcache`. A token's position is its place in the whole sequence, or what
            `positions` says. With a `SpreadCache` also `window`, `bias` (for all tokens of the whole sequence),
            `alibi_slopes` and `t5`.

        Returns
        -------
        out : ndarray, shape (B, H, Sq, Dv)
            The same on all ranks, to the last bit.
        lse : ndarray, shape (B, H, Sq)
            Only with `return_lse`.

        Raises
        ------
        TypeError, ValueError, TimeoutError
            As `attention`. No cache has changed, except that one with a window may have lost old tokens.
        """
        function = "Group.attention_with_kvcache"
        call, owns = agree(
            self._link, function, lambda: CacheCall(function, Group.attention_with_kvcache, (q, cache, k, v), options)
        )
        call.settle(self._link, owns)
        return attend_cache(self._link, call, call.num_threads or self.num_threads)


def _affinity() -> set[int]:
    """Return the cores that this process may use; where the system does not tell, as on macOS, all of them."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _share_of_cores(link: Link) -> int:
    """Return how many threads this rank may use, if the ranks of its machine share its cores."""
    mine = sorted(_affinity())
    own = link.machines[link.rank]
    neighbours = [cores for x, cores in zip(link.machines, link.exchange("Group", mine), strict=True) if x == own]
    share = sum(1 / sum(core in cores for cores in neighbours) for core in mine) / len(mine)
    return max(int(get_num_threads() * share + 1e-9), 1)
