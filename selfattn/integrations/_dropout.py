"""Dropout in the integrations with PyTorch."""

from __future__ import annotations

from typing import Any

import torch

from .._arguments import integer_in, real


def dropout_options(function: str, name: str, rate: float, seed: int | None = None) -> dict[str, Any]:
    """Return the options for dropout, given the argument `name`, which is the rate; no options if the rate is 0.

    If no seed is given, PyTorch's generator provides one. Activation checkpointing restores the generator's state
    before it repeats a call.
    """
    if type(rate) is float and rate == 0 and seed is None:  # most calls
        return {}
    if seed is not None:
        seed = integer_in(function, "seed", seed, 0, (1 << 64) - 1)
    if not torch.compiler.is_compiling():
        rate = real(function, name, rate)
    if rate == 0:
        return {}
    if not 0 < rate < 1:
        raise ValueError(f"{function}: {name} is {rate!r}, but it must be at least 0 and less than 1")
    if seed is None:
        return {"dropout": float(rate), "seed": torch.randint((1 << 63) - 1, ())}
    return {"dropout": float(rate), "seed": torch.tensor(seed - (seed >> 63 << 64))}  # the same 64 bits
