"""The decoder of GPT-2 (Radford et al., 2019): learned positions, norms before the sub-layers, GELU, tied embeddings.

By default it is small, with random weights, and each byte is a token. gpt2.py loads the weights of a model into it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from nn import Array

import selfattn as sa

VOCABULARY, MAX_LENGTH = 256, 2048
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu": "gelu", "relu": "relu", "silu": "silu"}  # GPT-2's names


@dataclass(frozen=True)
class Config:
    """The sizes and settings of a decoder."""

    layers: int = 4
    width: int = 256
    heads: int = 8
    kv_heads: int = 8
    vocabulary: int = VOCABULARY
    max_length: int = MAX_LENGTH
    activation: str = "gelu_new"
    epsilon: float = 1e-5
    scaled: bool = True  # multiply scores by 1 / sqrt(head_dim)
    scaled_by_layer: bool = False  # multiply scores of layer i by 1 / (i + 1) as well

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    def scale(self, layer: int) -> float:
        """Return the factor of a layer's scores."""
        scale = self.head_dim**-0.5 if self.scaled else 1.0
        return scale / (layer + 1) if self.scaled_by_layer else scale


def random_weights(config: Config, seed: int = 0) -> dict[str, Array]:
    """Return weights under the names that GPT-2 gives them, matrices ready for x @ w."""
    rng = np.random.default_rng(seed)
    width, qkv = config.width, config.width + 2 * config.kv_heads * config.head_dim
    weights = {"ln_f.weight": np.ones(width), "ln_f.bias": np.zeros(width)}

    def add(name: str, rows: int, columns: int) -> None:
        weights[f"{name}.weight"] = rng.standard_normal((rows, columns)) / np.sqrt(width)

    add("wte", config.vocabulary, width)
    add("wpe", config.max_length, width)
    for i in range(config.layers):
        for name in ("ln_1", "ln_2"):
            weights |= {f"h.{i}.{name}.weight": np.ones(width), f"h.{i}.{name}.bias": np.zeros(width)}
        shapes = {"attn.c_attn": (width, qkv), "attn.c_proj": (width, width)}
        shapes |= {"mlp.c_fc": (width, 4 * width), "mlp.c_proj": (4 * width, width)}
        for name, (rows, columns) in shapes.items():
            add(f"h.{i}.{name}", rows, columns)
            weights[f"h.{i}.{name}.bias"] = np.zeros(columns)
    return {name: weight.astype(np.float32) for name, weight in weights.items()}


def transformers_model(config: Config, seed: int = 0) -> Any:
    """Return a GPT2LMHeadModel of the same sizes, with random weights."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    if config.kv_heads != config.heads:
        raise ValueError("GPT-2 has as many KV heads as heads")
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"vocab_size": config.vocabulary, "n_positions": config.max_length, "n_embd": config.width}
    sizes |= {"n_layer": config.layers, "n_head": config.heads, "initializer_range": config.width**-0.5}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()


def transformers_weights(model: Any) -> dict[str, Array]:
    """Return a GPT2LMHeadModel's weights."""
    weights = {name: weight.numpy() for name, weight in model.transformer.state_dict().items()}
    return weights | {"lm_head.weight": model.lm_head.weight.detach().numpy()}


class Block:
    """x += attention(norm(x)); x += feed_forward(norm(x))."""

    def __init__(self, weights: dict[str, Array], layer: int, config: Config) -> None:
        def pair(part: str) -> tuple[Array, Array]:
            return weights[f"h.{layer}.{part}.weight"], weights[f"h.{layer}.{part}.bias"]

        kv_width = config.kv_heads * config.head_dim
        splits = [config.width, config.width + kv_width]
        w_qkv, b_qkv = pair("attn.c_attn")
        w_q, w_k, w_v = np.split(w_qkv, splits, axis=1)
        b_q, b_k, b_v = np.split(b_qkv, splits)
        w_o, b_o = pair("attn.c_proj")
        heads, kv_heads = config.heads, config.kv_heads
        before, between = (sa.LayerNorm(*pair(part), eps=config.epsilon) for part in ("ln_1", "ln_2"))
        options: dict[str, Any] = {"num_heads": heads, "num_kv_heads": kv_heads, "norm": before}
        self.attention = sa.SelfAttention(w_q, w_k, w_v, w_o, b_q=b_q, b_k=b_k, b_v=b_v, b_o=b_o, **options)
        (w_1, b_1), (w_2, b_2) = pair("mlp.c_fc"), pair("mlp.c_proj")
        activation: Any = ACTIVATIONS[config.activation]
        self.feed_forward = sa.FeedForward(w_1, w_2, b_1, b_2, activation=activation, norm=between)
        self.scale = config.scale(layer)

    def __call__(self, x: Array, **options: Any) -> Array:
        x = self.attention(x, residual=x, scale=self.scale, **options)
        return self.feed_forward(x, residual=x)


class Decoder:
    """The model: tokens in, logits of the next token out."""

    def __init__(self, config: Config, weights: dict[str, Array]) -> None:
        self.config = config
        self.token_vectors, self.position_vectors = weights["wte.weight"], weights["wpe.weight"]
        self.head = sa.Linear(weights.get("lm_head.weight", self.token_vectors).T)
        self.blocks = [Block(weights, i, config) for i in range(config.layers)]
        self.norm = sa.LayerNorm(weights["ln_f.weight"], weights["ln_f.bias"], eps=config.epsilon)

    def __call__(
        self, ids: Array, starts: Any = 0, caches: Sequence[Any] | None = None, sequences: Sequence[Any] | None = None
    ) -> Array:
        """Return logits (B, S, vocabulary) of tokens (B, S), the first of each row at its position in `starts`.

        Earlier tokens are in the caches, one per layer. For paged caches, `sequences` has the rows' ids.
        """
        positions = np.asarray(starts)[..., None] + np.arange(ids.shape[1])
        x = self.token_vectors[ids] + self.position_vectors[positions]
        for i, block in enumerate(self.blocks):
            if caches is None:
                x = block(x, causal=True)
            elif sequences is None:
                x = block(x, cache=caches[i])
            else:
                x = block(x, cache=caches[i], sequences=sequences[i])
        return self.head(self.norm(x))


def encode(text: str) -> Array:
    """Return the tokens of a text, its bytes in UTF-8."""
    return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)
