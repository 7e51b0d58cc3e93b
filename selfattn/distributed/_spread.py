"""A rank's cache whose tokens have known positions, and what options by distance say of these tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .._any_cache import no_cache
from .._arguments import as_array, integers, reals, whole_number, window_sides
from .._cache import KVCache
from .._errors import refusal
from .._paged import PagedKVCache

BY_DISTANCE = ("window", "bias", "alibi_slopes", "t5")
_Positions = NDArray[np.int64]


class SpreadCache:
    """One rank's cache of sequences that are spread over ranks; it knows which tokens of a sequence are here.

    Pass it to `Group.attention_with_kvcache` in place of the cache. This is needed for caches with a window and for
    options by distance: window, bias, ALiBi and T5. `attention_with_kvcache` keeps the positions up to date. Tokens
    that are appended or removed in another way must be told with `place`. All ranks together hold every position once;
    the next call compares the positions that were told, and raises a ValueError on all ranks if they overlap or leave a
    gap.

    Parameters
    ----------
    cache : KVCache or PagedKVCache
    rows : integer array, optional
        For a KVCache that has tokens already, the same positions in each sequence: those of this rank's tokens in the
        whole sequence, ascending. For example the rows of a prompt that `Group.attention` has computed.

    Attributes
    ----------
    cache : KVCache or PagedKVCache

    Raises
    ------
    TypeError, ValueError
        `cache` is no cache, or `rows` do not ascend.

    Examples
    --------
    >>> import numpy as np
    >>> from selfattn import KVCache
    >>> from selfattn.distributed import SpreadCache
    >>> cache = KVCache(1, num_kv_heads=2, head_dim=8, capacity=10)
    >>> cache.append(*np.ones((2, 1, 2, 3, 8), dtype=np.float32))
    >>> SpreadCache(cache, rows=[0, 4, 5]).rows(0)
    array([0, 4, 5])
    """

    def __init__(self, cache: KVCache | PagedKVCache, rows: ArrayLike | None = None) -> None:
        if not isinstance(cache, (KVCache, PagedKVCache)):
            raise no_cache("SpreadCache", cache)
        self.cache = cache
        self._rows: dict[int, _Positions] = {}
        self._new: set[int] = set()  # sequences whose positions no call has compared with those of other ranks
        if rows is not None:
            for sequence in range(cache.batch if isinstance(cache, KVCache) else 0):
                self.place(sequence, rows)

    def place(self, sequence: int, rows: ArrayLike) -> None:
        """Tell the positions of the tokens of a sequence that are in this cache.

        Parameters
        ----------
        sequence : int
            Its index in a KVCache, its id in a PagedKVCache.
        rows : integer array, shape (tokens,)
            Ascending. With a ring, also those of the tokens that it has lost.
        """
        positions = integers("SpreadCache.place", "rows", rows)
        if positions.ndim != 1 or np.any(np.diff(positions, prepend=-1) <= 0):
            text = f" has shape {positions.shape}, but ascending positions are needed"
            raise refusal(ValueError, "SpreadCache.place", "rows", text)
        index = whole_number("SpreadCache.place", "sequence", sequence, 0)
        self._rows[index] = positions
        self._new.add(index)

    def rows(self, sequence: int) -> _Positions:
        """Return the positions of the tokens of a sequence that are in this cache."""
        found = self._rows.get(sequence)
        return np.empty(0, np.int64) if found is None else found.copy()

    def check(self, function: str, sequences: Sequence[int], lengths: Sequence[int]) -> None:
        """Raise unless the positions of all tokens are known."""
        for sequence, length in zip(sequences, lengths, strict=True):
            known = len(self._rows.get(sequence, ()))
            if known != length:
                text = f" has {length} tokens of sequence {sequence}, but positions of {known} are known: use place"
                raise refusal(ValueError, function, "cache", text)

    def is_new(self, sequences: Iterable[int]) -> bool:
        """Whether positions of any of these sequences have been told since the ranks last compared them."""
        return not self._new.isdisjoint(sequences)

    def forget_new(self, sequences: Iterable[int]) -> None:
        """Note that the positions of these sequences fit to those of the other ranks."""
        self._new.difference_update(sequences)

    def add(self, sequences: Sequence[int], first: NDArray[np.int64], count: int) -> None:
        """Note that `count` tokens from position `first` on have been appended to each sequence."""
        for sequence, start in zip(sequences, first, strict=True):
            self._rows[sequence] = np.append(self.rows(sequence), np.arange(start, start + count))


def terms(
    function: str, given: Mapping[str, Any], keys: Sequence[_Positions], queries: _Positions, heads: int
) -> dict[str, Any]:
    """Return options for a rank's cache that do what the options by distance do.

    `keys` are the positions of the tokens of each sequence, `queries` (B, Sq) those of the queries.
    """
    if not any(map(len, keys)):
        return {}
    left, right = window_sides(function, given["window"]) if "window" in given else (-1, -1)
    others = given.keys() & {"bias", "alibi_slopes", "t5"}
    if queries.shape[1] == 1 and not others:
        counts = {
            len(own) if left < 0 else int(np.count_nonzero(own >= query[0] - left))
            for own, query in zip(keys, queries, strict=True)
        }
        if len(counts) == 1 and (count := counts.pop()) > 0:  # the newest ones
            return {"window": (count - 1, None)}
    total = np.zeros((len(keys), heads if others else 1, queries.shape[1], max(map(len, keys))))
    for b, (own, query) in enumerate(zip(keys, queries, strict=True)):
        part, distance = total[b, ..., : len(own)], query[:, None] - own
        if "bias" in given:
            bias = as_array(function, "bias", given["bias"])
            bias = bias[b if len(bias) > 1 else 0] if bias.ndim > 3 else bias
            part += bias[..., own] if bias.ndim and bias.shape[-1] != 1 else bias
        if "alibi_slopes" in given:
            slopes = reals(function, "alibi_slopes", given["alibi_slopes"])
            slopes = slopes[b if len(slopes) > 1 else 0] if slopes.ndim > 1 else slopes
            part -= slopes[..., None, None] * np.abs(distance)
        if "t5" in given:
            by_distance, origin = given["t5"].for_core()
            part += by_distance[:, np.clip(distance + origin, 0, by_distance.shape[1] - 1)]
        part[:, ((left >= 0) & (distance > left)) | ((right >= 0) & (distance < -right))] = -np.inf
    return {"bias": total}
