"""Transformer-XL (Dai et al., 2019): a long text in segments, each of which remembers the hidden states before it.

    python examples/transformer_xl.py README.md --segment 128 --memory 256

Positions are relative: a query scores keys by their content and, separately, by their distance. The weights are random
here, as in a new model. The program checks that segments with memory give the same states as one pass over the whole
text in which every token sees the same tokens. XLNet's checkpoints have the same shapes and names.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nn import Array

import selfattn as sa

TEXT = Path(__file__).resolve().parents[1] / "README.md"
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Config:
    """The sizes of a model; tokens are bytes."""

    layers: int = 4
    width: int = 256
    heads: int = 8
    inner: int = 1024
    vocabulary: int = 256
    clamp_length: int | None = None  # larger distances count as this distance
    epsilon: float = 1e-12


def random_weights(config: Config, seed: int = 0) -> dict[str, Array]:
    """Return weights under the names that XLNet gives them."""
    rng = np.random.default_rng(seed)
    width, heads, dim = config.width, config.heads, config.width // config.heads
    shapes: dict[str, tuple[int, ...]] = {"word_embedding.weight": (config.vocabulary, width)}
    for i in range(config.layers):
        shapes |= {f"layer.{i}.rel_attn.{name}": (width, heads, dim) for name in "qkvor"}
        shapes |= {f"layer.{i}.rel_attn.r_{name}_bias": (heads, dim) for name in "wr"}
        shapes |= {f"layer.{i}.ff.layer_1.weight": (config.inner, width), f"layer.{i}.ff.layer_1.bias": (config.inner,)}
        shapes |= {f"layer.{i}.ff.layer_2.weight": (width, config.inner), f"layer.{i}.ff.layer_2.bias": (width,)}
        for part in ("rel_attn", "ff"):
            shapes |= {f"layer.{i}.{part}.layer_norm.{name}": (width,) for name in ("weight", "bias")}
    scale = width**-0.5
    weights = {name: (rng.standard_normal(shape) * scale).astype(np.float32) for name, shape in shapes.items()}
    return weights | {name: weight + 1 for name, weight in weights.items() if name.endswith("layer_norm.weight")}


def encodings(distances: Array, width: int) -> Array:
    """Return the sinusoids of distances, (n, width): all sines, then all cosines."""
    rates = 10000.0 ** (-np.arange(0, width, 2) / width)
    angles = distances[:, None] * rates
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


class Layer:
    """x = norm(x + attention(x)); x = norm(x + feed_forward(x))."""

    def __init__(self, weights: dict[str, Array], name: str, config: Config) -> None:
        attention = f"{name}.rel_attn"
        self.w_q, self.w_k, self.w_v, self.w_o, self.w_r = (
            weights[f"{attention}.{part}"].reshape(config.width, -1) for part in "qkvor"
        )
        self.for_keys, self.for_distances = weights[f"{attention}.r_w_bias"], weights[f"{attention}.r_r_bias"]
        self.heads = config.heads
        (w_1, b_1), (w_2, b_2) = (
            (weights[f"{name}.ff.layer_{i}.weight"].T, weights[f"{name}.ff.layer_{i}.bias"]) for i in (1, 2)
        )
        self.attention_norm, last = (
            sa.LayerNorm(weights[f"{part}.layer_norm.weight"], weights[f"{part}.layer_norm.bias"], eps=config.epsilon)
            for part in (attention, f"{name}.ff")
        )
        self.feed_forward = sa.FeedForward(w_1, w_2, b_1, b_2, activation="gelu", post_norm=last)

    def __call__(self, x: Array, memory: Array, positions: Array, **options: Any) -> Array:
        """Return the states (B, S, width) after this layer; `memory` has its inputs for earlier tokens."""
        seen = np.concatenate([memory, x], axis=1)
        q, k, v, r = (
            self._heads(a, w) for a, w in ((x, self.w_q), (seen, self.w_k), (seen, self.w_v), (positions, self.w_r))
        )
        terms = (r.swapaxes(0, 1), self.for_keys, self.for_distances)
        mixed = sa.relative_attention(q, k, v, *terms, mem_len=memory.shape[1], layout="bshd", **options)
        x = self.attention_norm(x, residual=mixed.reshape(x.shape[0], x.shape[1], -1) @ self.w_o.T)
        return self.feed_forward(x, residual=x)

    def _heads(self, x: Array, w: Array) -> Array:
        return (x @ w).reshape(*x.shape[:-1], self.heads, -1)


class TransformerXL:
    """The model: tokens in, hidden states out."""

    def __init__(self, config: Config, weights: dict[str, Array]) -> None:
        self.config = config
        self.vectors = weights["word_embedding.weight"]
        self.layers = [Layer(weights, f"layer.{i}", config) for i in range(config.layers)]

    def __call__(
        self, ids: Array, memory: Sequence[Array] | None = None, *, causal: bool = True, **options: Any
    ) -> tuple[Array, list[Array]]:
        """Return the states (B, S, width) of tokens (B, S), and each layer's input: the next segment's memory."""
        x = self.vectors[ids]
        memory = [x[:, :0]] * len(self.layers) if memory is None else memory
        length = memory[0].shape[1] + x.shape[1]
        farthest = length if self.config.clamp_length is None else self.config.clamp_length
        ahead = 0 if causal else min(x.shape[1], farthest)  # without causal order, keys ahead have distances too
        positions = encodings(np.arange(-ahead, min(farthest, length) + 1), self.config.width)
        states = []
        for layer, before in zip(self.layers, memory, strict=True):
            states.append(x)
            x = layer(x, before, positions, causal=causal, r_origin=ahead, **options)
        return x, states

    def segments(self, ids: Array, segment: int, memory: int) -> Iterator[Array]:
        """Yield the states of one segment after another; each segment sees itself and `memory` tokens before it."""
        kept = None
        for start in range(0, ids.shape[1], segment):
            x, states = self(ids[:, start : start + segment], kept)
            yield x
            before = (
                states if kept is None else [np.concatenate(pair, axis=1) for pair in zip(kept, states, strict=True)]
            )
            kept = [state[:, max(state.shape[1] - memory, 0) :] for state in before]


def seen_in_segments(length: int, segment: int, memory: int) -> Array:
    """Return a mask of the tokens that each token may see, apart from causal order, when a text is read in segments."""
    first = np.arange(length) // segment * segment
    return np.asarray(np.arange(length) >= (first - memory)[:, None])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="?", type=Path, default=TEXT, help="a file; default: the project's README")
    for name, default in (("segment", 128), ("memory", 256), ("tokens", 4096)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    args = parser.parse_args(arguments)
    if min(args.segment, args.tokens) < 1 or args.memory < 0:
        parser.error("segment and tokens must be at least 1, and memory at least 0")
    try:
        ids = np.frombuffer(args.text.read_bytes()[: args.tokens], dtype=np.uint8).astype(np.int64)[None]
    except OSError as error:
        parser.error(f"{args.text}: {error.strerror}")
    if ids.size == 0:
        parser.error(f"{args.text}: the file is empty")
    model = TransformerXL(Config(), random_weights(Config()))
    times = [time.perf_counter()]
    parts = []
    for part in model.segments(ids, args.segment, args.memory):
        parts.append(part)
        if sys.stderr.isatty():
            print(f"\r\033[K{sum(p.shape[1] for p in parts)} of {ids.shape[1]} tokens", end="", file=sys.stderr)
    times.append(time.perf_counter())
    whole, _ = model(ids, mask=seen_in_segments(ids.shape[1], args.segment, args.memory))
    times.append(time.perf_counter())
    difference = float(np.max(np.abs(np.concatenate(parts, axis=1) - whole)))
    in_segments, at_once = np.diff(times)
    print(f"{ids.shape[1]} tokens in {len(parts)} segments: {in_segments:.2f} s; in one pass: {at_once:.2f} s")
    print(f"largest difference of their states: {difference:.1e}")
    return int(difference > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
