"""The language models that llm.py knows: how they differ, and the settings of one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import llm_latent as latent
import llm_layers as layers
import numpy as np
from llm_weights import Weights

import selfattn as sa

ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}


@dataclass(frozen=True)
class Mixture:
    """How a family's experts are named in the file, chosen and weighted."""

    route: Callable[..., Any]
    router: str = "gate"
    shared: str = "shared_experts."
    scales_input: bool = False  # multiply what goes into an expert, not what comes out


@dataclass(frozen=True)
class Family:
    """How the models of a type differ from Llama's.

    What a model's file shows is not here: biases, norms of queries and keys, fused matrices, which layers have experts,
    and a head of its own.
    """

    # The norms before attention, after it, before the feed-forward part, and after it
    norms: tuple[str, str, str, str] = ("input_layernorm", "", "post_attention_layernorm", "")
    norm_offset: float = 0.0  # what is added to the weights of norms
    scaled_embedding: bool = False  # multiply token vectors by the square root of their size
    attention: Callable[..., Any] = layers.plain_attention
    feed_forward: str = "mlp."
    experts: Mixture | None = None
    interleaved: bool = False  # whether the rotation pairs adjacent elements, if the file does not say it
    interleaved_index: bool = False  # the same of the index by which queries choose keys
    full: str = "full_attention"  # the name of layers whose queries may see all tokens before their own
    # Layers that see only near tokens: their name, the key of their size, and which they are if the file does not say
    local: tuple[str, str] = ("sliding_attention", "sliding_window")
    is_local: Callable[[Mapping[str, Any], int], bool] = lambda values, layer: True


AROUND = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
AFTER = ("", "post_attention_layernorm", "", "post_feedforward_layernorm")
GEMMA: dict[str, Any] = {"norms": AROUND, "norm_offset": 1.0, "scaled_embedding": True}
CHOSEN: dict[str, Any] = {"attention": latent.ChosenAttention, "full": "indexed_attention", "interleaved": True}
CHOSEN |= {"experts": Mixture(layers.deepseek3_route)}
QWEN: dict[str, Any] = {"is_local": lambda values, layer: layer >= values["max_window_layers"]}
FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(**QWEN),
    "qwen3": Family(**QWEN),
    "qwen3_moe": Family(experts=Mixture(layers.qwen3_route)),
    "gemma2": Family(**GEMMA, is_local=lambda values, layer: layer % 2 == 0),
    "gemma3_text": Family(**GEMMA, is_local=lambda values, layer: (layer + 1) % values["sliding_window_pattern"] != 0),
    "phi3": Family(),
    "olmo2": Family(norms=AFTER),
    "llama4_text": Family(
        attention=layers.llama4_attention,
        feed_forward="feed_forward.",
        experts=Mixture(layers.llama4_route, "router", "shared_expert.", scales_input=True),
        interleaved=True,
        local=("chunked_attention", "attention_chunk_size"),
        is_local=lambda values, layer: bool(values["no_rope_layers"][layer]),
    ),
    "deepseek_v2": Family(attention=latent.LatentAttention, experts=Mixture(layers.deepseek2_route), interleaved=True),
    "deepseek_v3": Family(attention=latent.LatentAttention, experts=Mixture(layers.deepseek3_route), interleaved=True),
    "deepseek_v32": Family(**CHOSEN),
    "glm_moe_dsa": Family(**CHOSEN, interleaved_index=True),
}


class Values(dict[str, Any]):
    """What config.json says."""

    def __missing__(self, key: str) -> Any:
        raise ValueError(f"{key} is missing in config.json")


class Config:
    """The settings of a model, for texts of at most `length` tokens (the frequencies of longrope depend on it)."""

    def __init__(self, values: Mapping[str, Any], length: int | None = None) -> None:
        kind = values.get("model_type")
        if kind not in FAMILIES:
            raise ValueError(f"model_type {kind!r} is none of {', '.join(FAMILIES)}")
        self.values, self.length = Values({"sliding_window_pattern": 6, **values}), length
        self.family: Any = FAMILIES[kind]
        self.layers, self.heads = self.values["num_hidden_layers"], self.values["num_attention_heads"]
        self.kv_heads = values.get("num_key_value_heads") or self.heads
        self.head_dim = values.get("head_dim") or self.values["hidden_size"] // self.heads
        self.scale = (values.get("query_pre_attn_scalar") or self.head_dim) ** -0.5
        self.epsilon = float(self.values["rms_norm_eps"])
        activation = values.get("hidden_activation") or values.get("hidden_act")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation {activation!r} is none of {', '.join(ACTIVATIONS)}")
        self.activation = ACTIVATIONS[activation]
        self.values["layer_types"] = self.layer_types()

    def layer_types(self) -> list[str]:
        """Return for each layer whether it sees all tokens before or only near ones."""
        given, full, (local, size) = self.values.get("layer_types"), self.family.full, self.family.local
        if not given:
            limited = self.values.get(size) and self.values.get("use_sliding_window", True)
            near = [limited and self.family.is_local(self.values, layer) for layer in range(self.layers)]
            return [local if one else full for one in near]
        if len(given) != self.layers or not set(given) <= {full, local}:
            raise ValueError(f"layer_types is {given}, but {self.layers} of {full} and {local} are needed")
        return list(given)

    def window(self, layer: int) -> int | None:
        """Return how many tokens before its own a layer's query may see; None: all."""
        full = self.values["layer_types"][layer] == self.family.full
        return None if full else int(self.values[self.family.local[1]]) - 1

    def chunk(self, layer: int) -> int | None:
        """Return a layer's chunk size, whose queries see only keys of their own chunk; None: it has no chunks."""
        chunked = self.values["layer_types"][layer] == "chunked_attention"
        return int(self.values["attention_chunk_size"]) if chunked else None

    def rope(self, layer: int) -> sa.RoPE | None:
        """Return the rotation of a layer's queries and keys, or None if it has none."""
        if not self.values.get("no_rope_layers", {layer: True})[layer]:
            return None
        interleaved = self.values.get("rope_interleave", self.family.interleaved)
        options: dict[str, Any] = {"layer_type": self.values["layer_types"][layer], "seq_len": self.length}
        return sa.RoPE.from_config(self.values, interleaved=interleaved, **options)

    def norm(self, weights: Weights, name: str, epsilon: float | None = None) -> sa.RMSNorm:
        """Return a norm of the file."""
        weight = weights[f"{name}.weight"].astype(np.float32) + self.family.norm_offset
        return sa.RMSNorm(weight, eps=self.epsilon if epsilon is None else epsilon)
