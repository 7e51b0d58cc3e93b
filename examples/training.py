"""The parts of training besides attention: gradients of the other layers, and the AdamW optimiser, in NumPy.

A function named ``..._vjp`` returns its result and a function that computes the gradients of the arguments from the
result's gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from nn import Array

import selfattn as sa

Weights = dict[str, Array]
Vjp = Callable[[Array], Array]

CHUNK = 1 << 14  # numbers per call of an elementwise function, so that its temporaries stay in the cache


def linear_vjp(x: Array, weight: Array, bias: Array) -> tuple[Array, Callable[[Array], tuple[Array, Array, Array]]]:
    """Return x @ weight + bias."""

    def vjp(grad: Array) -> tuple[Array, Array, Array]:
        rows, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        return (grads @ weight.T).reshape(x.shape), rows.T @ grads, grads.sum(axis=0)

    rows = x.reshape(-1, x.shape[-1]) @ weight
    rows += bias
    return rows.reshape(*x.shape[:-1], -1), vjp


def layer_norm_vjp(
    x: Array, weight: Array, bias: Array, epsilon: float
) -> tuple[Array, Callable[[Array], tuple[Array, Array, Array]]]:
    """Return x, normalised to mean 0 and variance 1, then scaled and shifted."""
    centred = x - x.mean(axis=-1, keepdims=True)
    rate = 1 / np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + x.dtype.type(epsilon))
    unit = centred * rate

    def vjp(grad: Array) -> tuple[Array, Array, Array]:
        inner = grad * weight
        along = inner.mean(axis=-1, keepdims=True) + unit * (inner * unit).mean(axis=-1, keepdims=True)
        axes = tuple(range(grad.ndim - 1))
        return rate * (inner - along), (grad * unit).sum(axis=axes), grad.sum(axis=axes)

    return unit * weight + bias, vjp


def in_threads(compute: Callable[[slice], None], count: int) -> None:
    """Call ``compute`` for chunks of ``count`` numbers, on as many threads as selfattn uses.

    NumPy computes elementwise functions on the calling thread, but without the GIL.
    """
    threads = sa.get_num_threads()
    bounds = [count * i // threads for i in range(threads + 1)]

    def share(thread: int) -> None:
        first, end = bounds[thread : thread + 2]
        for start in range(first, end, CHUNK):
            compute(slice(start, min(start + CHUNK, end)))

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(share, range(threads)))


def gelu_tanh_vjp(x: Array) -> tuple[Array, Vjp]:
    """Return the approximation of x · Φ(x) by tanh."""
    y, slope = np.empty_like(x), np.empty_like(x)
    rate = x.dtype.type(math.sqrt(2 / math.pi))
    flat, values, slopes = x.reshape(-1), y.reshape(-1), slope.reshape(-1)

    def compute(chunk: slice) -> None:
        part = flat[chunk]
        square = part * part
        bent = np.tanh(rate * part * (1 + 0.044715 * square))
        values[chunk] = 0.5 * part * (1 + bent)
        inner = rate * (1 + 3 * 0.044715 * square)
        slopes[chunk] = 0.5 * (1 + bent) + 0.5 * part * (1 - bent * bent) * inner

    in_threads(compute, x.size)
    return y, lambda grad: grad * slope


def relu_vjp(x: Array) -> tuple[Array, Vjp]:
    """Return x where it is positive, else 0."""
    y = np.maximum(x, 0)
    return y, lambda grad: grad * (y > 0)


def cross_entropy(logits: Array, targets: Array, smoothing: float = 0.0) -> tuple[float, Array]:
    """Return the mean of −log p(target), in nats, and its gradient with respect to the logits.

    Label smoothing (Szegedy et al., 2016) takes the share `smoothing` of the target's probability and spreads it over
    all words.
    """
    rows, wanted = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    shifted = rows - rows.max(axis=-1, keepdims=True)
    probs = np.exp(shifted)
    total = probs.sum(axis=-1, keepdims=True)
    index = np.arange(len(wanted))
    expected = (1 - smoothing) * shifted[index, wanted] + smoothing * shifted.mean(axis=-1)
    loss = float((np.log(total[:, 0]) - expected).mean(dtype=np.float64))
    probs /= total
    probs -= smoothing / logits.shape[-1]
    probs[index, wanted] -= 1 - smoothing
    probs /= len(wanted)
    return loss, probs.reshape(logits.shape)


def embedding_gradient(ids: Array, grad: Array, count: int) -> Array:
    """Return the gradient of a table of `count` vectors, given the gradients of the vectors that `ids` took from it."""
    rows, order = grad.reshape(-1, grad.shape[-1]), np.argsort(ids, axis=None, kind="stable")
    found, starts = np.unique(ids.reshape(-1)[order], return_index=True)
    table = np.zeros((count, grad.shape[-1]), dtype=grad.dtype)
    table[found] = np.add.reduceat(rows[order], starts, axis=0)
    return table


class Gradients:
    """Collects the gradients of weights by name while gradients flow back through a model."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.found: Weights = {}

    def norm(self, part: str, x: Array, epsilon: float) -> tuple[Array, Vjp]:
        """Layer norm with the weights `part`."""
        y, vjp = layer_norm_vjp(x, *self.pair(part), epsilon)
        return y, lambda grad: self._passed(part, *vjp(grad))

    def linear(self, part: str, x: Array) -> tuple[Array, Vjp]:
        """Linear map with the weights `part`."""
        y, vjp = linear_vjp(x, *self.pair(part))
        return y, lambda grad: self._passed(part, *vjp(grad))

    def pair(self, part: str) -> tuple[Array, Array]:
        """Return a part's weight and bias; a matrix is ready for x @ weight."""
        return self.weights[f"{part}.weight"], self.weights[f"{part}.bias"]

    def keep(self, part: str, weight: Array, bias: Array) -> None:
        """Store the gradients of a part's weight and bias."""
        self.found[f"{part}.weight"], self.found[f"{part}.bias"] = weight, bias

    def _passed(self, part: str, x: Array, weight: Array, bias: Array) -> Array:
        self.keep(part, weight, bias)
        return x


def clip(gradients: Mapping[str, Array], largest: float) -> float:
    """Scale all gradients so that their common norm is at most `largest`; return the norm before."""
    norm = math.sqrt(sum(float(np.vdot(x, x)) for x in gradients.values()))
    if norm > largest:
        for gradient in gradients.values():
            gradient *= gradient.dtype.type(largest / norm)
    return norm


def inverse_root_rate(step: int, width: int, warm_up: int) -> float:
    """Return the rate of a step as Vaswani et al. (2017) set it: linear warm-up, then 1 / √step."""
    return width**-0.5 * min((step + 1) ** -0.5, (step + 1) * warm_up**-1.5)


def learning_rate(step: int, peak: float, warm_up: int, steps: int) -> float:
    """Return the rate of a step: it rises linearly during the warm-up, then falls along a cosine to a tenth."""
    if step < warm_up:
        return peak * (step + 1) / warm_up
    share = (step - warm_up) / max(1, steps - warm_up)
    return peak * (0.55 + 0.45 * math.cos(math.pi * min(share, 1.0)))


@dataclass
class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019). Vectors (biases, norms) do not decay.

    With `averaging` above 0 it also keeps a moving average of the weights, to which each step contributes this share.
    """

    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    decay: float = 0.1
    averaging: float = 0.0
    steps: int = 0
    first: Weights = field(default_factory=dict)  # moving averages of the gradients and of their squares
    second: Weights = field(default_factory=dict)
    mean: Weights = field(default_factory=dict)  # moving average of the weights

    def update(self, weights: Weights, gradients: Mapping[str, Array], rate: float) -> None:
        """Change the weights in place."""
        self.steps += 1
        unbias1, unbias2 = 1 - self.beta1**self.steps, 1 - self.beta2**self.steps
        for name, gradient in gradients.items():
            weight = weights[name]
            first = self.first.setdefault(name, np.zeros_like(weight))
            second = self.second.setdefault(name, np.zeros_like(weight))
            first += (1 - self.beta1) * (gradient - first)
            second += (1 - self.beta2) * (gradient * gradient - second)
            if weight.ndim > 1:
                weight *= 1 - rate * self.decay
            weight -= (rate / unbias1) * first / (np.sqrt(second / unbias2) + self.epsilon)
            if self.averaging:
                mean = self.mean.setdefault(name, weight.copy())
                mean += self.averaging * (weight - mean)

    def state(self) -> dict[str, Any]:
        """Return everything that a checkpoint needs."""
        kept = {"first": self.first, "second": self.second, "mean": self.mean}
        arrays = {f"{kind}/{name}": x for kind, weights in kept.items() for name, x in weights.items()}
        return arrays | {"steps": np.array(self.steps)}

    def restore(self, state: Mapping[str, Array]) -> None:
        """Continue from what `state` returned."""
        self.steps = int(state["steps"])
        for name, array in state.items():
            kind, _, weight = name.partition("/")
            if weight:
                getattr(self, kind)[weight] = array
