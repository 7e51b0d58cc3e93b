"""Dropout in the integrations with PyTorch."""

from __future__ import annotations

from typing import Any

import torch

from .._attention import attention

_SUPPORTED = "dropout" in (attention.__kwdefaults__ or {})


def dropout_options(function: str, name: str, rate: float) -> dict[str, Any]:
    """Return the options of a call whose argument `name` is the rate; empty for 0.

    The seed comes from PyTorch's generator, whose state activation checkpointing restores before it repeats a call.
    """
    if rate == 0:
        return {}
    if not _SUPPORTED:
        raise ValueError(f"{function}: {name} is {rate!r}, but there is no dropout yet: pass 0.0")
    return {"dropout": float(rate), "seed": torch.randint((1 << 63) - 1, ())}
