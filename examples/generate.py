"""A small decoder in GPT-2's shape generates text token by token and keeps keys and values in caches.

The weights are random, so the text is gibberish. The point is that the caches change the speed and not the text:
--check computes everything again without them. A token is a byte, so any prompt works.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from decoder import MAX_LENGTH, Config, Decoder, encode, random_weights, transformers_model, transformers_weights
from nn import Array

import selfattn as sa

PROMPT = "Attention is all you need, said the cache, and remembered every word."
DTYPES = ("float32", "float16", "bfloat16", "int8", "int4")
PRINTABLE = np.arange(32, 127)  # what may be chosen: random weights would write control characters to the terminal


class Chooser:
    """Chooses the next token: the likeliest if the temperature is 0, else one drawn with the seed."""

    def __init__(self, temperature: float = 0.0, seed: int = 0, allowed: Array = PRINTABLE) -> None:
        self.temperature, self.rng, self.allowed = temperature, np.random.default_rng(seed), allowed

    def __call__(self, logits: Array) -> int:
        scores = logits[self.allowed].astype(np.float64)
        if self.temperature > 0:  # the largest of score + Gumbel noise is a draw from the softmax
            scores = scores / self.temperature + self.rng.gumbel(size=scores.shape)
        return int(self.allowed[np.argmax(scores)])


def new_caches(config: Config, capacity: int, dtype: str = "float32", batch: int = 1) -> list[Any]:
    """Return a cache for each layer."""
    return [sa.KVCache(batch, config.kv_heads, config.head_dim, capacity, dtype=dtype) for _ in range(config.layers)]


def read_prompt(
    model: Decoder,
    caches: Sequence[Any],
    prompt: Array,
    chunk: int = 256,
    progress: Callable[[int], None] = lambda done: None,
) -> Array:
    """Read the prompt in chunks and return the logits of the last one."""
    for start in range(0, len(prompt), chunk):
        logits = model(prompt[None, start : start + chunk], start, caches)
        progress(min(start + chunk, len(prompt)))
    return logits


def generate(
    model: Decoder,
    caches: Sequence[Any],
    prompt: Array,
    tokens: int,
    choose: Callable[[Array], int],
    read: Callable[[Decoder, Sequence[Any], Array], Array] = read_prompt,
) -> Iterator[int]:
    """Read the prompt, then yield one token per step."""
    logits = read(model, caches, prompt)
    for position in range(len(prompt), len(prompt) + tokens):
        token = choose(logits[0, -1])
        yield token
        if position + 1 < len(prompt) + tokens:
            logits = model(np.array([[token]]), position, caches)


def generate_again(model: Decoder, prompt: Array, tokens: int, choose: Callable[[Array], int]) -> Iterator[int]:
    """Read the prompt, then yield one token per step without a cache: each step computes all tokens so far."""
    ids = prompt
    for _ in range(tokens):
        ids = np.append(ids, choose(model(ids[None])[0, -1]))
        yield int(ids[-1])


def bytes_per_token(caches: Sequence[Any], prompt: int, tokens: int) -> float:
    """Return how many bytes of the caches a step reads on average: the bytes of its own token and of all tokens before
    it."""
    cache = caches[0]
    kept = cache.k[..., :1, :].nbytes + cache.v[..., :1, :].nbytes
    if cache.k_scales is not None:
        kept += cache.k_scales[..., :1].nbytes + cache.v_scales[..., :1].nbytes
    steps = range(prompt + 1, prompt + tokens)
    return float(len(caches) * kept * sum(steps) / max(len(steps), 1))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the example."""
    args = parse(arguments)
    config = Config(args.layers, args.width, args.heads, args.kv_heads or args.heads)
    if args.transformers:
        weights = transformers_weights(transformers_model(config, args.seed))
    else:
        weights = random_weights(config, args.seed)
    model = Decoder(config, weights)
    prompt = encode(args.prompt)
    caches = new_caches(config, len(prompt) + args.tokens, args.dtype)

    def chooser() -> Chooser:
        return Chooser(args.temperature, args.seed)

    def progress(done: int) -> None:
        status(f"prompt: {done} of {len(prompt)} tokens" if done < len(prompt) else "")

    read = partial(read_prompt, chunk=args.chunk, progress=progress)
    produced: list[int] = []
    times = [time.perf_counter()]
    for token in generate(model, caches, prompt, args.tokens, chooser(), read):
        times.append(time.perf_counter())
        print(chr(token) if produced else args.prompt + chr(token), end="", flush=True)
        produced.append(token)
        if not sys.stdout.isatty():  # on a terminal the text itself shows the progress
            status(f"{len(produced)} of {args.tokens} tokens" if len(produced) < args.tokens else "")
    print(f"\n\nprompt: {len(prompt)} tokens in {times[1] - times[0]:.3f} s")
    if args.tokens > 1:
        print(f"then {(args.tokens - 1) / (times[-1] - times[1]):.0f} tokens per second")
    print(f"cache: {args.dtype}, {bytes_per_token(caches, len(prompt), args.tokens):,.0f} bytes read per token")
    return compare(produced, model, prompt, chooser(), args.dtype) if args.check else 0


def compare(produced: list[int], model: Decoder, prompt: Array, choose: Chooser, dtype: str) -> int:
    """Print how many tokens full recomputation confirms; return 1 if it had to confirm all tokens and did not."""
    again = list(generate_again(model, prompt, len(produced), choose))
    same = next((i for i, (one, two) in enumerate(zip(produced, again, strict=True)) if one != two), len(again))
    print(f"without a cache: the first {same} of {len(again)} tokens are the same")
    return int(same < len(again) and dtype == "float32")  # a narrower cache rounds the tokens it keeps


def status(text: str) -> None:
    """Show progress if standard error is a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's options, checked."""
    parser = argparse.ArgumentParser(description=__doc__)
    sizes = {"tokens": 200, "layers": 4, "width": 256, "heads": 8, "kv-heads": None, "chunk": 256}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default or 'as many as heads'}")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="what the caches keep (default: float32)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest token (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the choices")
    parser.add_argument("--transformers", action="store_true", help="weights of a random GPT2LMHeadModel")
    parser.add_argument("--check", action="store_true", help="compute everything again without a cache")
    args = parser.parse_args(arguments)
    given = [getattr(args, name.replace("-", "_")) for name in sizes]
    if any(size is not None and size < 1 for size in given):
        parser.error("all sizes must be at least 1")
    if args.width % args.heads or args.heads % (args.kv_heads or args.heads):
        parser.error("heads must divide the width, and kv-heads the heads")
    length = len(args.prompt.encode())
    if not 1 <= length <= MAX_LENGTH - args.tokens:
        parser.error(f"prompt and tokens may have {MAX_LENGTH} bytes together, and the prompt needs one")
    if args.transformers and args.kv_heads not in (None, args.heads):
        parser.error("GPT-2 has as many KV heads as heads")
    return args


if __name__ == "__main__":
    sys.exit(main())
