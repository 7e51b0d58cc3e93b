"""Layers that choose the keys of each query: by index, or by the blocks of an indexer."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ._tensors import to_array

# How many times as long chosen keys take, each of them, as the keys of a call with a mask: measured for a single query,
# and for many queries with a KV head for each query head.
COST = {"single": 2, "many": 24}


def on_cpu(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor, or raise if it is on another device."""
    if not tensor.is_cpu:
        raise ValueError(f"selfattn: {name} is on device {tensor.device}, but only CPU tensors are accepted")
    return tensor


def as_array(name: str, tensor: torch.Tensor) -> NDArray[Any]:
    """Return an array that shares the tensor's memory."""
    return to_array(on_cpu(name, tensor))


def check_shape(name: str, tensor: torch.Tensor, *needed: int | None) -> None:
    """Raise unless the tensor has the needed shape; None matches any length."""
    if tensor.ndim != len(needed) or any(n not in (None, size) for n, size in zip(needed, tensor.shape, strict=True)):
        axes = ", ".join("any" if n is None else str(n) for n in needed)
        raise ValueError(f"selfattn: {name} has shape {tuple(tensor.shape)}, but ({axes}) is needed")


def _check_numbers(name: str, chosen: torch.Tensor, count: int, kind: str) -> None:
    """Raise unless all numbers are integers below `count`."""
    if as_array(name, chosen).dtype.kind != "i":
        raise TypeError(f"selfattn: {name} has dtype {chosen.dtype}, but integers are needed")
    if chosen.numel() and chosen.max() >= count:
        raise ValueError(f"selfattn: {name} has {chosen.max()}, but there are {count} {kind}")


class Selection(NamedTuple):
    """The keys that each query sees besides what a mask says."""

    indices: torch.Tensor | None  # (B, Sq, n); negative indices name no key
    blocks: torch.Tensor | None  # (B, KV heads, Sq, n), of the layer's indexer; negative indices name no block
    indexer: Any  # or None

    @classmethod
    def of(
        cls, module: Any, indices: torch.Tensor | None, blocks: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor
    ) -> Selection | None:
        """Return the selection of a layer, or None if it does not select keys."""
        if indices is None and blocks is None:
            return None
        batch, q_len, kv_len = max(q.shape[0], k.shape[0]), q.shape[2], k.shape[2]
        indexer: Any = getattr(module, "indexer", None)
        if indices is not None:
            check_shape("indices", indices, batch, q_len, None)
            _check_numbers("indices", indices, kv_len, "keys")
        if blocks is not None:
            if not hasattr(indexer, "block_size"):
                text = f"block_indices is given, but {type(module).__name__} has no indexer to read it"
                raise TypeError(f"selfattn: {text}")
            check_shape("block_indices", blocks, batch, None, q_len, None)
            _check_numbers("block_indices", blocks, -(-kv_len // indexer.block_size), "blocks")
        return cls(indices, blocks, indexer)

    def options(self, kv_heads: int, kv_len: int) -> dict[str, Any] | None:
        """Return the options of `attention` that read no other keys, or None if a mask takes less time.

        `kv_len` is the number of the keys that may be visible at all.
        """
        if self.blocks is None:
            if self.indices is None or self.indices.shape[2] * _cost(self.indices) > kv_len:
                return None
            return {"key_indices": _below(as_array("indices", self.indices)[:, None], kv_len)}
        size = self.indexer.block_size
        if self.indices is not None or self.blocks.shape[1] != kv_heads:
            return None
        if self.blocks.shape[3] * size * _cost(self.blocks) > kv_len:
            return None
        return {"block_indices": _below(as_array("block_indices", self.blocks), -(-kv_len // size)), "block_size": size}

    def mask(self, heads: int, kv_len: int) -> NDArray[np.bool_]:
        """Return a mask (B, 1 or H, Sq, Sk) of the selected keys."""
        keep: Any = True
        if self.indices is not None:
            keep = _named(as_array("indices", self.indices)[:, None], kv_len)
        if self.blocks is not None:
            size = self.indexer.block_size
            chosen = as_array("block_indices", self.blocks)
            by_block = np.repeat(_named(chosen, -(-kv_len // size)), size, axis=-1)[..., :kv_len]
            keep = keep & np.repeat(by_block, heads // chosen.shape[1], axis=1)
        return np.asarray(keep)


def _cost(chosen: torch.Tensor) -> int:
    return COST["single" if chosen.shape[-2] == 1 else "many"]


def _below(chosen: NDArray[Any], count: int) -> NDArray[Any]:
    return np.where((chosen < 0) | (chosen >= count), -1, chosen)


def _named(chosen: NDArray[Any], count: int) -> NDArray[np.bool_]:
    """Return for each number below `count` whether a row (..., n) names it."""
    keep = np.zeros((*chosen.shape[:-1], count + 1), dtype=bool)
    np.put_along_axis(keep, np.where(_below(chosen, count) < 0, count, chosen), True, axis=-1)
    return keep[..., :count]
