"""Rotary embedding as the configurations of models describe it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ._arguments import flag, integer_in, real, whole_number
from ._errors import refusal
from ._frequencies import MOST_ROTATED, ROPE_TYPES

_NAME = "RoPE.from_config"
_COMMON = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved")
_OLD_NAMES = {"mrope": "default", "su": "longrope"}
_BASES = ("rope_theta", "rotary_emb_base", "global_rope_theta")
_LOCAL = ("rope_local_base_freq", "local_rope_theta")  # Gemma 3, ModernBERT
_OTHER_SECTIONS = ("ernie4_5_vl", "hunyuan_vl")
_TRAINED = "original_max_position_embeddings"
_LAYER_TYPES = ("full_attention", "sliding_attention")


class Rotary(NamedTuple):
    """The arguments of `RoPE`."""

    inv_freq: NDArray[np.float64]
    attention_scaling: float
    axes: list[int] | None
    interleaved: bool


def from_config(config: Any, layer_type: str | None, head_dim: int | None, seq_len: int | None) -> Rotary:
    """Return the rotary embedding that a configuration describes."""
    model = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(model, Mapping):
        raise refusal(TypeError, _NAME, "config", f" is a {type(config).__name__}, but a dict is needed")
    if layer_type is not None and not isinstance(layer_type, str):
        raise refusal(TypeError, _NAME, "layer_type", f" is {layer_type!r}, but a str is needed")
    if seq_len is not None:
        whole_number(_NAME, "seq_len", seq_len, 1)
    own = {key: value for key, value in _own(model, layer_type).items() if value is not None}
    kind = own.get("rope_type", own.get("type", "default"))
    kind = _OLD_NAMES.get(kind, kind) if isinstance(kind, str) else kind
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        raise refusal(
            ValueError, _NAME, "rope_type", f" is {kind!r}, but it must be one of {', '.join(map(repr, ROPE_TYPES))}"
        )
    compute, keys = ROPE_TYPES[kind]
    for key in own:
        if key not in (*_COMMON, *keys):
            known = ", ".join((*_COMMON, *keys))
            raise refusal(ValueError, _NAME, str(key), f" is not a key of rope_type {kind!r}, which has {known}")
    parameters = Parameters(own, model, kind, head_dim, seq_len)
    inv_freq, scaling = compute(parameters)
    axes = _axial_axes(len(inv_freq)) if kind == "axial" else _section_axes(parameters, len(inv_freq))
    return Rotary(inv_freq, scaling, axes, flag(_NAME, "rope_interleave", model.get("rope_interleave", False)))


def _own(model: Mapping[str, Any], layer_type: str | None) -> Mapping[str, Any]:
    """Return the rotary parameters of one type of layers."""
    name = "rope_scaling" if model.get("rope_scaling") is not None else "rope_parameters"
    own = model.get(name) or {}
    if not isinstance(own, Mapping):
        raise refusal(TypeError, _NAME, name, f" is {own!r}, but a dict is needed")
    if any(isinstance(value, Mapping) for value in own.values()):
        if layer_type not in own:
            raise _unknown_layer_type(layer_type, list(own))
        found = own[layer_type]
        if not isinstance(found, Mapping):
            raise refusal(ValueError, _NAME, "layer_type", f" is {layer_type!r}, which has no rotary embedding")
        return found
    # Before they had parameters for each type of layers, models had a key for the frequencies of local layers.
    local = next((key for key in _LOCAL if model.get(key) is not None), None)
    layer_types = list(model.get("layer_types") or _LAYER_TYPES)
    if layer_type not in layer_types and (layer_type is not None or local is not None):
        raise _unknown_layer_type(layer_type, layer_types)
    if local is not None and layer_type == "sliding_attention":
        return {**(own if local == "local_rope_theta" else {}), "rope_theta": model[local]}
    return own


def _unknown_layer_type(given: Any, known: list[str]) -> ValueError:
    return refusal(
        ValueError, _NAME, "layer_type", f" is {given!r}, but it must be one of {', '.join(map(repr, known))}"
    )


@dataclass(frozen=True)
class Parameters:
    """The parameters of one type of layers, and the model's configuration around them."""

    own: Mapping[str, Any]
    model: Mapping[str, Any]
    kind: str
    given_head_dim: int | None
    seq_len: int | None

    def number(self, key: str, default: float | None = None) -> float:
        """Return a parameter."""
        if key in self.own:
            return real(_NAME, key, self.own[key])
        if default is None:
            raise refusal(ValueError, _NAME, key, f" is missing, which rope_type {self.kind!r} needs")
        return default

    def positive(self, key: str, default: float | None = None) -> float:
        found = self.number(key, default)
        if found <= 0:
            raise refusal(ValueError, _NAME, key, f" is {self.own[key]!r}, but it must be greater than 0")
        return found

    def numbers(self, key: str) -> NDArray[np.float64]:
        """Return a parameter with one number for each pair."""
        given, pairs = self.own.get(key), (self.dim + 1) // 2
        if given is None:
            self.number(key)
        if not isinstance(given, (list, tuple)) or len(given) != pairs:
            raise refusal(ValueError, _NAME, key, f" is {given!r}, but a list of {pairs} numbers is needed")
        return np.array([real(_NAME, key, number) for number in given])

    def of_model(self, *keys: str) -> Any:
        """Return what the configuration has under one of several names; the last is the one to name if it has none."""
        for key in keys:
            if self.model.get(key) is not None:
                return self.model[key]
        raise refusal(ValueError, _NAME, keys[-1], f" is missing, which rope_type {self.kind!r} needs")

    @cached_property
    def base(self) -> float:
        found = next((self.model[key] for key in _BASES if self.model.get(key) is not None), 10000.0)
        base = real(_NAME, "rope_theta", self.own.get("rope_theta", found))
        if base <= 1:
            raise refusal(ValueError, _NAME, "rope_theta", f" is {base!r}, but it must be greater than 1")
        return base

    @cached_property
    def head_dim(self) -> int:
        if self.given_head_dim is not None:
            return integer_in(_NAME, "head_dim", self.given_head_dim, 2, MOST_ROTATED)
        if self.model.get("per_layer_config") or self.model.get("global_head_dim"):
            text = " is needed, because this model has layers with heads of different sizes"
            raise refusal(ValueError, _NAME, "head_dim", text)
        for key in ("qk_rope_head_dim", "head_dim"):
            if self.model.get(key):
                return integer_in(_NAME, key, self.model[key], 2, MOST_ROTATED)
        width = whole_number(_NAME, "hidden_size", self.of_model("embed_dim", "n_embd", "hidden_size"), 2)
        least = max(1, -(-width // MOST_ROTATED))
        heads = self.of_model("num_heads", "n_head", "num_attention_heads")
        return width // integer_in(_NAME, "num_attention_heads", heads, least, width // 2)

    @cached_property
    def rotated_part(self) -> float | None:
        found = self.own.get("partial_rotary_factor")
        for key in ("partial_rotary_factor", "rotary_pct"):
            found = self.model.get(key) if found is None else found
        part = None if found is None else real(_NAME, "partial_rotary_factor", found)
        if part is not None and not 2 <= part * self.head_dim <= self.head_dim:
            text = f" is {part!r}, which rotates {part * self.head_dim} of {self.head_dim} elements of a head"
            raise refusal(ValueError, _NAME, "partial_rotary_factor", text)
        return part

    @cached_property
    def dim(self) -> int:
        """Return how many elements of a head are rotated."""
        if self.rotated_part is not None:
            return int(self.head_dim * self.rotated_part)
        given = self.model.get("rotary_dim")
        return self.head_dim if given is None else integer_in(_NAME, "rotary_dim", given, 2, self.head_dim)

    @cached_property
    def longest(self) -> int:
        return whole_number(
            _NAME, "max_position_embeddings", self.of_model("n_positions", "max_position_embeddings"), 2
        )

    @cached_property
    def trained(self) -> int:
        """Return the length of sequences in the first training."""
        found = self._trained
        return self.longest if found is None else whole_number(_NAME, _TRAINED, found, 2)

    @property
    def _trained(self) -> Any:
        return self.own.get(_TRAINED) if self.model.get(_TRAINED) is None else self.model[_TRAINED]

    @cached_property
    def stretch(self) -> float:
        """Return how many times longer sequences may be now."""
        if "factor" in self.own or self._trained is None:
            return self.positive("factor")
        return self.longest / self.trained


def _axial_axes(pairs: int) -> list[int]:
    return [2 * i // pairs for i in range(pairs)]


def _section_axes(p: Parameters, pairs: int) -> list[int] | None:
    """Return the coordinate that rotates each pair (Qwen-VL's M-RoPE), or None if there is only one."""
    sizes = p.own.get("mrope_section")
    if sizes is None:
        return None
    family = str(p.model.get("model_type", ""))
    if family.startswith(_OTHER_SECTIONS):
        text = f" is arranged in another way by {family}: pass axes to RoPE"
        raise refusal(ValueError, _NAME, "mrope_section", text)
    if not isinstance(sizes, (list, tuple)) or sum(_section(size, pairs) for size in sizes) != pairs:
        text = f" is {sizes!r}, but a list of integers with sum {pairs} is needed"
        raise refusal(ValueError, _NAME, "mrope_section", text)
    if not flag(_NAME, "mrope_interleaved", p.own.get("mrope_interleaved", False)):
        return [axis for axis, size in enumerate(sizes) for _ in range(size)]
    count = len(sizes)
    return [i % count if i < count * sizes[i % count] else 0 for i in range(pairs)]


def _section(size: Any, pairs: int) -> int:
    return integer_in(_NAME, "mrope_section", size, 0, pairs)
