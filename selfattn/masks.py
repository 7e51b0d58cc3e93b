"""Masks for `attention` that need no memory for the pairs: limits and documents, joined by ``&``, ``|`` and ``~``.

Positions are those of the call: query i has the position i + offset, as for the options of `attention` with the same
names.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._arguments import as_array, integer, integers, whole_number, window_sides
from ._errors import refusal
from ._keywords import hinted
from ._mask_kinds import Causal, Chunk, Dense, Documents, Prefix, Window
from ._mask_nodes import FAR
from ._mask_nodes import Mask as Mask

__all__ = ["Mask", "causal", "chunk", "dense", "documents", "prefix", "window"]


@hinted
def causal(offset: int | None = None) -> Mask:
    """Return a mask that shows query i the keys ``j <= i + offset``.

    Parameters
    ----------
    offset : int, optional
        By default, the offset of the call: its q_offset, or ``kv_len − q_len``. A given offset is that of this mask
        alone.

    Returns
    -------
    Mask

    Raises
    ------
    TypeError
        `offset` is no integer.

    Examples
    --------
    >>> from selfattn import masks
    >>> masks.causal().array(2, 3).astype(int).tolist()
    [[1, 1, 0], [1, 1, 1]]
    """
    return Causal(None if offset is None else max(-FAR, min(integer("masks.causal", "offset", offset), FAR)))


@hinted
def window(left: int | None, right: int | None) -> Mask:
    """Return a mask that shows query i the keys ``−left <= j − (i + offset) <= right``.

    Parameters
    ----------
    left, right : int or None
        Tokens on both sides of the query's position; None = unbounded on that side.

    Returns
    -------
    Mask

    Raises
    ------
    TypeError, ValueError
        A side that is no integer, or is negative.

    Examples
    --------
    >>> from selfattn import masks
    >>> masks.window(1, 0).array(3, 3).astype(int).tolist()
    [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """
    return Window(*window_sides("masks.window", (left, right)))


@hinted
def chunk(size: int) -> Mask:
    """Return a mask that shows a query the keys of its own chunk of positions.

    Parameters
    ----------
    size : int
        Positions of a chunk: ``j // size == (i + offset) // size``.

    Returns
    -------
    Mask

    Raises
    ------
    TypeError, ValueError
        `size` is no integer, or less than 1.

    Examples
    --------
    >>> from selfattn import masks
    >>> masks.chunk(2).array(3, 3).astype(int).tolist()
    [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    """
    return Chunk(whole_number("masks.chunk", "size", size, 1))


@hinted
def prefix(n: int) -> Mask:
    """Return a mask that shows every query the keys ``j < n``.

    ``masks.causal() | masks.prefix(n)`` is the mask of a prefix language model.

    Parameters
    ----------
    n : int
        Number of keys, at least 0.

    Returns
    -------
    Mask

    Raises
    ------
    TypeError, ValueError
        `n` is no integer, or negative.

    Examples
    --------
    >>> from selfattn import masks
    >>> (masks.causal() | masks.prefix(2)).array(3, 3).astype(int).tolist()
    [[1, 1, 0], [1, 1, 0], [1, 1, 1]]
    """
    return Prefix(whole_number("masks.prefix", "n", n, 0))


@hinted
def documents(ids: ArrayLike, q_ids: ArrayLike | None = None) -> Mask:
    """Return a mask that shows a query the keys of its own document.

    Parameters
    ----------
    ids : integer array, shape (Sk,) or (B, Sk)
        The document of each key, also of each query unless `q_ids` is given.
    q_ids : integer array, shape (Sq,) or (B, Sq), optional
        The document of each query.

    Returns
    -------
    Mask

    Raises
    ------
    TypeError, ValueError
        Ids that are no integers, or have no axis.

    Notes
    -----
    Tiles of keys in which no query finds its document are skipped. They are found by the least and the largest id of a
    tile, so the tokens of a document should be adjacent.

    Examples
    --------
    >>> from selfattn import masks
    >>> masks.documents([0, 0, 1]).array(3, 3).astype(int).tolist()
    [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    """
    keys = _ids("ids", ids)
    return Documents(keys, keys if q_ids is None else _ids("q_ids", q_ids))


def _ids(name: str, given: ArrayLike) -> NDArray[np.int64]:
    ids = integers("masks.documents", name, given)
    if ids.ndim == 0:
        raise refusal(ValueError, "masks.documents", name, " has no axis, but one id per token is needed")
    return ids if ids.ndim == 1 else ids[..., None, :]


@hinted
def dense(array: ArrayLike) -> Mask:
    """Return a boolean array as a mask, to be joined with others.

    Parameters
    ----------
    array : array_like of bool
        True = attend; broadcasts to (..., H, Sq, Sk). It is not copied.

    Returns
    -------
    Mask

    Raises
    ------
    TypeError
        `array` has another dtype.

    Examples
    --------
    >>> from selfattn import masks
    >>> (masks.causal() & masks.dense([True, False, True])).array(3, 3).astype(int).tolist()
    [[1, 0, 0], [1, 0, 0], [1, 0, 1]]
    """
    values = as_array("masks.dense", "array", array)
    if values.dtype != np.bool_:
        raise refusal(TypeError, "masks.dense", "array", f" has dtype {values.dtype}, but bool is needed")
    return Dense(values if values.ndim > 1 else np.atleast_2d(values))
