"""Layers that choose the keys of each query: by index, or by the blocks of an indexer."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ._tensors import to_array


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


def selected(indices: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> NDArray[np.bool_]:
    """Return a mask (B, 1, Sq, Sk) of the keys with the given indices (B, Sq, n); negative indices are ignored."""
    batch, q_len, kv_len = max(query.shape[0], key.shape[0]), query.shape[2], key.shape[2]
    check_shape("indices", indices, batch, q_len, None)
    chosen = as_array("indices", indices)
    if chosen.dtype.kind != "i":
        raise TypeError(f"selfattn: indices has dtype {indices.dtype}, but integers are needed")
    if chosen.size and chosen.max() >= kv_len:
        raise ValueError(f"selfattn: indices has {chosen.max()}, but there are {kv_len} keys")
    keep = np.zeros((batch, q_len, kv_len + 1), dtype=bool)
    np.put_along_axis(keep, np.where(chosen < 0, kv_len, chosen), True, axis=-1)
    return keep[:, None, :, :kv_len]


def selected_blocks(
    module: Any, block_indices: torch.Tensor, query: torch.Tensor, key: torch.Tensor
) -> NDArray[np.bool_]:
    """Return a mask (B, H, Sq, Sk) of the keys in the given blocks, built by the layer's indexer."""
    build = getattr(getattr(module, "indexer", None), "build_block_mask", None)
    if build is None:
        raise TypeError(f"selfattn: block_indices is given, but {type(module).__name__} has no indexer to read it")
    check_shape("block_indices", block_indices, max(query.shape[0], key.shape[0]), None, query.shape[2], None)
    everything = torch.ones((1, 1, 1, 1), dtype=torch.bool)
    numbers = build(block_indices, everything, key.shape[2], torch.float32, key.device, None)
    keep: NDArray[np.bool_] = as_array("block_indices", numbers == 0)
    return keep


def keep_selected(options: dict[str, Any], chosen: NDArray[np.bool_], kv_len: int) -> None:
    """Also hide the keys that are not selected, among the first `kv_len` keys."""
    mask = chosen[..., :kv_len]
    options["mask"] = options["mask"] & mask if "mask" in options else mask
