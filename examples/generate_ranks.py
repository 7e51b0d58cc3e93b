"""The decoder of generate.py writes text with its caches spread over MPI ranks: the same tokens as alone.

    mpiexec -n 2 python -m mpi4py examples/generate_ranks.py

Every rank computes the same projections; each keeps a part of the keys and values, and attends to its part. The prompt
is read in chunks, each of which goes to the rank that has the fewest tokens.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import numpy as np
from decoder import ACTIVATIONS, Config, Decoder, encode, random_weights
from generate import PROMPT, Chooser, generate, new_caches
from mpi4py import MPI
from nn import Array

import selfattn as sa
from selfattn.distributed import Group


class Block:
    """A block of `Decoder` whose cache is spread over ranks."""

    def __init__(self, group: Group, weights: dict[str, Array], layer: int, config: Config) -> None:
        def pair(part: str) -> tuple[Array, Array]:
            return weights[f"h.{layer}.{part}.weight"], weights[f"h.{layer}.{part}.bias"]

        self.group, self.config, self.scale = group, config, config.scale(layer)
        self.norm, between = (sa.LayerNorm(*pair(part), eps=config.epsilon) for part in ("ln_1", "ln_2"))
        self.project, self.output = sa.Linear(*pair("attn.c_attn")), sa.Linear(*pair("attn.c_proj"))
        (w_1, b_1), (w_2, b_2) = pair("mlp.c_fc"), pair("mlp.c_proj")
        activation: Any = ACTIVATIONS[config.activation]
        self.feed_forward = sa.FeedForward(w_1, w_2, b_1, b_2, activation=activation, norm=between)

    def __call__(self, x: Array, cache: Any) -> Array:
        config = self.config
        qkv = self.project(self.norm(x)).reshape(*x.shape[:2], -1, config.head_dim)
        q, k, v = np.split(qkv, [config.heads, config.heads + config.kv_heads], axis=2)
        heads = self.group.attention_with_kvcache(q, cache, k, v, scale=self.scale, layout="bshd")
        x = self.output(heads.reshape(x.shape), residual=x)
        return self.feed_forward(x, residual=x)


class SpreadDecoder(Decoder):
    """`Decoder` on all ranks of a group."""

    def __init__(self, group: Group, config: Config, weights: dict[str, Array]) -> None:
        super().__init__(config, weights)
        self.blocks: list[Any] = [Block(group, weights, i, config) for i in range(config.layers)]


def main() -> int:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--tokens", type=int, default=100, help="default: 100")
    parser.add_argument("--dtype", default="float32", help="what the caches keep (default: float32)")
    args = parser.parse_args()
    group, config = Group(MPI.COMM_WORLD), Config()
    weights, prompt = random_weights(config), encode(args.prompt)
    capacity = len(prompt) + args.tokens
    caches = new_caches(config, capacity, args.dtype)
    start = time.perf_counter()
    spread = list(generate(SpreadDecoder(group, config, weights), caches, prompt, args.tokens, Chooser(1.0), read))
    seconds = time.perf_counter() - start
    held = MPI.COMM_WORLD.gather(int(caches[0].lengths[0]))
    if group.rank == 0:
        caches = new_caches(config, capacity, args.dtype)
        same = spread == list(generate(Decoder(config, weights), caches, prompt, args.tokens, Chooser(1.0)))
        print(args.prompt + "".join(map(chr, spread)))
        print(f"{args.tokens} tokens on {group.size} ranks in {seconds:.2f} s; tokens in their caches: {held}")
        print(f"{'the same' if same else 'not the same'} tokens as on one rank without a group")
    return 0


def read(model: Decoder, caches: Any, prompt: Array) -> Array:
    """Read the prompt in chunks and return the logits of the last one."""
    for first in range(0, len(prompt), 16):
        logits = model(prompt[None, first : first + 16], first, caches)
    return logits


if __name__ == "__main__":
    sys.exit(main())
