"""The layers of language models from their weights: attention, gated feed-forward parts, and mixtures of experts.

A layer of attention is called with x, a cache and options; every layer adds `residual=` to its result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from llm_weights import Weights
from nn import Array, sigmoid

import selfattn as sa

if TYPE_CHECKING:
    from llm_config import Config

Norm = Any  # an RMSNorm, or None


def matrices(weights: Weights, names: Sequence[str], fused: str, sizes: Sequence[int]) -> list[tuple[Array, Any]]:
    """Return the matrices of projections, ready for x @ w, with their biases or None.

    A model may have them in one fused matrix; `sizes` says how many columns each has there.
    """
    if f"{fused}.weight" not in weights:
        return [(weights[f"{name}.weight"].T, weights.get(f"{name}.bias")) for name in names]
    cuts = np.cumsum(sizes)[:-1]
    bias = weights.get(f"{fused}.bias")
    biases = [None] * len(names) if bias is None else np.split(bias, cuts)
    return list(zip(np.split(weights[f"{fused}.weight"].T, cuts, axis=1), biases, strict=True))


def plain_attention(weights: Weights, config: Config, layer: int, norm: Norm, head_norm: Norm = None) -> Any:
    """Return a layer's attention. `head_norm` is the norm of queries and keys if the file has none."""
    sizes = [heads * config.head_dim for heads in (config.heads, config.kv_heads, config.kv_heads)]
    (w_q, b_q), (w_k, b_k), (w_v, b_v) = matrices(weights, ("q_proj", "k_proj", "v_proj"), "qkv_proj", sizes)
    counts: dict[str, Any] = {"num_heads": config.heads, "num_kv_heads": config.kv_heads}
    norms: dict[str, Any] = {
        name: config.norm(weights, name) if f"{name}.weight" in weights else head_norm for name in ("q_norm", "k_norm")
    }
    w_o, b_o = weights["o_proj.weight"].T, weights.get("o_proj.bias")
    biases = {"b_q": b_q, "b_k": b_k, "b_v": b_v, "b_o": b_o}
    return sa.SelfAttention(w_q, w_k, w_v, w_o, **biases, **counts, **norms, norm=norm, rope=config.rope(layer))


class ScaledByPosition:
    """Attention whose scale changes where the position + 1 is a multiple of `size`, so tokens are cut there."""

    def __init__(self, layer: sa.SelfAttention, scale: Callable[[int], float], size: int) -> None:
        self.layer, self.scale, self.size = layer, scale, size
        self.num_kv_heads, self.head_dim, self.value_dim = layer.num_kv_heads, layer.head_dim, layer.value_dim

    def __call__(self, x: Array, *, cache: sa.KVCache, residual: Array | None = None, **options: Any) -> Array:
        start = int(cache.lengths[0])
        end = start + x.shape[1]
        first = start + self.size - (start + 1) % self.size
        parts = []
        for a, b in pairwise([start, *range(first, end, self.size), end]):
            piece = x[:, a - start : b - start]
            parts.append(self.layer(piece, cache=cache, **options | {"scale": self.scale(a)}))
        y = np.concatenate(parts, axis=1)
        return y if residual is None else residual + y


def llama4_attention(weights: Weights, config: Config, layer: int, norm: Norm) -> Any:
    """Return Llama 4's attention. Layers with rotation are chunked; the others scale scores by the query's position."""
    values, rotated = config.values, config.rope(layer) is not None
    # In the model this norm follows the rotation, which changes no lengths.
    head_norm = sa.RMSNorm(eps=config.epsilon) if rotated and values["use_qk_norm"] else None
    attention = plain_attention(weights, config, layer, norm, head_norm)
    if rotated or not values["attn_temperature_tuning"]:
        return attention

    def scale(position: int) -> float:
        return config.scale * float(1.0 + np.log1p((position + 1) // values["floor_scale"]) * values["attn_scale"])

    return ScaledByPosition(attention, scale, values["floor_scale"])


def feed_forward(weights: Weights, config: Config, norm: Norm = None) -> sa.FeedForward:
    """Return activation(x w_gate) · (x w_1) times w_2."""
    names, width = ("gate_proj", "up_proj"), config.values["intermediate_size"]
    (w_gate, b_gate), (w_1, b_1) = matrices(weights, names, "gate_up_proj", (width, width))
    w_2, b_2 = weights["down_proj.weight"].T, weights.get("down_proj.bias")
    gate: dict[str, Any] = {"w_gate": w_gate, "b_gate": b_gate, "activation": config.activation}
    return sa.FeedForward(w_1, w_2, b_1, b_2, **gate, norm=norm)


class Experts:
    """A feed-forward part for each expert. A router sends each token to a few experts; a shared one takes all."""

    def __init__(self, weights: Weights, config: Config, norm: Norm) -> None:
        kind = config.family.experts
        router = weights[f"{kind.router}.weight"].astype(np.float32)
        self.router, self.norm, self.kind, self.values = sa.Linear(router.T), norm, kind, config.values
        self.preference = weights.get(f"{kind.router}.e_score_correction_bias")
        self.shared = None
        if any(name.startswith(kind.shared) for name in weights):
            self.shared = feed_forward(weights.below(kind.shared), config)
        if "experts.gate_up_proj" in weights:
            pairs = zip(weights["experts.gate_up_proj"], weights["experts.down_proj"], strict=True)
            parts = ((np.split(both, 2, axis=1), w_2) for both, w_2 in pairs)
            options: dict[str, Any] = {"activation": config.activation}
            self.experts = [sa.FeedForward(w_1, w_2, w_gate=gate, **options) for (gate, w_1), w_2 in parts]
        else:
            self.experts = [feed_forward(weights.below(f"experts.{i}."), config) for i in range(len(router))]

    def __call__(self, x: Array, *, residual: Array | None = None) -> Array:
        rows = self.norm(x).reshape(-1, x.shape[-1])
        y = np.zeros_like(rows) if self.shared is None else self.shared(rows)
        chosen, factors = self.kind.route(self.router(rows.astype(np.float32)), self.values, self.preference)
        for expert in np.unique(chosen):
            row, place = np.nonzero(chosen == expert)
            factor = factors[row, place, None].astype(x.dtype)
            if self.kind.scales_input:
                y[row] += self.experts[expert](rows[row] * factor)
            else:
                y[row] += self.experts[expert](rows[row]) * factor
        y = y.reshape(x.shape)
        return y if residual is None else residual + y


def best(scores: Array, count: int) -> Array:
    """Return the places of each row's largest scores."""
    return np.argsort(-scores, axis=-1, kind="stable")[:, :count]


def softmax(logits: Array) -> Array:
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


def in_best_groups(scores: Array, values: Mapping[str, Any], count: int) -> Array:
    """Return scores, −inf outside of the groups of experts whose `count` largest have the largest sums."""
    groups = scores.reshape(len(scores), values["n_group"], -1)
    sums = np.sort(groups, axis=-1)[..., -count:].sum(axis=-1)
    kept = np.zeros(sums.shape, dtype=bool)
    np.put_along_axis(kept, best(sums, values["topk_group"]), True, axis=-1)
    return np.where(kept[..., None], groups, -np.inf).reshape(scores.shape)


# Each returns the experts of each row, and their factors.


def llama4_route(logits: Array, values: Mapping[str, Any], preference: Array | None) -> tuple[Array, Array]:
    chosen = best(logits, values["num_experts_per_tok"])
    return chosen, sigmoid(np.take_along_axis(logits, chosen, axis=-1))


def qwen3_route(logits: Array, values: Mapping[str, Any], preference: Array | None) -> tuple[Array, Array]:
    scores = softmax(logits)
    chosen = best(scores, values["num_experts_per_tok"])
    factors = np.take_along_axis(scores, chosen, axis=-1)
    return chosen, factors / factors.sum(axis=-1, keepdims=True) if values["norm_topk_prob"] else factors


def deepseek2_route(logits: Array, values: Mapping[str, Any], preference: Array | None) -> tuple[Array, Array]:
    scores = softmax(logits)
    limited = scores if values["topk_method"] == "greedy" else in_best_groups(scores, values, 1)
    chosen = best(limited, values["num_experts_per_tok"])
    return chosen, np.take_along_axis(scores, chosen, axis=-1) * values["routed_scaling_factor"]


def deepseek3_route(logits: Array, values: Mapping[str, Any], preference: Array | None) -> tuple[Array, Array]:
    scores = sigmoid(logits)
    limited = in_best_groups(scores if preference is None else scores + preference, values, 2)
    chosen = best(limited, values["num_experts_per_tok"])
    factors = np.take_along_axis(scores, chosen, axis=-1)
    if values["norm_topk_prob"]:
        factors = factors / factors.sum(axis=-1, keepdims=True)
    return chosen, factors * values["routed_scaling_factor"]
