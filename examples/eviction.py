"""Caches of a fixed size for long texts: two published rules choose the tokens that stay in a `KVCache`.

H2O (Zhang et al., 2023) keeps the tokens that have received most attention so far, SnapKV (Li et al., 2024) those that
the last queries of the prompt look at, with their neighbours. Both also keep the newest tokens, and choose for each KV
head. The program makes up a prompt in which a few keys attract most queries. It prints the memory that each cache
needs, and how far attention of the next tokens is from attention with all tokens.

    python examples/eviction.py --tokens 8192 --budget 512
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

import selfattn as sa

Array = NDArray[Any]
Tokens = tuple[Array, Array, Array]  # q (1, heads, tokens, dim); k and v (1, kv_heads, tokens, dim)
KV_HEADS, GROUP, DIM, HEAVY = 2, 4, 64, 24


def best(received: Array, budget: int, recent: int) -> Array:
    """Return the ascending indices (batch, kv_heads, budget) of the newest tokens and of those that received most."""
    length = received.shape[-1]
    older = np.argsort(-received[..., : length - recent], axis=-1)[..., : budget - recent]
    newest = np.broadcast_to(np.arange(length - recent, length), (*older.shape[:-1], recent))
    return np.sort(np.concatenate([older, newest], axis=-1), axis=-1)


def by_kv_head(mass: Array, kv_heads: int) -> Array:
    """Add up the key mass (batch, heads, tokens) of the query heads that share a KV head."""
    batch, heads, length = mass.shape
    return mass.reshape(batch, kv_heads, heads // kv_heads, length).sum(axis=2)


class H2O:
    """Heavy hitters: the tokens with the largest sums of weights over all queries, and the newest tokens."""

    def __init__(self, cache: sa.KVCache, budget: int, recent: int) -> None:
        self.cache, self.budget, self.recent = cache, budget, recent
        self.received = np.zeros((cache.batch, cache.num_kv_heads, 0))

    def attend(self, q: Array, k: Array, v: Array) -> Array:
        """Append tokens, attend to the cache, and evict what exceeds the budget."""
        self.cache.append(k, v)
        length = self.cache.lengths[0]
        stored = self.cache.k[:, :, :length], self.cache.v[:, :, :length]
        out, mass = sa.attention(q, *stored, causal=True, return_key_mass=True)
        self.received = np.pad(self.received, [(0, 0), (0, 0), (0, k.shape[2])]) + by_kv_head(mass, k.shape[1])
        if length > self.budget:
            keep = best(self.received, self.budget, self.recent)
            self.cache.evict(keep)
            self.received = np.take_along_axis(self.received, keep, axis=-1)
        return out


def snapkv(cache: sa.KVCache, q: Array, budget: int, recent: int, pool: int = 7) -> None:
    """Evict the tokens of a prompt that are neither seen by its last `recent` queries nor near such a token."""
    length = cache.lengths[0]
    stored = cache.k[:, :, :length], cache.v[:, :, :length]
    _, mass = sa.attention(q[:, :, -recent:], *stored, causal=True, return_key_mass=True)
    received = by_kv_head(mass, cache.num_kv_heads)
    around = np.pad(received, [(0, 0), (0, 0), (pool // 2, pool // 2)])
    pooled = np.lib.stride_tricks.sliding_window_view(around, pool, axis=-1).max(axis=-1)
    cache.evict(best(pooled, budget, recent))


def make_tokens(rng: np.random.Generator, count: int, steps: int) -> tuple[Tokens, Tokens]:
    """Return a prompt and later tokens: random, but a few keys of the prompt are near the mean of the queries."""
    heads = (KV_HEADS * GROUP, KV_HEADS, KV_HEADS)
    q, k, v = (rng.standard_normal((1, n, count + steps, DIM), dtype=np.float32) for n in heads)
    mean = rng.standard_normal((KV_HEADS, 1, DIM), dtype=np.float32)
    q += np.repeat(mean, GROUP, axis=0)
    for head in range(KV_HEADS):
        k[0, head, rng.choice(count, min(HEAVY, count), replace=False)] += mean[head]
    return (q[:, :, :count], k[:, :, :count], v[:, :, :count]), (q[:, :, count:], k[:, :, count:], v[:, :, count:])


def errors(prompt: Tokens, later: Tokens, budget: int, recent: int) -> dict[str, tuple[int, float]]:
    """Return the tokens that each cache has after the next steps, and its relative error in these steps."""
    q, k, v = prompt
    count, steps = k.shape[2], later[1].shape[2]
    caches = {name: sa.KVCache(1, KV_HEADS, DIM, count + steps) for name in ("all tokens", "newest", "SnapKV", "H2O")}
    heavy = H2O(caches["H2O"], budget, recent)
    heavy.attend(q, k, v)
    for name in ("all tokens", "newest", "SnapKV"):
        caches[name].append(k, v)
    snapkv(caches["SnapKV"], q, budget, recent)
    caches["newest"].evict(np.arange(count - budget, count)[np.newaxis])
    outs: dict[str, list[Array]] = {name: [] for name in caches}
    for i in range(steps):
        token = [x[:, :, i : i + 1] for x in later]
        outs["H2O"].append(heavy.attend(*token))
        for name in ("all tokens", "newest", "SnapKV"):
            outs[name].append(sa.attention_with_kvcache(token[0], caches[name], *token[1:]))
    exact = np.concatenate(outs["all tokens"])
    off = {
        name: float(np.linalg.norm(np.concatenate(out) - exact) / np.linalg.norm(exact)) for name, out in outs.items()
    }
    return {name: (int(cache.lengths[0]), off[name]) for name, cache in caches.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the example."""
    args = parse(arguments)
    prompt, later = make_tokens(np.random.default_rng(0), args.tokens, args.steps)
    print(f"a prompt of {args.tokens:,} tokens and {args.steps} more; a budget of {args.budget:,} tokens")
    for name, (length, error) in errors(prompt, later, args.budget, args.recent).items():
        kib = sa.KVCache.buffer_size(1, KV_HEADS, DIM, length) / 1024
        print(f"{name:12}{length:7,} tokens {kib:9,.0f} KiB   relative error {error:.3f}")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"tokens": 4096, "steps": 16, "budget": 256, "recent": 32}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    args = parser.parse_args(arguments)
    if not 0 < args.recent < args.budget < args.tokens or args.steps < 1:
        parser.error("recent, budget and tokens must ascend, and steps must be at least 1")
    return args


if __name__ == "__main__":
    sys.exit(main())
