"""Time attention to chosen keys, compared with a plain call on as many keys, and the key mass with a call without it.

Run `python benchmarks/chosen.py --help` for the options.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from workbench.lines import compare_times, parse

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 64
CHOSEN, KEYS = 2048, 65_536
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


def chosen_calls(dtype: str, q_len: int, threads: int) -> dict[str, Callable[[], Any]]:
    """Return a plain call on as many keys as are chosen, and calls that choose them for each query."""
    import numpy as np

    import selfattn as sa

    q, k, v = operands(dtype, q_len, KEYS)
    rng = np.random.default_rng(1)
    scattered = rng.permuted(np.tile(np.arange(KEYS, dtype=np.int32), (q_len, 1)), axis=1)[:, :CHOSEN]
    blocks = rng.integers(0, KEYS // 64, (q_len, CHOSEN // 64, 1)) * 64 + np.arange(64)
    few = [np.ascontiguousarray(x[:, :, :CHOSEN]) for x in (k, v)]
    return {
        "plain": lambda: sa.attention(q, *few, num_threads=threads),
        "scattered keys": lambda: sa.attention(q, k, v, key_indices=scattered, num_threads=threads),
        "blocks of 64": lambda: sa.attention(q, k, v, key_indices=blocks.reshape(q_len, -1), num_threads=threads),
    }


def mass_calls(dtype: str, length: int, causal: bool, threads: int) -> dict[str, Callable[[], Any]]:
    """Return a call without and with the key mass."""
    import selfattn as sa

    q, k, v = operands(dtype, length, length)
    return {
        "plain": lambda: sa.attention(q, k, v, causal=causal, num_threads=threads),
        "key mass": lambda: sa.attention(q, k, v, causal=causal, return_key_mass=True, num_threads=threads),
    }


def main() -> int:
    """Print one line per case: the time of the plain call, and the others' times relative to it."""
    args = parse(argparse.ArgumentParser(description=__doc__), seconds=2)
    print(f"{args.threads} thread(s): time of the plain call, and the times of the others relative to it")
    for dtype in args.dtype:
        cases = {f"{n} queries, {CHOSEN} of {KEYS} keys": chosen_calls(dtype, n, args.threads) for n in (1, 256)}
        for name, (length, causal) in PROMPTS.items():
            cases[name] = mass_calls(dtype, length, causal, args.threads)
        for name, calls in cases.items():
            seconds, ratios = compare_times(calls, args.seconds)
            print(f"{dtype:9} {name:36} {seconds * 1e6:9.0f} us  {ratios}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
