"""Attention to latents (DeepSeek's MLA) from a model's weights, also to those that an index chooses (DSA)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from llm_layers import Norm, best
from llm_weights import Weights
from nn import Array

import selfattn as sa

if TYPE_CHECKING:
    from llm_config import Config

READABLE = ("float32", "float16", "bfloat16")  # caches that are arrays of numbers, not of codes


def linear(weights: Weights, name: str) -> sa.Linear:
    return sa.Linear(weights[f"{name}.weight"].T, weights.get(f"{name}.bias"))


class LatentAttention:
    """DeepSeek's attention (MLA): keys and values are projections of a short vector, the latent, that all heads share.

    The projection to keys is applied to the queries instead, and the projection to values to the results. So the cache
    holds only latents, which are the keys and the values of a single head. A second part of each key, the same for all
    heads, is rotated.
    """

    num_kv_heads, values = 1, "prefix"

    def __init__(self, weights: Weights, config: Config, layer: int, norm: Norm) -> None:
        values = config.values
        self.rank, self.plain, rotated = (values[x] for x in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim"))
        self.heads, self.head_dim, self.value_dim = config.heads, self.rank + rotated, self.rank
        self.norm, self.rope, self.scale = norm, config.rope(layer), (self.plain + rotated) ** -0.5
        rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
        if rope.get("mscale_all_dim") and rope["factor"] > 1:
            self.scale *= (0.1 * rope["mscale_all_dim"] * np.log(rope["factor"]) + 1.0) ** 2
        self.shorten: list[Any] = []  # queries may be projections of a short vector, too
        if "q_a_proj.weight" in weights:
            self.shorten = [linear(weights, "q_a_proj"), config.norm(weights, "q_a_layernorm", 1e-6)]
        self.to_queries = linear(weights, "q_b_proj" if self.shorten else "q_proj")
        self.shared, self.output = linear(weights, "kv_a_proj_with_mqa"), linear(weights, "o_proj")
        self.latent_norm = config.norm(weights, "kv_a_layernorm", 1e-6)
        expand = weights["kv_b_proj.weight"].astype(np.float32).reshape(self.heads, -1, self.rank)
        self.to_keys, self.to_values = expand[:, : self.plain], expand[:, self.plain :].swapaxes(1, 2)

    def __call__(self, x: Array, *, cache: sa.KVCache, residual: Array | None = None, **options: Any) -> Array:
        x = self.norm(x)
        _, q, k = self.project(x, next_positions(x, cache))
        return self.finish(sa.attention_with_kvcache(q, cache, k, **options | {"scale": self.scale}), x, residual)

    def project(self, x: Array, positions: Array) -> tuple[Array, Array, Array]:
        """Return the short vectors of queries (B, S, .), queries (B, heads, S, .) and keys (B, 1, S, .)."""
        short = x
        for step in self.shorten:
            short = step(short)
        q = self.to_queries(short).reshape(*x.shape[:2], self.heads, -1).swapaxes(1, 2).astype(np.float32)
        shared = self.shared(x)
        k = shared[:, None].astype(np.float32)  # one head
        latent = self.latent_norm(shared[..., : self.rank])[:, None].astype(np.float32)
        rotated = [sa.apply_rope(part, positions, self.rope) for part in (q[..., self.plain :], k[..., self.rank :])]
        q = np.concatenate([q[..., : self.plain] @ self.to_keys, rotated[0]], axis=-1)
        return short, q, np.concatenate([latent, rotated[1]], axis=-1)

    def finish(self, y: Array, x: Array, residual: Array | None) -> Array:
        """Return the output for sums of latents (B, heads, S, rank)."""
        y = (y @ self.to_values).swapaxes(1, 2).reshape(*x.shape[:2], -1).astype(x.dtype)
        return self.output(y, residual=residual)


def next_positions(x: Array, cache: sa.KVCache | IndexedCache) -> Array:
    """Return the positions (B, S) of tokens x, which follow those in the cache."""
    return np.asarray(cache.lengths[:, None] + np.arange(x.shape[1]))


@dataclass
class Index:
    """The small keys (B, 1, tokens, .) of all tokens so far, and the keys that the queries of this call chose."""

    keys: sa.KVCache
    chosen: Array | None = None  # (B, 1, S, count), -1: none; or None if queries see all


@dataclass
class IndexedCache:
    """The latents of a layer, and an index, which several layers may share."""

    latents: sa.KVCache
    index: Index
    window: None = field(default=None, init=False)

    @property
    def lengths(self) -> Array:
        return self.latents.lengths


class ChosenAttention(LatentAttention):
    """DeepSeek's sparse attention (DSA): each query sees the `index_topk` latents whose keys in the index score best.

    A layer without an index of its own sees what the layer before has chosen.
    """

    def __init__(self, weights: Weights, config: Config, layer: int, norm: Norm) -> None:
        super().__init__(weights, config, layer, norm)
        self.indexer = None
        if layer == 0 or "indexer.wk.weight" in weights:  # there is no layer before the first one
            rope = replace(config.rope(layer), interleaved=config.family.interleaved_index)
            self.indexer = Indexer(weights.below("indexer."), config, rope)

    def new_cache(self, batch: int, options: Mapping[str, Any], before: Any) -> IndexedCache:
        """Return a cache with these options, and an index: a new one, or that of `before`, the layer before."""
        if options["dtype"] not in READABLE:
            raise ValueError(f"queries choose keys in caches of {', '.join(READABLE)}, not of {options['dtype']}")
        if options["dtype"] == "bfloat16":
            import ml_dtypes  # noqa: F401 (teaches NumPy bfloat16)
        latents = sa.KVCache(batch, 1, self.head_dim, **options)
        if self.indexer is None:
            return IndexedCache(latents, before.index)
        keys = sa.KVCache(batch, 1, self.indexer.head_dim, latents.capacity, values="prefix")  # keys only
        return IndexedCache(latents, Index(keys))

    def __call__(self, x: Array, *, cache: Any, residual: Array | None = None, **options: Any) -> Array:
        x, options = self.norm(x), options | {"scale": self.scale}
        short, q, k = self.project(x, next_positions(x, cache))
        if self.indexer is not None:
            cache.index.chosen = self.indexer(x, short, cache.index.keys)
        if cache.index.chosen is None:
            return self.finish(sa.attention_with_kvcache(q, cache.latents, k, **options), x, residual)
        cache.latents.append(k)
        k = cache.latents.k[:, :, : cache.lengths[0]]
        y = sa.attention(q, k, k[..., : self.rank], key_indices=cache.index.chosen, **options)
        return self.finish(y, x, residual)


class Indexer:
    """Scores a token for a query: the sum over small heads of factor · max(0, q · k), where factors are of the query.

    k is the same for all heads. The index is float32, whatever the latents are.
    """

    def __init__(self, weights: Weights, config: Config, rope: sa.RoPE) -> None:
        self.count, self.heads, self.head_dim = (
            config.values[name] for name in ("index_topk", "index_n_heads", "index_head_dim")
        )
        self.rope, self.scale = rope, (self.heads * self.head_dim) ** -0.5
        self.to_queries, self.to_key = linear(weights, "wq_b"), linear(weights, "wk")
        self.to_factors = linear(weights, "weights_proj")
        self.norm = sa.LayerNorm(weights["k_norm.weight"], weights["k_norm.bias"], eps=1e-6)

    def __call__(self, x: Array, short: Array, keys: sa.KVCache) -> Array | None:
        """Append the keys of tokens x to the index, and return what queries choose: (B, 1, S, count) or None, all."""
        q = self.to_queries(short).reshape(*x.shape[:2], self.heads, -1).swapaxes(1, 2)
        k = self.norm(self.to_key(x))[:, None]
        q, k = (sa.apply_rope(part.astype(np.float32), next_positions(x, keys), self.rope) for part in (q, k))
        keys.append(k)
        if keys.lengths[0] <= self.count:
            return None
        factors = self.to_factors(x).astype(np.float32) * self.scale
        return choose(q, factors, keys.k[:, 0, : keys.lengths[0]], self.count)[:, None]


def choose(q: Array, factors: Array, keys: Array, count: int) -> Array:
    """Return the tokens (B, S, count) that the last queries choose, -1: none.

    q is (B, heads, S, .), factors (B, S, heads), keys (B, tokens, .). Of tokens with equal scores, the first ones are
    chosen. (Scores of 0 are common if there are few heads. transformers may choose any of them.) Each query is computed
    by itself, so that its choice does not depend on how many come at once.
    """
    chosen = np.full((*factors.shape[:2], count), -1)
    for i, end in enumerate(range(keys.shape[1] - q.shape[2] + 1, keys.shape[1] + 1)):
        if end <= count:
            chosen[:, i, :end] = np.arange(end)
        else:
            scores = factors[:, i, None] @ np.maximum(q[:, :, i] @ keys[:, :end].swapaxes(1, 2), 0)
            chosen[:, i] = best(scores[:, 0], count)
    return chosen
