"""Frequencies of rotary embedding: the plain ones, and those of the `rope_type`s of transformers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ._arguments import flag
from ._errors import refusal

if TYPE_CHECKING:
    from ._rope_config import Parameters

_NAME = "RoPE.from_config"
MOST_ROTATED = 1 << 16  # elements of a head. A view can claim any size, and each pair takes a power in Python
_Found = tuple[NDArray[np.float64], float]  # for each pair the angle at position 1; the factor of rotated elements


def frequencies(base: float, dim: int) -> NDArray[np.float64]:
    """Return the angle of each pair at position 1."""
    # Python's power, because NumPy's may differ in the last bit between machines.
    return np.array([base ** (-2.0 * i / dim) for i in range((dim + 1) // 2)])


def _default(p: Parameters) -> _Found:
    return frequencies(p.base, p.dim), 1.0


def _linear(p: Parameters) -> _Found:
    return frequencies(p.base, p.dim) / p.positive("factor"), 1.0


def _dynamic(p: Parameters) -> _Found:
    """Raise the base so far that the slowest pair turns as far at `seq_len` as it does at the trained length."""
    factor, length = p.positive("factor"), max(p.seq_len or 0, p.longest)
    if p.dim < 4:
        raise refusal(ValueError, _NAME, "rope_type", f" is 'dynamic', but only {p.dim} elements of a head are rotated")
    growth = factor * length / p.longest - (factor - 1)
    return frequencies(p.base * growth ** (p.dim / (p.dim - 2)), p.dim), 1.0


def _yarn(p: Parameters) -> _Found:
    """Slow down pairs with fewer than `beta_slow` rotations in the trained length; keep those with many."""
    plain = frequencies(p.base, p.dim)

    def pair(rotations: float) -> float:
        return p.dim * math.log(p.trained / (rotations * 2 * math.pi)) / (2 * math.log(p.base))

    low, high = pair(p.positive("beta_fast", 32.0)), pair(p.positive("beta_slow", 1.0))
    if flag(_NAME, "truncate", p.own.get("truncate", True)):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, p.dim - 1)
    ramp = np.clip((np.arange(len(plain)) - low) / (high - low if high != low else 0.001), 0, 1)
    return plain / p.stretch * ramp + plain * (1 - ramp), p.positive("attention_factor", _magnitude(p))


def _magnitude(p: Parameters) -> float:
    def of(scale: float) -> float:
        return 1.0 if p.stretch <= 1 else 0.1 * scale * math.log(p.stretch) + 1

    if not p.own.get("mscale") or not p.own.get("mscale_all_dim"):
        return of(1)
    return of(p.positive("mscale")) / of(p.positive("mscale_all_dim"))


def _longrope(p: Parameters) -> _Found:
    factors = p.numbers("long_factor" if (p.seq_len or 0) > p.trained else "short_factor")
    scaling = 1.0 if p.stretch <= 1 else math.sqrt(1 + math.log(p.stretch) / math.log(p.trained))
    return frequencies(p.base, p.dim) / factors, p.positive("attention_factor", scaling)


def _llama3(p: Parameters) -> _Found:
    """Slow down the pairs of long wavelengths."""
    plain, factor = frequencies(p.base, p.dim), p.positive("factor")
    low, high = p.positive("low_freq_factor"), p.positive("high_freq_factor")
    if high <= low:
        text = f" is {high}, but it must be greater than "
        raise refusal(ValueError, _NAME, "high_freq_factor", text, "low_freq_factor", f", {low}")
    kept = np.clip((p.trained * plain / (2 * math.pi) - low) / (high - low), 0, 1)
    return plain * kept + plain / factor * (1 - kept), 1.0


def _proportional(p: Parameters) -> _Found:
    """Rotate the first pairs by the frequencies of whole heads, and the others not at all."""
    plain = frequencies(p.base, p.head_dim)[: p.head_dim // 2]
    plain[int((1.0 if p.rotated_part is None else p.rotated_part) * p.head_dim // 2) :] = 0
    return plain / p.positive("factor", 1.0), 1.0


def _axial(p: Parameters) -> _Found:
    """Rotate half of the pairs by the row of a patch, and the others by its column."""
    if p.dim % 4:
        text = f" is 'axial', but {p.dim} elements of a head are rotated: a multiple of 4 is needed"
        raise refusal(ValueError, _NAME, "rope_type", text)
    return np.tile(frequencies(p.base, p.dim // 2), 2), 1.0


_STRETCHED = ("factor", "original_max_position_embeddings", "attention_factor")
ROPE_TYPES: dict[str, tuple[Callable[[Parameters], _Found], tuple[str, ...]]] = {
    "default": (_default, ()),
    "linear": (_linear, ("factor",)),
    "dynamic": (_dynamic, ("factor",)),
    "yarn": (_yarn, (*_STRETCHED, "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")),
    "longrope": (_longrope, (*_STRETCHED, "short_factor", "long_factor")),
    "llama3": (_llama3, ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor")),
    "proportional": (_proportional, ("factor",)),
    "axial": (_axial, ()),
}
