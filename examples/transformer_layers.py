"""The parts of the Transformer: embeddings with positions, and both sides' layers, which attend through selfattn."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from cross_attention import CrossAttention, Memory
from nn import Array, LayerNorm, gelu, relu, sinusoids

import selfattn as sa

ACTIVATIONS = {"relu": relu, "gelu": gelu}
NORM_EPSILON = 1e-5
MAX_LENGTH = 512


@dataclass(frozen=True)
class Config:
    """The settings that do not follow from the weights."""

    kind: str = "marian"
    layers: int = 3
    width: int = 128
    heads: int = 4
    activation: str = "relu"


class Layer:
    """The parts of both sides' layers: self-attention and a feed-forward network, with the library's weight names."""

    def __init__(self, weights: dict[str, Array], name: str, config: Config) -> None:
        self.weights, self.name = weights, name
        (w_q, b_q), (w_k, b_k), (w_v, b_v), (w_o, b_o) = self.projections("self_attn")
        biases = {"b_q": b_q, "b_k": b_k, "b_v": b_v, "b_o": b_o}
        self.attention = sa.SelfAttention(w_q, w_k, w_v, w_o, **biases, num_heads=config.heads)
        self.attention_norm = self.norm("self_attn_layer_norm")
        self.into, self.out_of = self.linear("fc1"), self.linear("fc2")
        self.activation, self.feed_forward_norm = ACTIVATIONS[config.activation], self.norm("final_layer_norm")

    def linear(self, part: str) -> tuple[Array, Array]:
        return self.weights[f"{self.name}.{part}.weight"].T, self.weights[f"{self.name}.{part}.bias"]

    def norm(self, part: str) -> LayerNorm:
        names = (f"{self.name}.{part}.{kind}" for kind in ("weight", "bias"))
        return LayerNorm(*(self.weights[name] for name in names), NORM_EPSILON)

    def projections(self, part: str) -> list[tuple[Array, Array]]:
        """Return matrix and bias for queries, keys, values and the output."""
        return [self.linear(f"{part}.{name}") for name in ("q_proj", "k_proj", "v_proj", "out_proj")]

    def feed_forward(self, x: Array) -> Array:
        (w_in, b_in), (w_out, b_out) = self.into, self.out_of
        return self.feed_forward_norm(x + (self.activation(x @ w_in + b_in) @ w_out + b_out))


class EncoderLayer(Layer):
    """x = norm(x + attention(x)); x = norm(x + feed_forward(x))."""

    def __call__(self, x: Array, lengths: Array) -> Array:
        return self.feed_forward(self.attention_norm(x + self.attention(x, kv_lens=lengths)))


class DecoderLayer(Layer):
    """The same, with x = norm(x + cross_attention(x, source)) between the two."""

    def __init__(self, weights: dict[str, Array], name: str, config: Config) -> None:
        super().__init__(weights, name, config)
        self.cross = CrossAttention(*self.projections("encoder_attn"), num_heads=config.heads)
        self.cross_norm = self.norm("encoder_attn_layer_norm")

    def __call__(self, x: Array, memory: Memory, cache: sa.KVCache | None) -> Array:
        """Return the output of the newest tokens; without a cache they are all tokens."""
        attended = self.attention(x, causal=True) if cache is None else self.attention(x, cache=cache)
        x = self.attention_norm(x + attended)
        return self.feed_forward(self.cross_norm(x + self.cross(x, memory)[0]))


class Embedding:
    """Word vectors plus position vectors, which are computed or, in BART, learned."""

    def __init__(self, weights: dict[str, Array], side: str, config: Config) -> None:
        self.words = weights["model.shared.weight"]
        self.norm: LayerNorm | None = None
        if config.kind == "bart":
            self.scale, self.positions = 1.0, weights[f"model.{side}.embed_positions.weight"][2:]  # two rows are unused
            name = f"model.{side}.layernorm_embedding"
            self.norm = LayerNorm(weights[f"{name}.weight"], weights[f"{name}.bias"], NORM_EPSILON)
        else:
            rates = 10000.0 ** (-np.arange(0, config.width, 2) / config.width)
            self.scale, self.positions = math.sqrt(config.width), sinusoids(np.arange(MAX_LENGTH), rates)

    def __call__(self, ids: Array, start: int = 0) -> Array:
        """Return vectors (B, T, width) for tokens (B, T), the first of which are at position `start`."""
        x: Array = self.words[ids] * np.float32(self.scale) + self.positions[start : start + ids.shape[1]]
        return x if self.norm is None else self.norm(x)
