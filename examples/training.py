"""The parts of training besides attention: gradients of the other layers, and the AdamW optimiser, in NumPy.

A function named ``..._vjp`` returns its result and a function that computes the gradients of the arguments from the
result's gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import numpy as np
from nn import Array

import selfattn as sa

Weights = dict[str, Array]
Vjp = Callable[[Array], Array]

CHUNK = 1 << 14  # numbers per call of an elementwise function, so that its temporaries stay in the cache


def in_threads(compute: Callable[[slice], None], count: int, width: int = 1) -> None:
    """Call ``compute`` for parts of ``count`` rows of ``width`` numbers, on as many threads as selfattn uses.

    NumPy computes elementwise functions on the calling thread, but without the GIL.
    """
    step, threads = max(1, CHUNK // width), sa.get_num_threads()
    if count <= step:
        compute(slice(0, count))
        return
    bounds = [count * i // threads for i in range(threads + 1)]

    def share(thread: int) -> None:
        first, end = bounds[thread : thread + 2]
        for start in range(first, end, step):
            compute(slice(start, min(start + step, end)))

    list(workers(threads).map(share, range(threads)))


@cache
def workers(threads: int) -> ThreadPoolExecutor:
    """Return threads, which are started once."""
    return ThreadPoolExecutor(threads)


def rows_of(x: Array) -> Array:
    """Return the vectors along the last axis as rows of a matrix."""
    return x.reshape(-1, x.shape[-1])


def linear_vjp(x: Array, weight: Array, bias: Array) -> tuple[Array, Callable[[Array], tuple[Array, Array, Array]]]:
    """Return x @ weight + bias."""

    def vjp(grad: Array) -> tuple[Array, Array, Array]:
        rows, grads = rows_of(x), rows_of(grad)
        return (grads @ weight.T).reshape(x.shape), rows.T @ grads, grads.sum(axis=0)

    rows = rows_of(x) @ weight
    rows += bias
    return rows.reshape(*x.shape[:-1], -1), vjp


def layer_norm_vjp(
    x: Array, weight: Array, bias: Array, epsilon: float
) -> tuple[Array, Callable[[Array], tuple[Array, Array, Array]]]:
    """Return x, normalised to mean 0 and variance 1, then scaled and shifted."""
    rows = rows_of(x)
    y, unit, rate = np.empty_like(rows), np.empty_like(rows), np.empty_like(rows[:, :1])

    def normalise(part: slice) -> None:
        centred = rows[part] - rows[part].mean(axis=-1, keepdims=True)
        rate[part] = 1 / np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + x.dtype.type(epsilon))
        unit[part] = centred * rate[part]
        y[part] = unit[part] * weight + bias

    def vjp(grad: Array) -> tuple[Array, Array, Array]:
        grads, found = rows_of(grad), np.empty_like(rows)

        def differentiate(part: slice) -> None:
            inner, own = grads[part] * weight, unit[part]
            along = inner.mean(axis=-1, keepdims=True) + own * (inner * own).mean(axis=-1, keepdims=True)
            found[part] = rate[part] * (inner - along)

        in_threads(differentiate, *found.shape)
        return found.reshape(x.shape), np.einsum("ij,ij->j", grads, unit), grads.sum(axis=0)

    in_threads(normalise, *rows.shape)
    return y.reshape(x.shape), vjp


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

    def vjp(grad: Array) -> Array:
        grads, found = grad.reshape(-1), np.empty_like(flat)
        in_threads(lambda part: np.multiply(grads[part], slopes[part], out=found[part]), x.size)
        return found.reshape(x.shape)

    in_threads(compute, x.size)
    return y, vjp


def relu_vjp(x: Array) -> tuple[Array, Vjp]:
    """Return x where it is positive, else 0."""
    y = np.maximum(x, 0)
    return y, lambda grad: grad * (y > 0)


def cross_entropy(logits: Array, targets: Array, smoothing: float = 0.0) -> tuple[float, Array]:
    """Return the mean of −log p(target), in nats, and its gradient with respect to the logits.

    Label smoothing (Szegedy et al., 2016) takes the share `smoothing` of the target's probability and spreads it over
    all words.
    """
    rows, wanted = rows_of(logits), targets.reshape(-1)
    grads, losses = np.empty_like(rows), np.empty(len(rows))

    def compare(part: slice) -> None:
        shifted = rows[part] - rows[part].max(axis=-1, keepdims=True)
        probs = np.exp(shifted)
        total = probs.sum(axis=-1, keepdims=True)
        place = np.arange(len(probs)), wanted[part]
        losses[part] = np.log(total[:, 0]) - (1 - smoothing) * shifted[place] - smoothing * shifted.mean(axis=-1)
        probs /= total
        probs -= smoothing / logits.shape[-1]
        probs[place] -= 1 - smoothing
        grads[part] = probs / len(wanted)

    in_threads(compare, *rows.shape)
    return float(losses.mean()), grads.reshape(logits.shape)


def embedding_gradient(ids: Array, grad: Array, count: int) -> Array:
    """Return the gradient of a table of `count` vectors, given the gradients of the vectors that `ids` took from it."""
    rows, order = rows_of(grad), np.argsort(ids, axis=None, kind="stable")
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
        for name, gradient in gradients.items():
            weight = weights[name]
            first = self.first.setdefault(name, np.zeros_like(weight))
            second = self.second.setdefault(name, np.zeros_like(weight))
            mean = self.mean.setdefault(name, weight.copy()) if self.averaging else weight
            change = partial(self._change, (weight, gradient, first, second, mean), rate)
            in_threads(change, len(weight), weight.size // len(weight))

    def _change(self, arrays: tuple[Array, ...], rate: float, part: slice) -> None:
        unbias1, unbias2 = 1 - self.beta1**self.steps, 1 - self.beta2**self.steps
        weight, gradient, first, second, mean = (x[part] for x in arrays)
        first += (1 - self.beta1) * (gradient - first)
        second += (1 - self.beta2) * (gradient * gradient - second)
        if weight.ndim > 1:
            weight *= 1 - rate * self.decay
        weight -= (rate / unbias1) * first / (np.sqrt(second / unbias2) + self.epsilon)
        if self.averaging:
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
