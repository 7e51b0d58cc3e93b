"""BERT's layers, and how to read them from tensors with transformers' names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from nn import Array, LayerNorm, gelu, gelu_tanh, linear

import selfattn as sa

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "relu": lambda x: np.maximum(x, 0),
}


@dataclass(frozen=True)
class Linear:
    """Returns x @ weight + bias. `invariant`: a row's result is bit-identical whatever the other rows are (slower)."""

    weight: Array
    bias: Array
    invariant: bool

    def __call__(self, x: Array) -> Array:
        return linear(x, self.weight, self.bias) if self.invariant else np.asarray(x @ self.weight + self.bias)


@dataclass(frozen=True)
class Block:
    """One layer: x = norm(x + attention(x)); x = norm(x + feed_forward(x))."""

    num_heads: int
    qkv: Linear  # the three projections in one matrix
    output: Linear
    attention_norm: LayerNorm
    inner: Linear
    activation: Callable[[Array], Array]
    outer: Linear
    output_norm: LayerNorm

    def padded(self, x: Array, lengths: Array, return_weights: bool) -> tuple[Array, Array | None]:
        """Return the block's result for x (B, S, hidden), whose rows end at `lengths`."""
        found = self._layer(x, kv_lens=lengths, return_weights=return_weights)
        attended, weights = found if return_weights else (found, None)
        return self._feed_forward(x + attended), weights

    def ragged(self, x: Array, starts: Array) -> Array:
        """Return the same for sequences that follow one another without padding: x (total, hidden)."""
        q, k, v = (part.reshape(len(x), self.num_heads, -1) for part in np.split(self.qkv(x), 3, axis=1))
        heads = sa.attention_varlen(q, k, v, starts)
        return self._feed_forward(x + self.output(heads.reshape(x.shape)))

    @cached_property
    def _layer(self) -> sa.SelfAttention:  # packs its own copy of the weights, so only made for padded calls
        w_q, w_k, w_v = np.split(self.qkv.weight, 3, axis=1)
        b_q, b_k, b_v = np.split(self.qkv.bias, 3)
        w_o, b_o = self.output.weight, self.output.bias
        return sa.SelfAttention(w_q, w_k, w_v, w_o, b_q=b_q, b_k=b_k, b_v=b_v, b_o=b_o, num_heads=self.num_heads)

    def _feed_forward(self, x: Array) -> Array:
        x = self.attention_norm(x)
        return self.output_norm(x + self.outer(self.activation(self.inner(x))))


class Weights:
    """Tensors under transformers' names, in float32."""

    def __init__(self, tensors: Mapping[str, Array], epsilon: float, invariant: bool) -> None:
        # The first checkpoints call a layer norm's weight gamma and its bias beta.
        old = {"gamma": "weight", "beta": "bias"}
        self.tensors: dict[str, Array] = {}
        for name, tensor in tensors.items():
            stem, _, last = name.removeprefix("bert.").rpartition(".")
            self.tensors[f"{stem}.{old.get(last, last)}"] = tensor
        self.epsilon, self.invariant = epsilon, invariant

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __getitem__(self, name: str) -> Array:
        if name not in self.tensors:
            raise ValueError(f"the weights have no {name!r}: they are not BERT's")
        return np.asarray(self.tensors[name], dtype=np.float32)

    def norm(self, name: str) -> LayerNorm:
        return LayerNorm(self[f"{name}.weight"], self[f"{name}.bias"], self.epsilon)

    def linear(self, *names: str) -> Linear:
        # PyTorch's Linear keeps (out, in); x @ w wants (in, out).
        weight = np.concatenate([self[f"{name}.weight"] for name in names]).T
        return Linear(weight, np.concatenate([self[f"{name}.bias"] for name in names]), self.invariant)

    def block(self, name: str, num_heads: int, activation: Callable[[Array], Array]) -> Block:
        return Block(
            num_heads,
            self.linear(*(f"{name}.attention.self.{part}" for part in ("query", "key", "value"))),
            self.linear(f"{name}.attention.output.dense"),
            self.norm(f"{name}.attention.output.LayerNorm"),
            self.linear(f"{name}.intermediate.dense"),
            activation,
            self.linear(f"{name}.output.dense"),
            self.norm(f"{name}.output.LayerNorm"),
        )
