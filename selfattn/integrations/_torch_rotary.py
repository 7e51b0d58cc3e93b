"""Rotary embedding from tables of cosines and sines, as in ``flash_attn.layers.rotary``; differentiable."""

from __future__ import annotations

from typing import Any

import torch

from .._arguments import flag, integer
from ._tensors import ACCEPTED, check_integers, check_memory, computed_in, is_plain

_NAME = "apply_rotary_emb"


def apply_rotary_emb(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | torch.Tensor = 0,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
) -> torch.Tensor:
    """Rotate pairs of elements of each head, as ``flash_attn.layers.rotary.apply_rotary_emb``.

    Parameters
    ----------
    x : Tensor, shape (B, S, H, D)
        With `cu_seqlens`: (total, H, D), N sequences one after another. 16-bit numbers are rotated in float32.
    cos, sin : Tensor, shape (positions, rotary_dim / 2)
        Only the first rotary_dim elements of each head are rotated.
    interleaved : bool, default False
        False: element i pairs with ``i + rotary_dim / 2``. True: adjacent elements pair.
    inplace : bool, default False
        Write the result to x.
    seqlen_offsets : int or Tensor of integers, shape (B,) or (N,)
        The position of the first token of all sequences, or of each.
    cu_seqlens : Tensor of integers, shape (N + 1,), optional
        Start of each sequence, followed by the total.
    max_seqlen : int, optional
        As in the original, needed with `cu_seqlens`. It changes nothing.

    Returns
    -------
    Tensor
        In x's shape and dtype; x itself if `inplace`.

    Raises
    ------
    TypeError, ValueError
        An argument is no CPU tensor, the tables do not fit x, or a position is not in the tables.

    Examples
    --------
    >>> import torch
    >>> from selfattn.integrations.torch import apply_rotary_emb
    >>> angles = torch.arange(10)[:, None] * 10000.0 ** (-torch.arange(4) / 4)
    >>> apply_rotary_emb(torch.randn(2, 10, 4, 8), angles.cos(), angles.sin()).shape
    torch.Size([2, 10, 4, 8])
    """
    interleaved, inplace = flag(_NAME, "interleaved", interleaved), flag(_NAME, "inplace", inplace)
    _check(x, cos, sin, 4 if cu_seqlens is None else 3)
    if cu_seqlens is not None and max_seqlen is None:
        raise ValueError(f"{_NAME}: cu_seqlens is given without max_seqlen")
    places = _positions(x, seqlen_offsets, cu_seqlens)
    if is_plain(places) and places.numel():  # compilers cannot look at positions
        first, last = int(places.min()), int(places.max())
        if first < 0 or last >= len(cos):
            wrong = first if first < 0 else last
            raise ValueError(f"{_NAME}: cos has the positions 0 to {len(cos) - 1}, but position {wrong} is needed")
    count, kind = 2 * cos.shape[1], computed_in(x.dtype)
    c, s = (table[places].unsqueeze(-2).to(kind) for table in (cos, sin))
    head = x[..., :count]
    one, other = (part.to(kind) for part in _pairs(head, interleaved))
    rotated = one * c - other * s, one * s + other * c
    joined = (torch.stack(rotated, -1).flatten(-2) if interleaved else torch.cat(rotated, -1)).to(x.dtype)
    if inplace:
        head.copy_(joined)
        return x
    return torch.cat((joined, x[..., count:]), -1)


def _pairs(head: Any, interleaved: bool) -> tuple[Any, Any]:
    if interleaved:
        return head[..., ::2], head[..., 1::2]
    half = head.shape[-1] // 2
    return head[..., :half], head[..., half:]


def _check(x: Any, cos: Any, sin: Any, ndim: int) -> None:
    for name, tensor in (("x", x), ("cos", cos), ("sin", sin)):
        check_memory(_NAME, name, tensor)
        if tensor.dtype not in ACCEPTED:
            raise TypeError(f"{_NAME}: {name} has dtype {tensor.dtype}, but one of {ACCEPTED} is needed")
    if x.ndim != ndim:
        raise ValueError(f"{_NAME}: x has shape {tuple(x.shape)}, but {ndim} dimensions are needed")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.ndim != 2 or table.shape != cos.shape or 2 * table.shape[1] > x.shape[-1]:
            raise ValueError(
                f"{_NAME}: {name} has shape {tuple(table.shape)}, but (positions, rotary_dim / 2) is needed, the same "
                f"for both, with rotary_dim at most {x.shape[-1]}"
            )


def _positions(x: Any, offsets: Any, cu_seqlens: Any) -> Any:
    """Return the position of each token: (S,), (B, S) or (total,)."""
    if cu_seqlens is not None:
        _check_starts(cu_seqlens, len(x))
    _check_offsets(offsets, len(x) if cu_seqlens is None else len(cu_seqlens) - 1)
    if cu_seqlens is None:
        tokens = torch.arange(x.shape[1])
        return tokens + (offsets[:, None] if isinstance(offsets, torch.Tensor) else offsets)
    tokens = torch.arange(len(x))
    sequence = torch.bucketize(tokens, cu_seqlens[1:].long(), right=True)
    return tokens - cu_seqlens[sequence] + (offsets[sequence] if isinstance(offsets, torch.Tensor) else offsets)


def _check_offsets(offsets: Any, count: int) -> None:
    if not isinstance(offsets, torch.Tensor):
        if not torch.compiler.is_compiling():  # a compiler's integers have a type of their own
            integer(_NAME, "seqlen_offsets", offsets)
        return
    check_integers(_NAME, "seqlen_offsets", offsets)
    if offsets.shape != (count,):
        raise ValueError(f"{_NAME}: seqlen_offsets has shape {tuple(offsets.shape)}, but ({count},) is needed")


def _check_starts(starts: Any, total: int) -> None:
    check_integers(_NAME, "cu_seqlens", starts)
    if starts.ndim != 1 or len(starts) == 0:
        raise ValueError(f"{_NAME}: cu_seqlens has shape {tuple(starts.shape)}, but (N + 1,) is needed")
    if not is_plain(starts):  # compilers cannot look at numbers
        return
    first, last = int(starts[0]), int(starts[-1])
    if first != 0 or last != total:
        raise ValueError(f"{_NAME}: cu_seqlens goes from {first} to {last}, but x has the rows 0 to {total}")
    for i in (starts.diff() < 0).nonzero().flatten().tolist()[:1]:
        raise ValueError(f"{_NAME}: cu_seqlens falls from {int(starts[i])} to {int(starts[i + 1])} (sequence {i})")
