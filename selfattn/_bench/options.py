"""A workload's options, apart from the shapes of its operands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .._elements import ELEMENT_TYPES
from .._typing import Values

SCALE_BYTES = 4  # size of the float32 scale of a row of codes


@dataclass(frozen=True)
class Options:
    """A workload's arguments of `selfattn.attention` apart from q, k and v.

    Attributes
    ----------
    causal : bool
    window : tuple of (int or None), optional
    softcap : float, optional
    mask : {"none", "pairs", "tiles", "keys"}
        "pairs" is a random mask of shape (1, 1, q_len, kv_len). "tiles" has the same shape; every fourth square of
        256 x 256 pairs is visible. "keys" passes `kv_lens` as a mask of shape (batch, 1, 1, kv_len), as tokenizers do.
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
        """Rebuild options from the result of `dataclasses.asdict`, also if it went through JSON."""
        values = dict(record)
        for name in ("window", "kv_lens"):
            if values[name] is not None:
                values[name] = tuple(values[name])
        return cls(**values)


@dataclass(frozen=True)
class Cache:
    """The cache that holds a workload's keys and values, and how the call uses it.

    Attributes
    ----------
    dtype : str, optional
        Storage dtype of the tokens; by default the workload's.
    page_size : int
        Tokens per page of a PagedKVCache, whose pages are in random order; 0 for a KVCache.
    shared : int
        Number of leading tokens that all sequences share, as forks of one prompt.
    cascade : bool
        Whether the call uses ``cascade=True``, to read the shared tokens once for all sequences.
    step : bool
        Whether the call also appends the last token, and writes to an `out`.
    values : {"own", "prefix"}
        "prefix": the values are the first numbers of the keys, stored once.
    """

    dtype: str | None = None
    page_size: int = 0
    shared: int = 0
    cascade: bool = False
    step: bool = False
    values: Values = "own"

    def storage(self, dtype: str) -> Any:
        """Return the name of the storage dtype for operands of `dtype`."""
        return self.dtype or dtype

    def row_bytes(self, dtype: str, width: int) -> int:
        """Bytes of a row of `width` stored numbers, and of its scale if it has one."""
        stored = ELEMENT_TYPES[self.storage(dtype)]
        return stored.row_bytes(width) + (SCALE_BYTES if stored.codes else 0)
