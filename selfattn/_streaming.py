"""Attention over keys that arrive in pieces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _core
from ._arguments import as_array, core_options, integer_in, out_array
from ._attention import _DEFAULTS, ONLY_HERE, attention
from ._errors import refusal
from ._keywords import clean_signature, hinted, refuse_unknown
from ._lock import SharedLock
from ._typing import Array, StateOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

_MOST_KEYS = 1 << 47
_OPTIONS = _DEFAULTS.keys() - {"return_lse", "return_weights"}


class AttentionState:
    """Exact attention over keys that arrive in pieces: from a file, over a network, or from other processes.

    The result is that of `attention` over all keys at once, but only one piece of the keys and values is needed at a
    time. Between pieces the state keeps the running output, maximum and sum of each row, in the type of computation.

    Parameters
    ----------
    q : array_like, shape (..., H, Sq, D)
        The queries, as for `attention`. They are copied, so that changing q later does not change the state. q must
        have all leading dimensions of the result; those of k and v broadcast against them.
    kv_len : int
        Sk, the number of all keys, at most 2⁴⁷.
    first : int, default 0
        The first key that will be absorbed, in 0..kv_len. The keys before it are hidden from all queries.
    **options
        The options of `attention` except out and those that return more. They speak of all kv_len keys, as if these
        were given at once: by default, causal, window, chunk, ALiBi and T5 align the last query with key
        ``kv_len − 1``. mask and bias, for all kv_len keys, are kept without a copy and must not change; or `absorb`
        takes their pieces.

    Attributes
    ----------
    kv_len : int
    next_key : int
        The key that the next piece must start with.
    block_keys : int
        512. If all pieces but the last end at multiples of it, the result does not depend on where keys were cut, not
        even in the last bit. Other cuts change the order of sums, and so the rounding.

    Raises
    ------
    TypeError, ValueError
        As `attention`. `absorb` also refuses a piece that leaves a gap or goes beyond kv_len.

    Notes
    -----
    For a given instruction set the bits of the result depend neither on the number of threads nor on the batch size,
    strides, or calls of `result` in between. Nor do they depend on the number of queries, except that a few queries (as
    in decoding) are computed by another kernel.

    Threads take blocks of queries. For a few queries of a few heads there is thus less to share than in `attention`,
    which can also divide the keys.

    Calls from several threads wait for each other. If `absorb` is interrupted (Ctrl-C), only some rows have absorbed
    the piece: the state then refuses all further calls with a RuntimeError. After any other error the state is as
    before the call. States cannot be copied or pickled.

    The running maximum and sum are due to Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018).

    Examples
    --------
    >>> import numpy as np
    >>> import selfattn as sa
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 8, 2000, 64), dtype=np.float32)
    >>> state = sa.AttentionState(q, kv_len=2000, causal=True)
    >>> for first in range(0, 2000, state.block_keys):
    ...     piece = slice(first, first + state.block_keys)
    ...     state.absorb(k[:, piece], v[:, piece])
    >>> out, lse = state.result()
    >>> bool(np.allclose(out, sa.attention(q, k, v, causal=True), rtol=0, atol=1e-6))
    True
    """

    block_keys: ClassVar[int] = 512

    @clean_signature(attention, without=("out", "return_lse", "return_weights", *ONLY_HERE))
    def __init__(self, q: ArrayLike, *, kv_len: int, first: int = 0, **options: Unpack[StateOptions]) -> None:
        if not options.keys() <= _OPTIONS:
            refuse_unknown(AttentionState.__init__, options)
        self._begin(q, kv_len, first, options)

    def _begin(self, q: ArrayLike, kv_len: int, first: int, options: Mapping[str, Any], first_query: int = 0) -> None:
        """Begin with queries of which, for dropout, the first counts as query `first_query`."""
        function = "AttentionState"
        queries = np.array(as_array(function, "q", q), order="C")
        self.kv_len = integer_in(function, "kv_len", kv_len, 0, _MOST_KEYS)
        start = integer_in(function, "first", first, 0, self.kv_len)
        checked = core_options(function, **options)
        checked.first_query = first_query
        own = checked.copy()
        self._mask, self._bias = own.mask, own.bias
        own.mask = own.bias = None
        for name in _core.ARRAY_OPTIONS:
            if (array := getattr(own, name)) is not None:
                setattr(own, name, np.array(array))
        self._key_axis = -3 if own.layout == _core.LAYOUTS["bshd"] and queries.ndim > 2 else -2
        self._core = _core.make_state(queries, self.kv_len, start, checked, own)
        self._lock = SharedLock()

    @property
    def next_key(self) -> int:
        """The key that the next piece must start with."""
        return _core.next_key(self._core)

    @hinted
    def absorb(
        self,
        k: ArrayLike,
        v: ArrayLike,
        *,
        first: int | None = None,
        mask: ArrayLike | None = None,
        bias: ArrayLike | None = None,
    ) -> None:
        """Absorb the next n keys and values, which may be overwritten afterwards.

        Parameters
        ----------
        k : array_like, shape (..., Hkv, n, D)
            The keys from `first` on, as for `attention`, in the state's layout, with any strides; n may be 0. All
            pieces have the same Hkv and dtype.
        v : array_like, shape (..., Hkv, n, Dv)
            The values, in k's dtype.
        first : int, optional
            The first key; default `next_key`, and nothing else is accepted: pieces come in order, without gaps.
        mask, bias : array_like, optional
            For these n keys: broadcast to (..., H, Sq, n).

        Raises
        ------
        ValueError, TypeError
            A piece that does not fit. The state is unchanged.
        MemoryError
            No memory for the sums or for scratch. The state is unchanged.
        RuntimeError
            An earlier `absorb` was interrupted.
        """
        function = "AttentionState.absorb"
        keys, values = as_array(function, "k", k), as_array(function, "v", v)
        count = keys.shape[self._key_axis] if keys.ndim >= -self._key_axis else 0  # the core checks the shapes
        with self._lock.writing:
            start = self.next_key if first is None else integer_in(function, "first", first, 0, self.kv_len)
            pieces = (
                _piece(function, name, all_keys, given, slice(start, start + count))
                for name, all_keys, given in (("mask", self._mask, mask), ("bias", self._bias, bias))
            )
            _core.absorb(self._core, keys, values, start, *pieces)

    def result(self, out: Array | None = None) -> tuple[Array, Array]:
        """Return attention over the keys absorbed so far; absorbing may go on afterwards.

        Parameters
        ----------
        out : ndarray, optional
            Array for the result, with exactly the result's shape and dtype, and any strides.

        Returns
        -------
        out : ndarray, shape (..., H, Sq, Dv)
            In q's dtype; (..., Sq, H, Dv) in layout "bshd". 0 for rows that have seen no key.
        lse : ndarray, shape (..., H, Sq)
            The log-sum-exp of each row's scores (sink included); float64 for float64 queries, else float32.

        Raises
        ------
        ValueError
            Nothing has been absorbed yet, so that Dv is not known; or `out` has another shape.
        RuntimeError
            An earlier `absorb` was interrupted.
        """
        function = "AttentionState.result"
        given = None if out is None else out_array(function, out)
        with self._lock.reading:
            return _core.state_result(self._core, given)

    def __reduce__(self) -> NoReturn:
        raise TypeError("AttentionState cannot be copied or pickled: pass on the results, or absorb the keys again")


def _piece(function: str, name: str, all_keys: NDArray[Any] | None, given: Any, keys: slice) -> NDArray[Any] | None:
    """Return the piece of a mask or bias: `given`, or a part of what was given for all keys."""
    if all_keys is None:
        return None if given is None else as_array(function, name, given)
    if given is not None:
        raise refusal(ValueError, function, name, " is given, but AttentionState has one for all keys already")
    return all_keys[..., keys] if all_keys.ndim and all_keys.shape[-1] != 1 else all_keys
