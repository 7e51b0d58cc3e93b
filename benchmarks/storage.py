"""What each storage type of a cache costs in accuracy, on the keys and values of a trained model (MiniLM).

    .venv/bin/python benchmarks/storage.py

Every layer of the model attends to the tokens of one text, from a cache of each type. The errors are relative to
attention in float64 on the keys and values before they were stored: the root of the mean square of all layers'
numbers, and that of the worst layer. The model's heads have 32 numbers. Wider heads are made by joining its heads.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np

import selfattn as sa

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "examples"))
minilm = importlib.import_module("minilm")

TYPES = ("float32", "float16", "bfloat16", "int8", "int4")
TEXT = ROOT / "CODE_OF_CONDUCT.md"


def operands(text: str) -> list[list[Any]]:
    """Return queries, keys and values (1, heads, tokens, 32) of each layer."""
    model = minilm.MiniLM()
    ids = np.array(model.tokenizer.encode(text).ids)
    states = model.bert.ragged_states(ids, np.array([0, len(ids)]))
    layers = zip(states, model.bert.blocks, strict=False)
    return [[x.swapaxes(0, 1)[np.newaxis] for x in block.heads(state)] for state, block in layers]


def joined(x: Any, count: int) -> Any:
    """Return the heads of x with `count` adjacent heads as one."""
    batch, heads, tokens, width = x.shape
    together = x.reshape(batch, heads // count, count, tokens, width).swapaxes(2, 3)
    return together.reshape(batch, heads // count, tokens, count * width)


def error(storage: Any, q: Any, k: Any, v: Any) -> float:
    """Return the error of attention to a cache, relative to the norm of the exact result."""
    cache = sa.KVCache(1, k.shape[1], k.shape[3], k.shape[2], dtype=storage)
    cache.append(k, v)
    exact = sa.attention(*(x.astype(np.float64) for x in (q, k, v)))
    found = sa.attention_with_kvcache(q, cache, causal=False)
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=TEXT, help="a file, of which the model reads the first 256 tokens")
    layers = operands(parser.parse_args().text.read_text(encoding="utf8"))
    print(f"{layers[0][0].shape[2]} tokens, {len(layers)} layers\n\n| storage | head_dim | error | worst layer |")
    print("|---|---|---|---|")
    for count in (1, 4):
        for storage in TYPES:
            errors = [error(storage, *(joined(x, count) for x in layer)) for layer in layers]
            print(f"| {storage} | {32 * count} | {np.sqrt(np.mean(np.square(errors))):.1e} | {max(errors):.1e} |")


if __name__ == "__main__":
    main()
