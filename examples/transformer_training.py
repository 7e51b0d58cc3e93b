"""The gradients of the Transformer of 2017 (transformer.py, Marian's shape), by the chain rule, layer after layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
from nn import Array
from training import Gradients, Vjp, Weights, cross_entropy, embedding_gradient, relu_vjp
from transformer import START, padded
from transformer_layers import NORM_EPSILON, Config, Embedding

import selfattn as sa

PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}


def random_weights(config: Config, vocabulary: int, seed: int = 0) -> Weights:
    """Return weights under the names of transformers; matrices are (out, in), uniform as in Glorot and Bengio, 2010."""
    rng = np.random.default_rng(seed)
    width = config.width
    weights = {"model.shared.weight": rng.standard_normal((vocabulary, width)) / math.sqrt(width)}

    def add(name: str, rows: int, columns: int) -> None:
        limit = math.sqrt(6 / (rows + columns))
        weights[f"{name}.weight"] = rng.uniform(-limit, limit, (rows, columns))
        weights[f"{name}.bias"] = np.zeros(rows)

    attentions = {"encoder": ("self_attn",), "decoder": ("self_attn", "encoder_attn")}
    for side, i in ((side, i) for side in attentions for i in range(config.layers)):
        layer = f"model.{side}.layers.{i}"
        for attention in attentions[side]:
            for projection in PROJECTIONS.values():
                add(f"{layer}.{attention}.{projection}", width, width)
        add(f"{layer}.fc1", 4 * width, width)
        add(f"{layer}.fc2", width, 4 * width)
        for part in (*attentions[side], "final"):
            weights[f"{layer}.{part}_layer_norm.weight"] = np.ones(width)
            weights[f"{layer}.{part}_layer_norm.bias"] = np.zeros(width)
    return {name: weight.astype(np.float32) for name, weight in weights.items()}


@dataclass
class Encoded:
    """The encoder's output for a batch of padded sources, and its gradient, to which each decoder layer adds."""

    states: Array  # (B, S, width)
    lengths: Array  # (B,)
    grad: Array


class TransformerGradients(Gradients):
    """Gradients of matrices (out, in) and of the parts of the Transformer's layers."""

    def __init__(self, weights: Weights, config: Config) -> None:
        super().__init__(weights)
        self.config = config

    def pair(self, part: str) -> tuple[Array, Array]:
        weight, bias = super().pair(part)
        return weight.T, bias

    def keep(self, part: str, weight: Array, bias: Array) -> None:
        super().keep(part, weight.T, bias)

    def attention(self, part: str, x: Array, context: Encoded | None = None, **options: Any) -> tuple[Array, Vjp]:
        """norm(x + attention(x)), of x to itself or to the encoder's output."""
        pairs = {letter: self.pair(f"{part}.{name}") for letter, name in PROJECTIONS.items()}
        biases = {f"b_{letter}": bias for letter, (_, bias) in pairs.items()}
        wrt = ["x", *biases, *(f"w_{letter}" for letter in pairs)]
        if context is not None:
            options |= {"context": context.states, "kv_lens": context.lengths}
            wrt.append("context")
        y, vjp = sa.self_attention_vjp(
            x, *(weight for weight, _ in pairs.values()), **biases, num_heads=self.config.heads, wrt=wrt, **options
        )

        def backward(grad: Array) -> Array:
            found = vjp(grad)
            for letter, name in PROJECTIONS.items():
                self.keep(f"{part}.{name}", found[f"w_{letter}"], found[f"b_{letter}"])
            if context is not None:
                context.grad += found["context"]
            return found["x"]

        return self._added(f"{part}_layer_norm", x, y, backward)

    def feed_forward(self, layer: str, x: Array) -> tuple[Array, Vjp]:
        """norm(x + fc2(relu(fc1(x))))."""
        inner, into = self.linear(f"{layer}.fc1", x)
        active, through_relu = relu_vjp(inner)
        y, out_of = self.linear(f"{layer}.fc2", active)
        return self._added(f"{layer}.final_layer_norm", x, y, lambda grad: into(through_relu(out_of(grad))))

    def _added(self, norm: str, x: Array, y: Array, through: Vjp) -> tuple[Array, Vjp]:
        z, through_norm = self.norm(norm, x + y, NORM_EPSILON)

        def vjp(grad: Array) -> Array:
            grad = through_norm(grad)
            return grad + through(grad)

        return z, vjp


def loss_and_gradients(
    config: Config,
    weights: Weights,
    sources: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
    smoothing: float = 0.0,
) -> tuple[float, Weights]:
    """Return the mean loss of each target token, given source and earlier tokens, and the gradients of all weights."""
    gradients, embed = TransformerGradients(weights, config), Embedding(weights, "encoder", config)
    ids, lengths = padded(sources)
    wanted, counts = padded(targets)
    given = np.pad(wanted[:, :-1], ((0, 0), (1, 0)), constant_values=START)
    x, through_encoder = encoder_vjp(gradients, embed(ids), lengths)
    encoded = Encoded(x, lengths, np.zeros_like(x))
    y, through_decoder = decoder_vjp(gradients, embed(given), encoded)
    real = np.arange(wanted.shape[1]) < counts[:, None]
    last, vectors = y[real], weights["model.shared.weight"]
    loss, grad_logits = cross_entropy(last @ vectors.T, wanted[real], smoothing)
    grad = np.zeros_like(y)
    grad[real] = grad_logits @ vectors
    of_given = embedding_gradient(given, through_decoder(grad), len(vectors))
    of_sources = embedding_gradient(ids, through_encoder(encoded.grad), len(vectors))
    gradients.found["model.shared.weight"] = grad_logits.T @ last + embed.scale * (of_given + of_sources)
    return loss, gradients.found


def encoder_vjp(gradients: TransformerGradients, x: Array, lengths: Array) -> tuple[Array, Vjp]:
    """Return the output of the encoder's layers."""
    steps: list[Vjp] = []
    for i in range(gradients.config.layers):
        name = f"model.encoder.layers.{i}"
        x, through_attention = gradients.attention(f"{name}.self_attn", x, kv_lens=lengths)
        x, through_feed_forward = gradients.feed_forward(name, x)
        steps += [through_attention, through_feed_forward]
    return x, chain(steps)


def decoder_vjp(gradients: TransformerGradients, x: Array, encoded: Encoded) -> tuple[Array, Vjp]:
    """Return the output of the decoder's layers; padding after a target changes nothing before it."""
    steps: list[Vjp] = []
    for i in range(gradients.config.layers):
        name = f"model.decoder.layers.{i}"
        x, through_attention = gradients.attention(f"{name}.self_attn", x, causal=True)
        x, through_cross = gradients.attention(f"{name}.encoder_attn", x, encoded)
        x, through_feed_forward = gradients.feed_forward(name, x)
        steps += [through_attention, through_cross, through_feed_forward]
    return x, chain(steps)


def chain(steps: Sequence[Vjp]) -> Vjp:
    """Return the function that takes a gradient back through all steps, from the last."""
    return lambda grad: reduce(lambda passed, vjp: vjp(passed), reversed(steps), grad)
