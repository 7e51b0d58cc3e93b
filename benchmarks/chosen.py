"""Time attention to chosen keys and blocks, compared with a plain call on as many keys, and the key mass.

Run `python benchmarks/chosen.py --help` for the options.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from workbench.lines import compare_times, parse

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 64
CHOSEN, KEYS, BLOCK = 2048, 65_536, 64
PROMPTS = {"prompt of 512": (512, False), "prompt of 2048": (2048, False), "causal prompt of 2048": (2048, True)}


def operands(dtype: str, q_len: int, kv_len: int) -> tuple[Any, Any, Any]:
    """Return q, k and v."""
    import ml_dtypes
    import numpy as np

    rng = np.random.default_rng(0)
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    shapes = [(1, HEADS, q_len, HEAD_DIM), *[(1, KV_HEADS, kv_len, HEAD_DIM)] * 2]
    q, k, v = (rng.standard_normal(shape, dtype=np.float32).astype(kind) for shape in shapes)
    return q, k, v


def choose(rng: Any, shape: tuple[int, ...], size: int, count: int) -> Any:
    """Draw `count` different numbers below `size` for each element of `shape`."""
    import numpy as np

    numbers = np.broadcast_to(np.arange(size, dtype=np.int32), (*shape, size))
    return np.ascontiguousarray(rng.permuted(numbers, axis=-1)[..., :count])


def chosen_calls(dtype: str, q_len: int, threads: int) -> dict[str, Callable[[], Any]]:
    """Return a plain call on as many keys as are chosen, and calls that choose them for each query."""
    from functools import partial

    import numpy as np

    import selfattn as sa

    q, k, v = operands(dtype, q_len, KEYS)
    rng = np.random.default_rng(1)
    scattered = choose(rng, (q_len,), KEYS, CHOSEN)
    blocks = choose(rng, (KV_HEADS, q_len), KEYS // BLOCK, CHOSEN // BLOCK)
    keys = (blocks[0, ..., None] * BLOCK + np.arange(BLOCK)).reshape(q_len, -1)
    few = [np.ascontiguousarray(x[:, :, :CHOSEN]) for x in (k, v)]
    call = partial(sa.attention, q, k, v, num_threads=threads)
    calls: dict[str, Callable[[], Any]] = {
        "plain": lambda: sa.attention(q, *few, num_threads=threads),
        "scattered keys": lambda: call(key_indices=scattered),
        f"blocks of {BLOCK}": lambda: call(key_indices=keys),
        "block_indices": lambda: call(block_indices=blocks[0], block_size=BLOCK),
        "for each KV head": lambda: call(block_indices=blocks, block_size=BLOCK),
    }
    if q_len > 1:
        rows = -(-q_len // BLOCK)
        calls["for blocks of queries"] = lambda: call(block_indices=blocks[0, :rows], block_size=(BLOCK, BLOCK))
        calls["for all queries"] = lambda: call(block_indices=blocks[0, :1], block_size=BLOCK)
    return calls


def prompt_calls(dtype: str, length: int, causal: bool, threads: int) -> dict[str, Callable[[], Any]]:
    """Return a plain call, one that also returns the key mass, and one that rotates q and k first."""
    import selfattn as sa

    q, k, v = operands(dtype, length, length)
    return {
        "plain": lambda: sa.attention(q, k, v, causal=causal, num_threads=threads),
        "key mass": lambda: sa.attention(q, k, v, causal=causal, return_key_mass=True, num_threads=threads),
        "rope": lambda: sa.attention(q, k, v, causal=causal, rope=True, num_threads=threads),
    }


def main() -> int:
    """Print one line per case: the time of the plain call, and the others' times relative to it."""
    args = parse(argparse.ArgumentParser(description=__doc__), seconds=2)
    print(f"{args.threads} thread(s): time of the plain call, and the times of the others relative to it")
    for dtype in args.dtype:
        cases = {f"{n} queries, {CHOSEN} of {KEYS} keys": chosen_calls(dtype, n, args.threads) for n in (1, 256)}
        for name, (length, causal) in PROMPTS.items():
            cases[name] = prompt_calls(dtype, length, causal, args.threads)
        for name, calls in cases.items():
            seconds, ratios = compare_times(calls, args.seconds)
            print(f"{dtype:9} {name:36} {seconds * 1e6:9.0f} us  {ratios}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
