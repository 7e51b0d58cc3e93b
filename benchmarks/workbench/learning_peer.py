"""Models in PyTorch that training is compared with: a layer of BERT, and the decoder of the GPT example."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

WIDTH, HEADS = 768, 12
Layer = dict[str, torch.Tensor]


def layer_weights(generator: torch.Generator) -> Layer:
    """Return the weights of a layer of BERT base."""
    sizes = {"qkv": (3 * WIDTH, WIDTH), "out": (WIDTH, WIDTH), "up": (4 * WIDTH, WIDTH), "down": (WIDTH, 4 * WIDTH)}
    weights = {}
    for name, size in sizes.items():
        weights[name] = (torch.randn(size, generator=generator) * 0.02).requires_grad_()
        weights[f"{name}.bias"] = torch.zeros(size[0], requires_grad=True)
    return weights


def layer_gradients(x: torch.Tensor, weights: Layer, attention: Callable[..., Any]) -> list[torch.Tensor]:
    """Return the gradients of a layer's weights: norm(x + attention(x)), then the same with the feed-forward part."""

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.linear(x, weights[name], weights[f"{name}.bias"])

    q, k, v = linear(x, "qkv").unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    x = functional.layer_norm(x + linear(attention(q, k, v).transpose(1, 2).flatten(2), "out"), (WIDTH,))
    y = functional.layer_norm(x + linear(functional.gelu(linear(x, "up")), "down"), (WIDTH,))
    # The squares of normalised rows would have a constant sum, and so no gradient.
    return list(torch.autograd.grad(y.pow(3).sum(), list(weights.values())))


class Gpt:
    """GPT-2's decoder with the weights of the example, and its optimiser.

    Parameters
    ----------
    config : Config
        Of examples/decoder.py.
    weights : dict of str to ndarray
    """

    def __init__(self, config: Any, weights: dict[str, Any]) -> None:
        self.config = config
        self.weights = {name: torch.from_numpy(x.copy()).requires_grad_() for name, x in weights.items()}
        matrices = [x for x in self.weights.values() if x.ndim > 1]
        vectors = [x for x in self.weights.values() if x.ndim == 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95))

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return functional.layer_norm(x, x.shape[-1:], weight, bias, self.config.epsilon)

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        rows = torch.addmm(self.weights[f"{name}.bias"], x.flatten(0, 1), self.weights[f"{name}.weight"])
        return rows.unflatten(0, x.shape[:2])

    def loss(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the mean loss of predicting each token from those before."""
        ids, targets = tokens[:, :-1], tokens[:, 1:]
        table = self.weights["wte.weight"]
        x = table[ids] + self.weights["wpe.weight"][: ids.shape[1]]
        for i in range(self.config.layers):
            qkv = self._linear(self._norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn")
            q, k, v = qkv.unflatten(-1, (3, self.config.heads, -1)).permute(2, 0, 3, 1, 4)
            attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self._linear(attended.transpose(1, 2).flatten(2), f"h.{i}.attn.c_proj")
            inner = self._linear(self._norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
            x = x + self._linear(functional.gelu(inner, approximate="tanh"), f"h.{i}.mlp.c_proj")
        logits = functional.linear(self._norm(x, "ln_f"), table)
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def step(self, tokens: torch.Tensor) -> None:
        """Train on one batch."""
        self.optimiser.zero_grad()
        self.loss(tokens).backward()
        torch.nn.utils.clip_grad_norm_(list(self.weights.values()), 1.0)
        self.optimiser.step()
