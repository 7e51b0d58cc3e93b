"""Time the decoder of examples/llm.py: a new token and a prompt, compared with transformers on the same weights.

The model has the shape of Llama 3.2 1B and random weights; `--layers` makes it smaller. Needs torch and transformers.
Run `python benchmarks/llm.py --help` for the options.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from workbench.hf_models import LLAMA_1B, Mismatch, Shape, decoder
from workbench.lines import compare_times, parse
from workbench.minilm_peers import import_example

VOCABULARY = 128_256
PROMPT = 512
LENGTHS = (512, 4096)  # tokens in the cache before the new one
# Largest relative error (RMS). Both libraries round to bfloat16 after each operation, but not after the same ones.
WORST = {"float32": 1e-4, "bfloat16": 0.1}
Calls = dict[str, Callable[[], Any]]


class Models:
    """The same weights in examples/llm.py and in transformers."""

    def __init__(self, dtype: str, shape: Shape, threads: int) -> None:
        import torch
        import transformers

        import selfattn as sa

        sa.set_num_threads(threads)
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        self.torch, self.hf, self.dtype = torch, transformers, dtype
        kind, self.config = decoder(transformers, shape)
        self.config.vocab_size, self.config.tie_word_embeddings = VOCABULARY, True
        self.peer = kind.from_config(self.config, attn_implementation="sdpa", dtype=getattr(torch, dtype)).eval()
        with tempfile.TemporaryDirectory() as folder:
            self.peer.save_pretrained(folder)
            self.own = self._load(Path(folder))

    def _load(self, folder: Path) -> Any:
        llm, files = import_example("llm"), import_example("llm_weights")
        config = import_example("llm_config").Config(files.read_json(folder / files.CONFIG))
        return llm.Decoder(config, files.Weights(folder, self.dtype))

    def token(self, length: int) -> Calls:
        """Return calls that compute the logits of the token after `length` tokens."""
        own = self.own.new_caches(length + 1, 1, self.dtype)
        peers = {
            "sdpa, dynamic": self.hf.DynamicCache(config=self.config),
            "sdpa, static": self.hf.StaticCache(config=self.config, max_cache_len=length + 1),
        }
        for layer, cache in enumerate(own):
            size = (1, cache.num_kv_heads, length, cache.head_dim)
            k, v = (self.torch.randn(size, dtype=getattr(self.torch, self.dtype)) for _ in range(2))
            cache.append(k.float().numpy(), v.float().numpy())
            for peer in peers.values():
                peer.update(k, v, layer)
        ids = self.torch.randint(3, VOCABULARY, (1, 1))

        def step() -> Any:
            logits = self.own(ids.numpy(), length, own)
            for cache in own:
                cache.truncate(length)
            return logits

        return {"selfattn": step, **{name: self._peer_token(ids, cache) for name, cache in peers.items()}}

    def _peer_token(self, ids: Any, cache: Any) -> Callable[[], Any]:
        def step() -> Any:
            with self.torch.inference_mode():
                logits = self.peer(ids, past_key_values=cache, use_cache=True).logits
            if isinstance(cache, self.hf.StaticCache):
                for layer in cache.layers:
                    layer.cumulative_length.sub_(1)
            else:
                cache.crop(-1)
            return logits.float().numpy()

        return step

    def prompt(self, length: int) -> Calls:
        """Return calls that read a prompt into new caches and compute the logits of the token after it."""
        ids = self.torch.randint(3, VOCABULARY, (1, length))

        def peer() -> Any:
            with self.torch.inference_mode():
                return self.peer(ids, use_cache=True, logits_to_keep=1).logits.float().numpy()

        return {
            "selfattn": lambda: self.own(ids.numpy(), 0, self.own.new_caches(length, length, self.dtype)),
            "sdpa": peer,
        }

    def share_outside(self, call: Callable[[], Any]) -> float:
        """Return the share of a call that is outside of attention, feed-forward parts and the head."""
        places = [(block, name) for block in self.own.blocks for name in ("attention", "feed_forward")]
        places.append((self.own, "head"))
        timed = [Timed(getattr(*place)) for place in places]
        try:
            for place, layer in zip(places, timed, strict=True):
                setattr(*place, layer)
            start = time.perf_counter()
            call()
            whole = time.perf_counter() - start
        finally:
            for place, layer in zip(places, timed, strict=True):
                setattr(*place, layer.layer)
        return 1 - sum(layer.seconds for layer in timed) / whole


class Timed:
    """A layer that adds up the seconds of its calls."""

    def __init__(self, layer: Any) -> None:
        self.layer, self.seconds = layer, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)

    def __call__(self, *args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        result = self.layer(*args, **options)
        self.seconds += time.perf_counter() - start
        return result


def cases(models: Models) -> Iterator[tuple[str, Calls]]:
    """Yield the name and the calls of each case."""
    for length in LENGTHS:
        yield f"token after {length}", models.token(length)
    yield f"prompt of {PROMPT}", models.prompt(PROMPT)


def check(name: str, calls: Calls, tolerance: float) -> None:
    """Raise if the logits differ."""
    import numpy as np

    wanted, *others = (np.asarray(call(), np.float64) for call in calls.values())
    for other in others:
        error = np.sqrt(np.mean((other - wanted) ** 2) / np.mean(wanted**2))
        if not error <= tolerance:
            raise Mismatch(f"{name}: logits differ by {error:.2g}")


def measure(args: argparse.Namespace) -> None:
    """Print one line per case: the median time, the ratios of the others' times, and the share of NumPy's code."""
    print(f"{args.threads} thread(s), {args.layers} layers: milliseconds of llm.py; the times of others relative to it")
    for dtype in args.dtype:
        models = Models(dtype, replace(LLAMA_1B, layers=args.layers), args.threads)
        for name, calls in cases(models):
            check(name, calls, WORST[dtype])
            seconds, ratios = compare_times(calls, args.seconds)
            outside = models.share_outside(calls["selfattn"])
            print(f"{name:16} {dtype:9} {1e3 * seconds:8.1f}  {ratios}  outside of layers {outside:.1%}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=16)
    measure(parse(parser, seconds=10))
    return 0


if __name__ == "__main__":
    sys.exit(main())
