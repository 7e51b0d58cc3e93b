"""Times calls of the selfattn that its interpreter imports: reads a name per line, prints the seconds of a call.

`builds.py` runs this file with the interpreters of two installations. So it imports nothing else of this project, and
uses names that all versions have.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

import selfattn as sa

Shape = tuple[int, int, int, int, int]  # query heads, KV heads, queries, keys, head_dim

WARM_SECONDS = 30e-3
SAMPLE_SECONDS = 5e-3
TYPES = {"f32": np.float32, "f64": np.float64, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
SHAPES: dict[str, Shape] = {
    "tiny-16": (12, 12, 16, 16, 32),
    "prompt-128": (12, 12, 128, 128, 64),
    "prompt-512": (12, 12, 512, 512, 64),
    "prompt-2k": (4, 4, 2048, 2048, 128),
    "odd": (8, 8, 129, 333, 72),
    "few-8": (32, 8, 8, 3000, 128),
    "decode-4k": (32, 8, 1, 4096, 128),
    "decode-32k": (32, 8, 1, 32768, 128),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "window": {"causal": True, "window": (63, 0)},
    "softcap": {"softcap": 30.0},
    "alibi": {"causal": True, "alibi_slopes": np.geomspace(0.5, 0.01, 12).astype(np.float32)},
    "lengths": {"kv_lens": np.array([400])},
    "mask": {"mask": np.arange(512 * 512).reshape(512, 512) % 5 > 0},
    "bias": {"bias": np.linspace(-1, 1, 12 * 512 * 512, dtype=np.float32).reshape(12, 512, 512)},
}


def operands(shape: Shape, kind: str) -> list[Any]:
    """Return q, k, v of one sequence."""
    heads, kv_heads, queries, keys, dim = shape
    rng = np.random.default_rng(0)
    lengths = ((heads, queries), (kv_heads, keys), (kv_heads, keys))
    return [rng.standard_normal((1, h, n, dim), dtype=np.float32).astype(TYPES[kind]) for h, n in lengths]


def attention(shape: str, kind: str, options: dict[str, Any]) -> Callable[[], Any]:
    """Return a call of attention."""
    q, k, v = operands(SHAPES[shape], kind)
    return partial(sa.attention, q, k, v, **options)


def gradients(shape: str, kind: str) -> Callable[[], Any]:
    """Return a backward pass."""
    q, k, v = operands(SHAPES[shape], kind)
    out, lse = sa.attention(q, k, v, causal=True, return_lse=True)
    return partial(sa.attention_backward, out, q, k, v, out, lse, causal=True)


def cached(dtype: Any, pages: int | None, queries: int = 1) -> Callable[[], Any]:
    """Return attention to 8,000 keys of a contiguous or a paged cache, without new keys."""
    q, k, v = operands((32, 8, queries, 8000, 128), "bf16" if dtype == "bfloat16" else "f32")
    sequences: dict[str, Any] = {}
    if pages is None:
        cache: Any = sa.KVCache(1, 8, 128, 8192, dtype=dtype)
        cache.append(k, v)
    else:
        cache = sa.PagedKVCache(8192 // pages, pages, 8, 128, dtype=dtype)
        sequences = {"sequences": [cache.allocate()]}
        cache.append(sequences["sequences"][0], k[0], v[0])
    return partial(sa.attention_with_kvcache, q, cache, **sequences)


def layer(tokens: int, width: int) -> Callable[[], Any]:
    """Return a call of SelfAttention."""
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal((width, width), dtype=np.float32) / math.sqrt(width) for _ in range(4)]
    return partial(
        sa.SelfAttention(*weights, num_heads=width // 64), rng.standard_normal((1, tokens, width), dtype=np.float32)
    )


def makers() -> dict[str, Callable[[], Callable[[], Any]]]:
    """Return what makes each call, by name."""
    found: dict[str, Callable[[], Callable[[], Any]]] = {}
    for kind in TYPES:
        for shape in SHAPES if kind != "f64" else ("prompt-512",):
            found[f"{shape} {kind}"] = partial(attention, shape, kind, {})
    for name, options in OPTIONS.items():
        for kind in ("f32", "bf16"):
            found[f"{name} {kind}"] = partial(attention, "prompt-512", kind, options)
    for dtype in ("float32", "bfloat16", "int8"):
        found[f"cache {dtype}"] = partial(cached, dtype, None)
        found[f"pages of 16 {dtype}"] = partial(cached, dtype, 16)
    found["cache bfloat16, 8 queries"] = partial(cached, "bfloat16", None, 8)
    for tokens, width in ((12, 384), (128, 384), (128, 768)):
        found[f"layer {tokens}x{width}"] = partial(layer, tokens, width)
    if hasattr(sa, "attention_backward"):
        for kind in ("f32", "bf16"):
            for shape in ("prompt-128", "prompt-512", "prompt-2k"):
                found[f"gradients {shape} {kind}"] = partial(gradients, shape, kind)
    return found


def seconds_of(call: Callable[[], Any]) -> float:
    """Return the mean time of a call, in a sample that follows others without a pause."""
    start, calls = time.perf_counter(), 0
    while not calls or time.perf_counter() - start < WARM_SECONDS:
        call()
        calls += 1
    repeats = max(1, math.ceil(SAMPLE_SECONDS * calls / (time.perf_counter() - start)))
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def main() -> None:
    """Answer lines until the input ends; first print version and names, separated by tabs."""
    sa.set_num_threads(int(sys.argv[1]))
    made = makers()
    print(sa.__version__, *made, sep="\t", flush=True)
    name, call = "", None
    for line in sys.stdin:
        if line.rstrip("\n") != name or call is None:
            name = line.rstrip("\n")
            call = made[name]()
        print(seconds_of(call), flush=True)


if __name__ == "__main__":
    main()
