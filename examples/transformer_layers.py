"""The parts of the Transformer: embeddings with positions, and both sides' layers, which attend through selfattn."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from cross_attention import CrossAttention, Memory
from nn import Array, sinusoids

import selfattn as sa

NORM_EPSILON = 1e-5
MAX_LENGTH = 512


@dataclass(frozen=True)
class Config:
    """The settings that do not follow from the weights."""

    kind: str = "marian"
    layers: int = 3
    width: int = 128
    heads: int = 4
    activation: Any = "relu"


class Layer:
    """The parts of both sides' layers: self-attention and a feed-forward network, with the library's weight names."""

    def __init__(self, weights: dict[str, Array], name: str, config: Config) -> None:
        self.weights, self.name = weights, name
        (w_q, b_q), (w_k, b_k), (w_v, b_v), (w_o, b_o) = self.projections("self_attn")
        biases = {"b_q": b_q, "b_k": b_k, "b_v": b_v, "b_o": b_o}
        after = self.norm("self_attn_layer_norm")
        self.attention = sa.SelfAttention(w_q, w_k, w_v, w_o, **biases, num_heads=config.heads, post_norm=after)
        (w_1, b_1), (w_2, b_2) = self.linear("fc1"), self.linear("fc2")
        last = self.norm("final_layer_norm")
        self.feed_forward = sa.FeedForward(w_1, w_2, b_1, b_2, activation=config.activation, post_norm=last)

    def linear(self, part: str) -> tuple[Array, Array]:
        return self.weights[f"{self.name}.{part}.weight"].T, self.weights[f"{self.name}.{part}.bias"]

    def norm(self, part: str) -> sa.LayerNorm:
        names = (f"{self.name}.{part}.{kind}" for kind in ("weight", "bias"))
        return sa.LayerNorm(*(self.weights[name] for name in names), eps=NORM_EPSILON)

    def projections(self, part: str) -> list[tuple[Array, Array]]:
        """Return matrix and bias for queries, keys, values and the output."""
        return [self.linear(f"{part}.{name}") for name in ("q_proj", "k_proj", "v_proj", "out_proj")]


class EncoderLayer(Layer):
    """x = norm(x + attention(x)); x = norm(x + feed_forward(x))."""

    def __call__(self, x: Array, lengths: Array) -> Array:
        x = self.attention(x, residual=x, kv_lens=lengths)
        return self.feed_forward(x, residual=x)


class DecoderLayer(Layer):
    """An encoder's layer with x = norm(x + cross_attention(x, source)) between its two steps."""

    def __init__(self, weights: dict[str, Array], name: str, config: Config) -> None:
        super().__init__(weights, name, config)
        self.cross = CrossAttention(*self.projections("encoder_attn"), num_heads=config.heads)
        self.cross_norm = self.norm("encoder_attn_layer_norm")

    def __call__(self, x: Array, memory: Memory, cache: sa.KVCache | None) -> Array:
        """Return the output of the newest tokens; without a cache they are all tokens."""
        x = self.attention(x, residual=x, causal=True, cache=cache)
        x = self.cross_norm(x, residual=self.cross(x, memory)[0])
        return self.feed_forward(x, residual=x)


class Embedding:
    """Word vectors plus position vectors, which are computed or, in BART, learned."""

    def __init__(self, weights: dict[str, Array], side: str, config: Config) -> None:
        self.words = weights["model.shared.weight"]
        self.norm: sa.LayerNorm | None = None
        if config.kind == "bart":
            self.scale, self.positions = 1.0, weights[f"model.{side}.embed_positions.weight"][2:]  # two rows are unused
            name = f"model.{side}.layernorm_embedding"
            self.norm = sa.LayerNorm(weights[f"{name}.weight"], weights[f"{name}.bias"], eps=NORM_EPSILON)
        else:
            rates = 10000.0 ** (-np.arange(0, config.width, 2) / config.width)
            self.scale, self.positions = math.sqrt(config.width), sinusoids(np.arange(MAX_LENGTH), rates)

    def __call__(self, ids: Array, start: int = 0) -> Array:
        """Return vectors (B, T, width) for tokens (B, T), the first of which are at position `start`."""
        x: Array = self.words[ids] * np.float32(self.scale) + self.positions[start : start + ids.shape[1]]
        return x if self.norm is None else self.norm(x)
