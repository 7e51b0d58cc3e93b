"""BERT's layers, and code that reads them from tensors with transformers' names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from nn import Array

import selfattn as sa

# transformers' names of the feed-forward networks' activations
ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}


@dataclass(frozen=True)
class Block:
    """One layer: x = norm(x + attention(x)); x = norm(x + feed_forward(x)).

    A token's result is bit-identical whatever other sequences are in the batch.
    """

    num_heads: int
    qkv: tuple[Array, Array]  # the weights and biases of the three projections, side by side
    output: tuple[Array, Array]
    attention_norm: sa.LayerNorm
    feed_forward: sa.FeedForward

    def padded(self, x: Array, lengths: Array, return_weights: bool) -> tuple[Array, Array | None]:
        """Return the block's result for x (B, S, hidden), whose rows end at `lengths`."""
        found = self._layer(x, residual=x, kv_lens=lengths, return_weights=return_weights)
        x, weights = found if return_weights else (found, None)
        return self.feed_forward(x, residual=x), weights

    def ragged(self, x: Array, starts: Array) -> Array:
        """Return the block's result for sequences that follow one another without padding: x (total, hidden)."""
        if len(starts) == 2:
            x = self._layer(x, residual=x)
            return self.feed_forward(x, residual=x)
        return self.rest(x, sa.attention_varlen(*self.heads(x), starts))

    def heads(self, x: Array) -> list[Array]:
        """Return queries, keys and values of x (total, hidden): each (total, heads, head_dim)."""
        return [part.reshape(len(x), self.num_heads, -1) for part in np.split(self._linears[0](x), 3, axis=1)]

    def rest(self, x: Array, attended: Array) -> Array:
        """Return the block's result for x, given the output of its attention (total, heads, head_dim)."""
        x = self._linears[1](attended.reshape(x.shape), residual=x)
        x = self.attention_norm(x, out=x)
        return self.feed_forward(x, residual=x)

    # Each of these objects packs its own copy of the weights, so it is made only when it is first used.
    @cached_property
    def _layer(self) -> sa.SelfAttention:
        (w_q, w_k, w_v), (b_q, b_k, b_v) = (np.split(part, 3, axis=-1) for part in self.qkv)
        options: dict[str, Any] = {"num_heads": self.num_heads, "post_norm": self.attention_norm}
        return sa.SelfAttention(w_q, w_k, w_v, self.output[0], b_q=b_q, b_k=b_k, b_v=b_v, b_o=self.output[1], **options)

    @cached_property
    def _linears(self) -> tuple[sa.Linear, sa.Linear]:
        return sa.Linear(*self.qkv), sa.Linear(*self.output)


class Weights:
    """Tensors under transformers' names, in one dtype."""

    def __init__(self, tensors: Mapping[str, Array], epsilon: float, dtype: Any = np.float32) -> None:
        # The first checkpoints call a layer norm's weight gamma and its bias beta.
        old = {"gamma": "weight", "beta": "bias"}
        self.tensors: dict[str, Array] = {}
        for name, tensor in tensors.items():
            stem, _, last = name.removeprefix("bert.").rpartition(".")
            self.tensors[f"{stem}.{old.get(last, last)}"] = tensor
        self.epsilon, self.dtype = epsilon, dtype

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __getitem__(self, name: str) -> Array:
        if name not in self.tensors:
            raise ValueError(f"the weights have no {name!r}: they are not BERT's")
        return np.asarray(self.tensors[name], dtype=self.dtype)

    def norm(self, name: str) -> sa.LayerNorm:
        return sa.LayerNorm(self[f"{name}.weight"], self[f"{name}.bias"], eps=self.epsilon)

    def linear(self, *names: str) -> tuple[Array, Array]:
        # PyTorch's Linear keeps (out, in); x @ w wants (in, out).
        weight = np.concatenate([self[f"{name}.weight"] for name in names]).T
        return weight, np.concatenate([self[f"{name}.bias"] for name in names])

    def block(self, name: str, num_heads: int, activation: str) -> Block:
        inner, outer = self.linear(f"{name}.intermediate.dense"), self.linear(f"{name}.output.dense")
        norm = self.norm(f"{name}.output.LayerNorm")
        return Block(
            num_heads,
            self.linear(*(f"{name}.attention.self.{part}" for part in ("query", "key", "value"))),
            self.linear(f"{name}.attention.output.dense"),
            self.norm(f"{name}.attention.output.LayerNorm"),
            sa.FeedForward(inner[0], outer[0], inner[1], outer[1], activation=ACTIVATIONS[activation], post_norm=norm),
        )
