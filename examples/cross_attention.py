"""Cross-attention for decoders: keys and values of the encoder's output are computed once and read at every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from nn import Array

import selfattn as sa


@dataclass(frozen=True)
class Memory:
    """Keys and values of a padded batch of sources."""

    k: Array  # (B, S, H, D)
    v: Array
    lengths: Array  # (B,)

    def take(self, rows: Array) -> Memory:
        """Return the memory of some sentences of the batch."""
        return Memory(self.k[rows], self.v[rows], self.lengths[rows])


class CrossAttention:
    """Attention whose queries come from the decoder, and keys and values from the encoder."""

    def __init__(
        self,
        queries: tuple[Array, Array],
        keys: tuple[Array, Array],
        values: tuple[Array, Array],
        output: tuple[Array, Array],
        num_heads: int,
    ) -> None:
        """Take a matrix (in, out) and a bias for each of the four projections."""
        self.queries, self.keys, self.values, self.output = queries, keys, values, output
        self.num_heads = num_heads

    def memory(self, encoded: Array, lengths: Array) -> Memory:
        """Return the keys and values of the encoder's output (B, S, width), which all steps need."""
        return Memory(self._heads(encoded, self.keys), self._heads(encoded, self.values), lengths)

    def __call__(self, x: Array, memory: Memory, return_weights: bool = False) -> tuple[Array, Array | None]:
        """Return the output (B, T, width) for x (B, T, width), and the attention weights (B, H, T, S) if wanted."""
        q = self._heads(x, self.queries)
        options: dict[str, Any] = {"kv_lens": memory.lengths, "layout": "bshd", "return_weights": return_weights}
        attended = sa.attention(q, memory.k, memory.v, **options)
        heads, weights = attended if return_weights else (attended, None)
        weight, bias = self.output
        return heads.reshape(*x.shape[:-1], -1) @ weight + bias, weights

    def _heads(self, x: Array, projection: tuple[Array, Array]) -> Array:
        weight, bias = projection
        y: Array = np.asarray(x @ weight + bias)
        return y.reshape(*x.shape[:-1], self.num_heads, -1)
