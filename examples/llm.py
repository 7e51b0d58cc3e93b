"""A current language model continues a text, with weights from a folder that `transformers` saved.

Such a folder has config.json, tokenizer.json and model.safetensors (or its parts, and an index). No package contains
such a folder, and nothing is downloaded: name the folder of a model that you have.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from generate import Chooser, generate, read_prompt, status
from llm_config import FAMILIES, Config
from llm_latent import ChosenAttention, IndexedCache
from llm_layers import Experts, feed_forward
from llm_weights import CONFIG, FILES, TOKENIZER, Weights, end_tokens, read_json
from nn import Array

import selfattn as sa

PROMPT = "Last month he went to Norway, and"
Cache = sa.KVCache | IndexedCache
CACHES = ("float32", "float16", "bfloat16", "int8", "int4")


class Block:
    """x += norm(attention(norm(x))); x += norm(feed_forward(norm(x))). Each family has some of the norms."""

    def __init__(self, weights: Weights, config: Config, layer: int) -> None:
        norms = (config.norm(weights, name) if name else None for name in config.family.norms)
        before, self.after, between, self.last = norms
        self.attention = config.family.attention(weights.below("self_attn."), config, layer, before)
        inner, experts = weights.below(config.family.feed_forward), config.family.experts
        mixed = experts is not None and f"{experts.router}.weight" in inner
        self.feed_forward = (Experts if mixed else feed_forward)(inner, config, between)
        self.window = config.window(layer)
        self.options = {"scale": config.scale, "softcap": config.values.get("attn_logit_softcapping")}
        if self.window is not None:
            self.options["window"] = (self.window, 0)
        if config.chunk(layer):
            self.options["chunk"] = config.chunk(layer)

    def __call__(self, x: Array, cache: Cache) -> Array:
        x = add(partial(self.attention, cache=cache, **self.options), x, self.after)
        return add(self.feed_forward, x, self.last)

    def new_cache(self, capacity: int, chunk: int, dtype: str, batch: int, before: Cache | None) -> Cache:
        """Return a cache for `capacity` tokens, `chunk` of which come at once; a window needs only a ring of them.

        `before` is the cache of the layer before.
        """
        layer = self.attention
        options: dict[str, Any] = {"capacity": capacity, "value_dim": layer.value_dim, "dtype": dtype}
        options["values"] = getattr(layer, "values", "own")
        if self.window is not None and self.window + chunk < capacity:
            options |= {"capacity": self.window + chunk, "window": self.window}
        if isinstance(layer, ChosenAttention):
            return layer.new_cache(batch, options, before)
        return sa.KVCache(batch, layer.num_kv_heads, layer.head_dim, **options)


def add(layer: Callable[..., Array], x: Array, norm: sa.RMSNorm | None) -> Array:
    """Return x plus what the layer makes of it, normalised if there is a norm."""
    return layer(x, residual=x) if norm is None else x + norm(layer(x))


class Decoder:
    """The model: tokens in, logits of the next token out."""

    def __init__(self, config: Config, weights: Weights, progress: Callable[[int], None] = lambda done: None) -> None:
        table = next((name for name in weights if name.endswith("embed_tokens.weight")), "embed_tokens.weight")
        self.config, self.vectors = config, weights[table]
        self.head = sa.Linear(weights.get("lm_head.weight", self.vectors).T)
        weights = weights.below(table.removesuffix("embed_tokens.weight"))
        self.norm = config.norm(weights, "norm")
        self.blocks = []
        for layer in range(config.layers):
            self.blocks.append(Block(weights.below(f"layers.{layer}."), config, layer))
            progress(layer + 1)

    def hidden(self, ids: Array, caches: Sequence[Cache]) -> Array:
        """Return the vectors (B, S, width) of tokens (B, S) after all blocks. Earlier tokens are in the caches."""
        x = self.vectors[ids]
        if self.config.family.scaled_embedding:
            x = x * np.asarray(x.shape[-1] ** 0.5, x.dtype)
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block(x, cache)
        return self.norm(x)

    def logits(self, x: Array) -> Array:
        scores, cap = self.head(x).astype(np.float32), self.config.values.get("final_logit_softcapping")
        return scores if cap is None else cap * np.tanh(scores / cap)

    def __call__(self, ids: Array, start: int = 0, caches: Sequence[Cache] | None = None) -> Array:
        """Return logits: of all tokens (B, S, vocabulary), or with caches only of the last ones (B, 1, vocabulary).

        The first token's position is `start`, the number of tokens in the caches.
        """
        if caches is None:
            return self.logits(self.hidden(ids, self.new_caches(ids.shape[1], ids.shape[1], batch=len(ids))))
        return self.logits(self.hidden(ids, caches)[:, -1:])

    def new_caches(self, capacity: int, chunk: int, dtype: str = "float32", batch: int = 1) -> list[Cache]:
        """Return a cache for each block."""
        caches: list[Cache] = []
        for block in self.blocks:
            caches.append(block.new_cache(capacity, chunk, dtype, batch, caches[-1] if caches else None))
        return caches


def pieces(tokenizer: Any, prompt: Sequence[int], tokens: Iterable[int]) -> Iterator[str]:
    """Yield the text that tokens add to a prompt; a letter split between tokens comes with the last one."""
    known, new = list(prompt), []
    for token in tokens:
        new.append(token)
        before, text = tokenizer.decode(known), tokenizer.decode(known + new)
        if not text.endswith("\ufffd"):
            yield text[len(before) :]
            known, new = (known + new)[-16:], []  # the text of a token may depend on tokens before it
    yield tokenizer.decode(known + new)[len(tokenizer.decode(known)) :]


def run(args: argparse.Namespace) -> None:
    """Write the text."""
    from tokenizers import Tokenizer

    def progress(what: str, done: int, count: int) -> None:
        status(f"{what}: {done} of {count}" if done < count else "")

    values = read_json(args.folder / CONFIG)
    if not (args.folder / TOKENIZER).is_file():
        raise FileNotFoundError(f"{TOKENIZER} is missing")
    tokenizer = Tokenizer.from_file(str(args.folder / TOKENIZER))
    prompt = tokenizer.encode(args.prompt).ids
    length, longest = len(prompt) + args.tokens, values.get("max_position_embeddings", 0)
    config = Config(values, length)
    if not prompt or length > longest:
        raise ValueError(f"the prompt has {len(prompt)} tokens, and the model {longest} positions")
    model = Decoder(config, Weights(args.folder, args.weights), lambda done: progress("layers", done, config.layers))
    caches = model.new_caches(length, args.chunk, args.dtype)
    choose = Chooser(args.temperature, args.seed, np.arange(min(len(model.vectors), tokenizer.get_vocab_size())))
    read = partial(read_prompt, chunk=args.chunk, progress=lambda done: progress("prompt", done, len(prompt)))
    tokens = generate(model, caches, np.array(prompt), args.tokens, choose, read)
    ends = end_tokens(args.folder, values)
    texts = pieces(tokenizer, prompt, takewhile(lambda token: token not in ends, tokens))
    for done, text in enumerate(texts):
        print(text if done else args.prompt + text, end="", flush=True)
        if not sys.stdout.isatty():  # on a terminal the text itself shows the progress
            progress("tokens", done, args.tokens)
    if not sys.stdout.isatty():
        status("")
    print()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the example."""
    args = parse(arguments)
    try:
        run(args)
    except ImportError as error:
        print(f'llm.py: {error.name} is missing: pip install "selfattn[examples]" ml_dtypes', file=sys.stderr)
    except Exception as error:  # tokenizers raises no narrower class
        print(f"llm.py: {args.folder}: {error.args[0] if isinstance(error, KeyError) else error}", file=sys.stderr)
    else:
        return 0
    return 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=f"Model types: {', '.join(FAMILIES)}.")
    parser.add_argument("folder", type=Path, help=f"where {', '.join(FILES)} are")
    parser.add_argument("prompt", nargs="?", default=PROMPT)
    parser.add_argument("--tokens", type=int, default=100, help="how many to write (default: 100)")
    parser.add_argument("--chunk", type=int, default=256, help="how many to read at once (default: 256)")
    parser.add_argument("--weights", choices=("float32", "bfloat16"), default="float32", help="default: float32")
    parser.add_argument("--dtype", choices=CACHES, default="float32", help="what the caches keep (default: float32)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    parser.add_argument("--seed", type=int, default=0, help="of the choices")
    args = parser.parse_args(arguments)
    if min(args.tokens, args.chunk) < 1:
        parser.error("--tokens and --chunk must be at least 1")
    return args


if __name__ == "__main__":
    sys.exit(main())
