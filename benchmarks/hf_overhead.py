"""Time what surrounds the arithmetic in transformers: the attention function and the mask function, on short inputs.

Each line compares selfattn's function with that of `sdpa`. Both get what a layer of Llama's kind passes: 12 heads of
64, 16 tokens each. Needs torch and transformers (extra `transformers`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

from workbench.lines import compare_times, parse

NAMES = ("selfattn", "sdpa")
TOKENS = 16
HEADS, HEAD_DIM = 12, 64


def calls_of(name: str, dtype: str) -> dict[str, Callable[[], Any]]:
    """Return the calls of an attention implementation, by case."""
    torch, hf, masking = (import_module(module) for module in ("torch", "transformers", "transformers.masking_utils"))
    attention = import_module("transformers.modeling_utils").ALL_ATTENTION_FUNCTIONS[name]
    llama = import_module("transformers.models.llama.modeling_llama")
    config = hf.LlamaConfig(hidden_size=HEADS * HEAD_DIM, num_attention_heads=HEADS, num_hidden_layers=1)
    config._attn_implementation = name
    layer = llama.LlamaAttention(config, layer_idx=0).eval()
    calls: dict[str, Callable[[], Any]] = {}
    for title, batch, padding in (("one sequence", 1, 0), ("4 sequences, padded", 4, 5)):
        real = torch.ones(batch, TOKENS, dtype=torch.long)
        real[0, :padding] = 0
        x = torch.randn(batch, HEADS, TOKENS, HEAD_DIM, generator=torch.Generator().manual_seed(0))
        x = x.to(getattr(torch, dtype))
        embeds = torch.zeros(batch, TOKENS, config.hidden_size, dtype=x.dtype)
        mask = partial(masking.create_causal_mask, config, embeds, real, None)
        calls[f"mask, {title}"] = mask
        calls[f"attention, {title}"] = partial(attention, layer, x, x, x, mask(), scaling=layer.scaling)
    return calls


def main() -> int:
    """Print one line per case, with the time of selfattn's function and the ratio of the other's to it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args = parse(parser, seconds=2.0)
    torch = import_module("torch")
    import_module("selfattn.integrations.transformers").register()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    print(f"{args.threads} thread(s): time of selfattn's function, and that of sdpa's relative to it")
    for dtype in args.dtype:
        made = {name: calls_of(name, dtype) for name in NAMES}
        for case in made[NAMES[0]]:
            seconds, ratios = compare_times({name: made[name][case] for name in NAMES}, args.seconds)
            print(f"{dtype:9} {case:30} {seconds * 1e6:7.1f} us  {ratios}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
