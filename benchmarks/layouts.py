"""Time attention on operands in unusual layouts, and with hidden values that are not finite, against plain operands.

Run `python benchmarks/layouts.py --help` for the options. Each line gives the time of the plain call, and the time of
each variant relative to it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from workbench.lines import compare_times, parse

# batch, query heads, KV heads, queries, keys, head_dim
SHAPES = {
    "decode": (1, 32, 8, 1, 4096, 128),
    "one-head-per-group": (1, 12, 12, 1, 4096, 64),
    "prompt": (1, 12, 12, 512, 512, 64),
}


def columns(x: Any) -> Any:
    """Return the same numbers, with the elements of a row far apart: stored as (D, S)."""
    import numpy as np

    return np.ascontiguousarray(x.swapaxes(-1, -2)).swapaxes(-1, -2)


def variants(dtype: str, shape: str, threads: int) -> dict[str, dict[str, Callable[[], Any]]]:
    """Return groups of calls; the first call of each group is the plain one."""
    import ml_dtypes
    import numpy as np

    import selfattn as sa

    batch, heads, kv_heads, q_len, kv_len, dim = SHAPES[shape]
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    rng = np.random.default_rng(0)
    q = rng.standard_normal((batch, heads, q_len, dim)).astype(kind)
    k, v = (rng.standard_normal((batch, kv_heads, kv_len, dim)).astype(kind) for _ in "kv")

    def call(*operands: Any, **options: Any) -> Callable[[], Any]:
        return lambda: sa.attention(*operands, num_threads=threads, **options)

    seventh = np.arange(kv_len) % 7 > 0
    left = np.arange(kv_len) >= kv_len // 3

    def spoiled(mask: Any, value: float) -> tuple[Any, Any]:
        spoiled_k, spoiled_v = k.copy(), v.copy()
        for x in (spoiled_k, spoiled_v):
            x[..., ~mask, :] = value
        return spoiled_k, spoiled_v

    groups = {
        "layouts": {
            "plain": call(q, k, v),
            "keys (D, S)": call(q, columns(k), v),
            "values (D, S)": call(q, k, columns(v)),
            "both (D, S)": call(q, columns(k), columns(v)),
        },
        "hidden": {
            "plain": call(q, k, v, mask=seventh),
            "Inf in every seventh": call(q, *spoiled(seventh, np.inf), mask=seventh),
        },
        "padding": {
            "plain": call(q, k, v, mask=left),
            "NaN on the left": call(q, *spoiled(left, np.nan), mask=left),
        },
    }
    if q_len > 1:
        bias = rng.standard_normal((heads, q_len, kv_len)).astype(np.float32)
        groups["biases"] = {
            "plain": call(q, k, v, bias=bias),
            "transposed": call(q, k, v, bias=columns(bias)),
            "float16": call(q, k, v, bias=bias.astype(np.float16)),
            "bfloat16": call(q, k, v, bias=bias.astype(ml_dtypes.bfloat16)),
        }
    return groups


def measure(args: argparse.Namespace) -> None:
    """Print one line per group."""
    print(f"{args.threads} thread(s): time of the plain call, and the times of variants relative to it")
    for dtype in args.dtype:
        for shape in args.shapes:
            for name, runs in variants(dtype, shape, args.threads).items():
                seconds, ratios = compare_times(runs, args.seconds)
                print(f"{dtype:9} {shape:19} {name:8} {seconds * 1e6:8.0f} us  {ratios}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    measure(parse(parser, seconds=0.3))
    return 0


if __name__ == "__main__":
    sys.exit(main())
