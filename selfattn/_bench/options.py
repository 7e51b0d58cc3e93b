"""What a workload asks for beyond the shapes of its operands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .numbers import ITEMSIZES

SCALE_BYTES = 4  # of the float32 that a row of codes is multiplied by


@dataclass(frozen=True)
class Options:
    """What a workload asks of `selfattn.attention` beyond q, k and v.

    Attributes
    ----------
    causal : bool
    window : tuple of (int or None), optional
    softcap : float, optional
    mask : {"none", "pairs", "tiles", "keys"}
        "pairs" is a random mask of shape (1, 1, q_len, kv_len); "tiles" one of that shape that
        shows every fourth square of 256 pairs a side; "keys" gives `kv_lens` as a mask of shape
        (batch, 1, 1, kv_len), as tokenizers do.
    bias : bool
        A random bias of shape (1, num_heads, q_len, kv_len).
    alibi : bool
    kv_lens : tuple of int, optional
        One length per batch row.
    """

    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    softcap: float | None = None
    mask: Literal["none", "pairs", "tiles", "keys"] = "none"
    bias: bool = False
    alibi: bool = False
    kv_lens: tuple[int, ...] | None = None

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Options:
        """Rebuild options from `dataclasses.asdict`, also after a trip through JSON."""
        values = dict(record)
        for name in ("window", "kv_lens"):
            if values[name] is not None:
                values[name] = tuple(values[name])
        return cls(**values)


@dataclass(frozen=True)
class Cache:
    """What a workload's keys and values come from, and how the call reads it.

    Attributes
    ----------
    dtype : str, optional
        How tokens are stored: "int8", or a type of numbers; the workload's by default.
    page_size : int
        Tokens of a page of a PagedKVCache, whose pages are in random order; 0 for a KVCache.
    shared : int
        Tokens that all sequences have in common: they are forks of one prompt.
    cascade : bool
        Whether the call is told to read those once for all.
    step : bool
        Whether the call also appends the last token, and writes to an `out`.
    """

    dtype: str | None = None
    page_size: int = 0
    shared: int = 0
    cascade: bool = False
    step: bool = False

    def storage(self, dtype: str) -> Any:
        """Name the type of what is stored, for operands of `dtype`."""
        return self.dtype or dtype

    def itemsize(self, dtype: str) -> int:
        """Bytes of one stored number."""
        return 1 if self.dtype == "int8" else ITEMSIZES[self.storage(dtype)]

    @property
    def scale_bytes(self) -> int:
        """Bytes beside a token's numbers, per head, of K and V."""
        return 2 * SCALE_BYTES if self.dtype == "int8" else 0
