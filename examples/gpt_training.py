"""The gradients of GPT-2's decoder (decoder.py), by the chain rule, layer after layer."""

from __future__ import annotations

from typing import Any

import numpy as np
from decoder import Config
from nn import Array
from training import Gradients, Vjp, Weights, cross_entropy, embedding_gradient, gelu_tanh_vjp

import selfattn as sa


class GptGradients(Gradients):
    """Gradients of a model with GPT-2's attention."""

    def attention(self, part: str, x: Array, heads: int, **options: Any) -> tuple[Array, Vjp]:
        """Causal self-attention; its three input projections are stored as one."""
        w_qkv, b_qkv = self.weights[f"{part}.c_attn.weight"], self.weights[f"{part}.c_attn.bias"]
        w_q, w_k, w_v = np.split(w_qkv, 3, axis=1)
        b_q, b_k, b_v = np.split(b_qkv, 3)
        w_o, b_o = self.weights[f"{part}.c_proj.weight"], self.weights[f"{part}.c_proj.bias"]
        y, vjp = sa.self_attention_vjp(
            x, w_q, w_k, w_v, w_o, b_q=b_q, b_k=b_k, b_v=b_v, b_o=b_o, num_heads=heads, causal=True,
            wrt=("x", "w_q", "w_k", "w_v", "w_o", "b_q", "b_k", "b_v", "b_o"), **options,
        )  # fmt: skip

        def backward(grad: Array) -> Array:
            g = vjp(grad)
            self.keep(f"{part}.c_proj", g["w_o"], g["b_o"])
            qkv = np.concatenate([g["w_q"], g["w_k"], g["w_v"]], axis=1)
            self.keep(f"{part}.c_attn", qkv, np.concatenate([g["b_q"], g["b_k"], g["b_v"]]))
            return g["x"]

        return y, backward


def block_vjp(gradients: GptGradients, layer: int, config: Config, x: Array) -> tuple[Array, Vjp]:
    """Return y + feed_forward(norm(y)) with y = x + attention(norm(x))."""
    name = f"h.{layer}"
    normed, through_norm = gradients.norm(f"{name}.ln_1", x, config.epsilon)
    attended, through_attention = gradients.attention(f"{name}.attn", normed, config.heads, scale=config.scale(layer))
    x = x + attended
    normed, through_norm2 = gradients.norm(f"{name}.ln_2", x, config.epsilon)
    inner, into = gradients.linear(f"{name}.mlp.c_fc", normed)
    active, through_gelu = gelu_tanh_vjp(inner)
    added, out_of = gradients.linear(f"{name}.mlp.c_proj", active)

    def vjp(grad: Array) -> Array:
        grad = grad + through_norm2(into(through_gelu(out_of(grad))))
        return grad + through_norm(through_attention(grad))

    return x + added, vjp


def loss_and_gradients(config: Config, weights: Weights, tokens: Array) -> tuple[float, Weights]:
    """Return the mean loss of predicting each token (B, S + 1) from earlier ones, and the gradients of all weights."""
    ids, targets = tokens[:, :-1], tokens[:, 1:]
    gradients = GptGradients(weights)
    vectors = weights["wte.weight"]
    x = vectors[ids] + weights["wpe.weight"][: ids.shape[1]]
    steps: list[Vjp] = []
    for layer in range(config.layers):
        x, vjp = block_vjp(gradients, layer, config, x)
        steps.append(vjp)
    x, through_norm = gradients.norm("ln_f", x, config.epsilon)
    loss, grad_logits = cross_entropy(x @ vectors.T, targets)
    grad = through_norm(grad_logits @ vectors)
    for vjp in reversed(steps):
        grad = vjp(grad)
    found = gradients.found
    logits, last = grad_logits.reshape(-1, len(vectors)), x.reshape(-1, x.shape[-1])
    found["wte.weight"] = logits.T @ last + embedding_gradient(ids, grad, len(vectors))
    found["wpe.weight"] = np.zeros_like(weights["wpe.weight"])
    found["wpe.weight"][: ids.shape[1]] = grad.sum(axis=0)
    return loss, found
