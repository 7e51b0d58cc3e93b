"""GPT-2 (Radford et al., 2019) continues a text, with weights from a folder that `transformers` saved.

Such a folder has config.json, model.safetensors and tokenizer.json. No package contains such a folder, and nothing is
downloaded: name the folder of a model that you have.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from byte_letters import text_of
from decoder import ACTIVATIONS, Config, Decoder, transformers_weights
from generate import Chooser, generate, new_caches
from nn import Array

FILES = ("config.json", "model.safetensors", "tokenizer.json")
END = "<|endoftext|>"
PROMPT = "Last month he went to Norway, and"


def config_from(values: Mapping[str, Any]) -> Config:
    """Return the settings of a GPT2Config, given as a dictionary of its values."""
    if values.get("model_type", "gpt2") != "gpt2" or values.get("add_cross_attention"):
        raise ValueError("this is no GPT-2 without cross-attention")
    if values.get("activation_function", "gelu_new") not in ACTIVATIONS:
        raise ValueError(f"activation {values['activation_function']!r} is none of {', '.join(ACTIVATIONS)}")
    return Config(
        layers=values["n_layer"],
        width=values["n_embd"],
        heads=values["n_head"],
        kv_heads=values["n_head"],
        vocabulary=values["vocab_size"],
        max_length=values["n_positions"],
        activation=values.get("activation_function", "gelu_new"),
        epsilon=values.get("layer_norm_epsilon", 1e-5),
        scaled=values.get("scale_attn_weights", True),
        scaled_by_layer=values.get("scale_attn_by_inverse_layer_idx", False),
    )


def from_transformers(model: Any) -> Decoder:
    """Return the decoder with the weights of a GPT2LMHeadModel."""
    return Decoder(config_from(model.config.to_dict()), transformers_weights(model))


def from_folder(folder: Path) -> Decoder:
    """Return the decoder in a folder."""
    from safetensors.numpy import load_file

    for name in FILES:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{name} is missing")
    config = config_from(json.loads((folder / "config.json").read_text(encoding="utf8")))
    weights = load_file(folder / "model.safetensors")
    return Decoder(config, {name.removeprefix("transformer."): x.astype(np.float32) for name, x in weights.items()})


def continue_batch(model: Decoder, prompts: Sequence[Array], tokens: int) -> Array:
    """Return the likeliest tokens (B, tokens) after prompts of any lengths, which are computed as one batch."""
    lengths = np.array([len(prompt) for prompt in prompts])
    caches = new_caches(model.config, int(lengths.max()) + tokens, batch=len(prompts))
    ids = np.zeros((len(prompts), lengths.max()), dtype=np.int64)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    logits = model(ids, 0, caches)[np.arange(len(prompts)), lengths - 1]
    for cache in caches:
        cache.truncate(lengths)  # remove the padding
    produced = [np.argmax(logits, axis=-1)]
    for done in range(tokens - 1):
        logits = model(produced[-1][:, None], lengths + done, caches)[:, 0]
        produced.append(np.argmax(logits, axis=-1))
    return np.stack(produced, axis=1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the example."""
    args = parse(arguments)
    try:
        from tokenizers import Tokenizer

        model = from_folder(args.folder)
        tokenizer = Tokenizer.from_file(str(args.folder / FILES[-1]))
        prompt = np.array(tokenizer.encode(args.prompt).ids)
        if not 1 <= len(prompt) <= model.config.max_length - args.tokens:
            raise ValueError(f"the prompt has {len(prompt)} tokens, and the model {model.config.max_length} positions")
    except ImportError as error:
        print(f'gpt2.py: {error.name} is missing: pip install "selfattn[examples]"', file=sys.stderr)
        return 1
    except Exception as error:  # tokenizers and safetensors raise no narrower class
        print(f"gpt2.py: {args.folder}: {error}", file=sys.stderr)
        return 1
    caches = new_caches(model.config, len(prompt) + args.tokens)
    known = min(model.config.vocabulary, tokenizer.get_vocab_size())
    choose = Chooser(args.temperature, args.seed, np.arange(known))
    words = (tokenizer.id_to_token(token) or "" for token in generate(model, caches, prompt, args.tokens, choose))
    print(args.prompt, end="", flush=True)
    for text in text_of(takewhile(lambda word: word != END, words)):
        print(text, end="", flush=True)
    print()
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help=f"where {', '.join(FILES)} are")
    parser.add_argument("prompt", nargs="?", default=PROMPT)
    parser.add_argument("--tokens", type=int, default=100, help="how many to write (default: 100)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    parser.add_argument("--seed", type=int, default=0, help="of the choices")
    args = parser.parse_args(arguments)
    if args.tokens < 1:
        parser.error("--tokens must be at least 1")
    return args


if __name__ == "__main__":
    sys.exit(main())
