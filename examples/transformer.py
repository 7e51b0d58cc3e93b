"""The Transformer of "Attention is all you need" (Vaswani et al., 2017) in full: encoder and decoder, in NumPy.

The encoder's self-attention sees all of a source. The decoder's self-attention sees the tokens so far, whose keys and
values stay in caches. Cross-attention sees the source, whose keys and values are computed once. There are two shapes:
Marian's, with sines and cosines for positions as in the paper, and BART's, with learned positions. The library
transformers makes the random weights (extra: pip install transformers torch), so the text means nothing. --check
compares it with the text that the library generates, and with the text when everything is computed again at every step.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from cross_attention import Memory
from nn import Array
from transformer_layers import MAX_LENGTH, Config, DecoderLayer, Embedding, EncoderLayer

import selfattn as sa

KINDS = ("marian", "bart")
PADDING, START, END = 1, 2, 0
VOCABULARY = 500
TOLERANCE = 1e-4  # largest error of logits in float32


@dataclass
class State:
    """The state that a decoder keeps between steps for a batch of sources."""

    memories: list[Memory]
    caches: list[sa.KVCache] | None
    length: int = 0  # tokens that are in the caches


class Transformer:
    """The model: source tokens in, logits of the next target token out."""

    def __init__(self, config: Config, weights: dict[str, Array]) -> None:
        self.config = config
        self.sides = {side: Embedding(weights, side, config) for side in ("encoder", "decoder")}
        layers = range(config.layers)
        self.encoder = [EncoderLayer(weights, f"model.encoder.layers.{i}", config) for i in layers]
        self.decoder = [DecoderLayer(weights, f"model.decoder.layers.{i}", config) for i in layers]
        self.output, self.output_bias = weights["model.shared.weight"].T, weights["final_logits_bias"]

    def encode(self, ids: Array, lengths: Array) -> Array:
        """Return the encoder's output (B, S, width) for sources (B, S), row b of which has lengths[b] tokens."""
        x = self.sides["encoder"](ids)
        for layer in self.encoder:
            x = layer(x, lengths)
        return x

    def start(self, encoded: Array, lengths: Array, capacity: int | None) -> State:
        """Return the decoder's state before the first token, with caches for `capacity` tokens, or none."""
        memories = [layer.cross.memory(encoded, lengths) for layer in self.decoder]
        heads, width = self.config.heads, self.config.width
        if capacity is None:
            return State(memories, None)
        return State(memories, [sa.KVCache(len(encoded), heads, width // heads, capacity) for _ in self.decoder])

    def decode(self, ids: Array, state: State) -> Array:
        """Return the logits (B, T, vocabulary) after each of these tokens (B, T), which follow the cached tokens."""
        x = self.sides["decoder"](ids, state.length)
        for i, layer in enumerate(self.decoder):
            x = layer(x, state.memories[i], None if state.caches is None else state.caches[i])
        if state.caches is not None:
            state.length += ids.shape[1]
        return np.asarray(x @ self.output + self.output_bias)


def generate(
    model: Transformer,
    sources: Sequence[Sequence[int]],
    tokens: int,
    end: int = END,
    cached: bool = True,
    repeats: bool = False,
) -> list[list[int]]:
    """Generate tokens for each source, the likeliest at each step, until the token `end` or the limit.

    Without `repeats` no token is used twice: a model with random weights would repeat its first one for ever.
    """
    ids, lengths = padded(sources)
    state = model.start(model.encode(ids, lengths), lengths, tokens if cached else None)
    written = np.full((len(sources), 1), START)
    going = np.ones(len(sources), bool)
    while written.shape[1] <= tokens and going.any():
        logits = model.decode(written[:, -1:] if cached else written, state)[:, -1]
        if not repeats:
            np.put_along_axis(logits, written, -np.inf, axis=1)
        chosen = logits.argmax(axis=-1)
        written = np.append(written, chosen[:, None], axis=1)
        going &= chosen != end
    return [until(end, row) for row in written[:, 1:].tolist()]


def until(end: int, row: list[int]) -> list[int]:
    """Return the row up to its end."""
    return row[: row.index(end) + 1] if end in row else row


def padded(sources: Sequence[Sequence[int]]) -> tuple[Array, Array]:
    """Return the sources as one array (B, S), and their lengths."""
    lengths = np.array([len(source) for source in sources])
    ids = np.full((len(sources), lengths.max()), PADDING)
    for row, source in zip(ids, sources, strict=True):
        row[: len(source)] = source
    return ids, lengths


def transformers_model(config: Config, seed: int = 0) -> Any:
    """Return a MarianMTModel or BartForConditionalGeneration of these sizes, with random weights."""
    import torch
    import transformers

    torch.manual_seed(seed)
    sizes = {"d_model": config.width, "vocab_size": VOCABULARY, "max_position_embeddings": MAX_LENGTH}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": config.layers, f"{side}_attention_heads": config.heads}
        sizes[f"{side}_ffn_dim"] = 4 * config.width
    special = {"pad_token_id": PADDING, "decoder_start_token_id": START, "eos_token_id": END, "bos_token_id": START}
    kind = {"marian": transformers.MarianConfig, "bart": transformers.BartConfig}[config.kind]
    described = kind(
        **sizes, **special, init_std=config.width**-0.5, activation_function=config.activation,
        scale_embedding=config.kind == "marian", forced_eos_token_id=None, attn_implementation="eager",
    )  # fmt: skip
    classes = {"marian": transformers.MarianMTModel, "bart": transformers.BartForConditionalGeneration}
    model = classes[config.kind](described).eval()
    with torch.no_grad():  # norms of ones and biases of zeros would hide mistakes
        for parameter in [*model.parameters(), model.final_logits_bias]:
            if parameter.ndim == 1 or parameter is model.final_logits_bias:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def transformers_weights(model: Any) -> dict[str, Array]:
    """Return the weights of a model of transformers."""
    return {name: weight.numpy() for name, weight in model.state_dict().items()}


def check(config: Config, sources: list[list[int]], tokens: int, seed: int) -> bool:
    """Print how far the model is from transformers', and say whether that is close enough."""
    import torch

    peer = transformers_model(config, seed)
    model = Transformer(config, transformers_weights(peer))
    ids, lengths = padded(sources)
    source = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(ids != PADDING).long()}
    with torch.no_grad():
        told = peer.generate(**source, max_new_tokens=tokens, do_sample=False, num_beams=1, no_repeat_ngram_size=1)
        wanted = peer(**source, decoder_input_ids=told[:, :-1]).logits.numpy()
    logits = model.decode(told[:, :-1].numpy(), model.start(model.encode(ids, lengths), lengths, tokens))
    difference = float(np.max(abs(logits - wanted)))
    expected = [until(END, row) for row in told[:, 1:].tolist()]
    ways = (expected, generate(model, sources, tokens), generate(model, sources, tokens, cached=False))
    same = sum(a == b == c for a, b, c in zip(*ways, strict=True))
    written = sum(map(len, expected))
    print(
        f"{config.kind}: {len(sources)} sources of {lengths.min()} to {lengths.max()} tokens, {written} tokens written"
    )
    print(f"  logits up to {abs(wanted).max():.1f}; largest difference from transformers {difference:.1e}")
    print(f"  {same} of {len(sources)} results the same as transformers', with and without caches")
    return difference <= TOLERANCE and same == len(sources)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the example."""
    args = parse(arguments)
    rng = np.random.default_rng(args.seed)
    sources = [rng.integers(3, VOCABULARY, n).tolist() for n in rng.integers(3, 30, args.sources)]
    good = True
    try:
        for kind in KINDS if args.kind == "both" else [args.kind]:
            activation = "relu" if kind == "marian" else "gelu"
            config = Config(kind, args.layers, args.width, args.heads, activation)
            if args.check:
                good &= check(config, sources, args.tokens, args.seed)
                continue
            model = Transformer(config, transformers_weights(transformers_model(config, args.seed)))
            for source, target in zip(sources, generate(model, sources, args.tokens), strict=True):
                print(f"{kind}: {source} -> {target}")
    except ImportError as error:
        print(f"transformer.py: {error.name} is missing: pip install torch transformers", file=sys.stderr)
        return 1
    return 0 if good else 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's options, checked."""
    parser = argparse.ArgumentParser(description=__doc__)
    sizes = {"layers": 3, "width": 128, "heads": 4, "sources": 5, "tokens": 40}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    parser.add_argument("--kind", choices=[*KINDS, "both"], default="both", help="default: both")
    parser.add_argument("--seed", type=int, default=0, help="of weights and sources")
    parser.add_argument("--check", action="store_true", help="compare with transformers, and with no caches")
    args = parser.parse_args(arguments)
    if min(getattr(args, name) for name in sizes) < 1:
        parser.error("all sizes must be at least 1")
    if args.width % (2 * args.heads):
        parser.error("twice the heads must divide the width")
    if args.tokens >= MAX_LENGTH:
        parser.error(f"at most {MAX_LENGTH - 1} tokens can be written")
    return args


if __name__ == "__main__":
    sys.exit(main())
