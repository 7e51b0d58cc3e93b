"""BERT (Devlin et al. 2018) of any size on selfattn and NumPy: token ids become vectors that depend on their context.

Reads the folders that transformers' `BertModel` and related classes save: `model.safetensors` and `config.json`.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from bert_layers import ACTIVATIONS, Block, Weights
from nn import Array


class Bert:
    """The encoder.

    Parameters
    ----------
    tensors : mapping of str to ndarray
        Tensors under transformers' names, with or without the prefix `bert.`. The shapes give the model's sizes.
    num_heads : int
    epsilon : float
        The epsilon of the layer norms.
    activation : str
        The activation of the feed-forward networks: a key of `ACTIVATIONS`.
    dtype : numpy dtype
        The dtype of the weights and of the vectors: float32, or a 16-bit type.
    """

    def __init__(
        self,
        tensors: Mapping[str, Array],
        *,
        num_heads: int,
        epsilon: float = 1e-12,
        activation: str = "gelu",
        dtype: Any = np.float32,
    ) -> None:
        if activation not in ACTIVATIONS:
            raise ValueError(f"the activation {activation!r} is none of {', '.join(ACTIVATIONS)}")
        weights = Weights(tensors, epsilon, dtype)
        self.word_vectors = weights["embeddings.word_embeddings.weight"]
        self.position_vectors = weights["embeddings.position_embeddings.weight"]
        self.type_vectors = weights["embeddings.token_type_embeddings.weight"]
        self.embedding_norm = weights.norm("embeddings.LayerNorm")
        if num_heads < 1 or self.hidden_size % num_heads:
            raise ValueError(f"{num_heads} heads do not divide the hidden size {self.hidden_size}")
        self.blocks: list[Block] = []
        while f"encoder.layer.{len(self.blocks)}.attention.self.query.weight" in weights:
            self.blocks.append(weights.block(f"encoder.layer.{len(self.blocks)}", num_heads, activation))

    @staticmethod
    def load(folder: Path | str, *, dtype: Any = np.float32) -> Bert:
        """Return the model in a folder. ValueError says which of its settings are not supported."""
        from safetensors.numpy import load_file

        folder = Path(folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf8"))
        wanted = {"model_type": "bert", "position_embedding_type": "absolute", "is_decoder": False}
        for name, value in wanted.items():
            if config.get(name, value) != value:
                raise ValueError(f"{folder}: {name} is {config[name]!r}, but only {value!r} is understood")
        model = Bert(
            load_file(folder / "model.safetensors"),
            num_heads=config["num_attention_heads"],
            epsilon=config.get("layer_norm_eps", 1e-12),
            activation=config.get("hidden_act", "gelu"),
            dtype=dtype,
        )
        for name, found in {"hidden_size": model.hidden_size, "num_hidden_layers": len(model.blocks)}.items():
            if config.get(name, found) != found:
                raise ValueError(f"{folder}: {name} is {config[name]} in config.json but {found} in the weights")
        return model

    @property
    def hidden_size(self) -> int:
        """The length of the vectors."""
        return int(self.word_vectors.shape[1])

    def padded(
        self, ids: Array, lengths: Array | None = None, types: Array | None = None, *, return_weights: bool = False
    ) -> tuple[list[Array], list[Array]]:
        """Return the output of every layer for sequences that are padded to one length.

        Parameters
        ----------
        ids : integer ndarray, shape (B, S)
        lengths : integer ndarray, shape (B,), optional
            How many tokens of each row are real; default: all.
        types : integer ndarray, shape (B, S), optional
            The segment of each token; default: 0.
        return_weights : bool

        Returns
        -------
        states : list of ndarray (B, S, hidden), after the embedding and after each layer
        weights : list of ndarray (B, heads, S, S), of each layer; empty without `return_weights`
        """
        lengths = np.full(len(ids), ids.shape[1]) if lengths is None else lengths
        states, weights = [self._embedded(ids, np.arange(ids.shape[1]), types)], []
        for block in self.blocks:
            state, attended = block.padded(states[-1], lengths, return_weights)
            states.append(state)
            if attended is not None:
                weights.append(attended)
        return states, weights

    def ragged_states(self, ids: Array, starts: Array, types: Array | None = None) -> Iterator[Array]:
        """Yield the states (total, hidden) after the embedding and after each layer, without padding.

        Sequence i has the ids from `starts[i]` up to `starts[i + 1]`; `types` as in `padded`, of shape (total,).
        """
        positions = np.arange(len(ids)) - np.repeat(starts[:-1], np.diff(starts))
        x = self._embedded(ids, positions, types)
        yield x
        for block in self.blocks:
            x = block.ragged(x, starts)
            yield x

    def ragged(self, ids: Array, starts: Array, types: Array | None = None) -> Array:
        """Return the last of `ragged_states`, without keeping the earlier states."""
        return deque(self.ragged_states(ids, starts, types), maxlen=1).pop()

    def embed(self, ids: Array, positions: Array) -> Array:
        """Return the vectors of tokens at these positions before the first layer."""
        return self._embedded(ids, positions, None)

    def _embedded(self, ids: Array, positions: Array, types: Array | None) -> Array:
        types = np.zeros_like(ids) if types is None else types
        for name, index, table in (
            ("a token's id", ids, self.word_vectors),
            ("a position", positions, self.position_vectors),
            ("a token's type", types, self.type_vectors),
        ):
            if index.size and not 0 <= index.min() <= index.max() < len(table):
                raise ValueError(f"{name} is not within 0 to {len(table) - 1}, which is what the model has vectors for")
        return self.embedding_norm(self.word_vectors[ids] + self.position_vectors[positions] + self.type_vectors[types])
