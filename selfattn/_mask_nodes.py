"""Masks as expressions: what a mask says about single pairs, and about whole tiles of them."""

from __future__ import annotations

from functools import reduce
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._arguments import integers, whole_number

TILE_KEYS = 128  # keys of a tile
FAR = 1 << 60  # as in the core: beyond any position, and the sum of two cannot overflow

Bools = NDArray[np.bool_]


class Grid(NamedTuple):
    """The pairs of a call."""

    function: str
    q_len: int
    kv_len: int
    offset: NDArray[np.int64]  # the position of query 0: (), or (..., 1) with an axis for the heads

    def tiles(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the first and the last key of each tile."""
        first = np.arange(0, self.kv_len, TILE_KEYS)
        return first, np.minimum(first + TILE_KEYS, self.kv_len) - 1


class Seen(NamedTuple):
    """What some queries see of each tile of keys, (..., tiles). Both are bounds: `some` may be too often True, and
    `every` too seldom. So `&` and `|` apply to each of the two, and `~` swaps them."""

    some: Bools  # a query may see a key
    every: Bools  # each query sees each key


class Mask:
    """Which keys each query may attend to, as an expression without memory for the pairs.

    The functions of ``selfattn.masks`` make masks. ``a & b`` is visible where both are, ``a | b`` where one of them is,
    and ``~a`` where a is hidden. Masks cannot be changed.

    Examples
    --------
    >>> from selfattn import masks
    >>> mask = masks.causal() & ~masks.prefix(1)
    >>> mask
    causal() & ~prefix(1)
    >>> mask.array(3, 3).astype(int).tolist()
    [[0, 0, 0], [0, 1, 0], [0, 1, 1]]
    """

    positional = False  # whether the mask depends on the offset of the call
    __array_ufunc__ = None  # so that `array & mask` is an error, not an array of masks

    def visible(self, queries: range, keys: range, grid: Grid) -> Bools:
        """Return which pairs are visible, in a shape that broadcasts to (..., H, queries, keys)."""
        raise NotImplementedError

    def seen(self, queries: range, grid: Grid) -> Seen:
        """Return what the queries, of which there is at least one, see of the tiles of keys."""
        raise NotImplementedError

    def check(self, grid: Grid) -> None:
        """Raise unless the mask has the lengths of the grid."""

    def array(self, q_len: int, kv_len: int, *, q_offset: ArrayLike | None = None) -> Bools:
        """Return the mask as a boolean array, for functions that take no mask of this kind, and for pictures.

        Parameters
        ----------
        q_len, kv_len : int
            Numbers of queries and keys.
        q_offset : int or integer array (B,), optional
            The position of query 0 among the keys, default ``kv_len − q_len``.

        Returns
        -------
        ndarray of bool, shape (q_len, kv_len)
            True = attend. (B, 1, q_len, kv_len) or (..., H, q_len, kv_len) if the mask differs between batch entries or
            heads.

        Raises
        ------
        TypeError, ValueError
            Lengths that do not fit the mask, or are no lengths.
        """
        name = "Mask.array"
        q_len, kv_len = whole_number(name, "q_len", q_len, 0), whole_number(name, "kv_len", kv_len, 0)
        offset = np.array(kv_len - q_len) if q_offset is None else integers(name, "q_offset", q_offset)
        grid = Grid(name, q_len, kv_len, np.clip(offset, -FAR, FAR)[(..., None) if offset.ndim else ()])
        self.check(grid)
        visible = self.visible(range(q_len), range(kv_len), grid)
        return np.array(np.broadcast_to(visible, np.broadcast_shapes(visible.shape, (q_len, kv_len))))

    def __and__(self, other: Mask) -> Mask:
        return And(self, _mask("&", other))

    def __or__(self, other: Mask) -> Mask:
        return Or(self, _mask("|", other))

    def __rand__(self, other: Any) -> NoReturn:
        raise _no_mask("&", other)

    def __ror__(self, other: Any) -> NoReturn:
        raise _no_mask("|", other)

    def __invert__(self) -> Mask:
        return Not(self)

    def __bool__(self) -> NoReturn:
        raise TypeError("masks: a mask is neither true nor false: combine masks by &, | and ~, not by and, or and not")

    def __array__(self, dtype: Any = None, copy: Any = None) -> NoReturn:
        raise TypeError("pass mask.array(q_len, kv_len), since only attention takes masks of selfattn.masks")


def _mask(sign: str, other: Any) -> Mask:
    if not isinstance(other, Mask):
        raise _no_mask(sign, other)
    return other


def _no_mask(sign: str, other: Any) -> TypeError:
    hint = ": masks.dense(array)" if isinstance(other, np.ndarray) else ""
    return TypeError(f"masks: an operand of {sign} is a {type(other).__name__}, but a mask is needed{hint}")


class Joined(Mask):
    """Masks joined by one sign."""

    sign: str
    join: np.ufunc

    def __init__(self, *masks: Mask) -> None:
        self.members: tuple[Mask, ...] = ()
        for mask in masks:
            self.members += mask.members if isinstance(mask, Joined) and type(mask) is type(self) else (mask,)
        self.positional = any(member.positional for member in self.members)

    def visible(self, queries: range, keys: range, grid: Grid) -> Bools:
        return reduce(self.join, (member.visible(queries, keys, grid) for member in self.members))

    def seen(self, queries: range, grid: Grid) -> Seen:
        return Seen(*(reduce(self.join, of) for of in zip(*(x.seen(queries, grid) for x in self.members), strict=True)))

    def check(self, grid: Grid) -> None:
        for member in self.members:
            member.check(grid)

    def __repr__(self) -> str:
        return f" {self.sign} ".join(f"({x})" if isinstance(x, Joined) else repr(x) for x in self.members)


class And(Joined):
    sign = "&"
    join = np.logical_and


class Or(Joined):
    sign = "|"
    join = np.logical_or


class Not(Mask):
    def __init__(self, member: Mask) -> None:
        self.member = member
        self.positional = member.positional

    def visible(self, queries: range, keys: range, grid: Grid) -> Bools:
        return np.logical_not(self.member.visible(queries, keys, grid))

    def seen(self, queries: range, grid: Grid) -> Seen:
        some, every = self.member.seen(queries, grid)
        return Seen(~every, ~some)

    def check(self, grid: Grid) -> None:
        self.member.check(grid)

    def __invert__(self) -> Mask:
        return self.member

    def __repr__(self) -> str:
        return f"~({self.member})" if isinstance(self.member, Joined) else f"~{self.member}"
