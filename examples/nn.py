"""The parts of these models other than attention, in NumPy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

BLOCK = 8  # rows that `linear` multiplies at a time
CHUNK = 1 << 14  # numbers that `gelu` works on at a time: its temporaries stay in the cache


@dataclass(frozen=True)
class LayerNorm:
    """Normalises each vector to mean 0 and variance 1, then scales and shifts it."""

    weight: Array
    bias: Array
    epsilon: float

    def __call__(self, x: Array) -> Array:
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = np.square(centred).mean(axis=-1, keepdims=True)
        return np.asarray(centred / np.sqrt(variance + x.dtype.type(self.epsilon)) * self.weight + self.bias)


def gelu(x: Array) -> Array:
    """Return x · Φ(x), the form that BERT was trained with."""
    return _in_chunks(lambda part: 0.5 * part * (1 + _erf(part / math.sqrt(2))), x)


def gelu_tanh(x: Array) -> Array:
    """Return the approximation of `gelu` that GPT-2 was trained with."""
    return _in_chunks(lambda p: 0.5 * p * (1 + np.tanh(math.sqrt(2 / math.pi) * (p + 0.044715 * p * p * p))), x)


def relu(x: Array) -> Array:
    """Return x where it is positive, else 0."""
    return np.maximum(x, 0)


def sigmoid(x: Array) -> Array:
    """Return 1 / (1 + exp(-x)) without overflow."""
    return np.asarray(0.5 * np.tanh(0.5 * x) + 0.5, dtype=x.dtype)


def silu(x: Array) -> Array:
    """Return x · sigmoid(x)."""
    return x * sigmoid(x)


def sinusoids(positions: Array, rates: Array) -> Array:
    """Return position vectors, float32: the sines of position · rate, then the cosines.

    Vaswani et al. alternate sines and cosines; only the order of the model's features differs.
    """
    angles = np.outer(positions, rates)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """Return x @ weight + bias. A row's result is bit-identical whatever the other rows are and however many.

    A BLAS uses another kernel for another number of rows, which rounds differently. So all products here have the
    same shape, and the last is padded with rows of zeros.
    """
    rows = x.reshape(-1, x.shape[-1])
    blocks = np.zeros((-(-len(rows) // BLOCK), BLOCK, rows.shape[1]), dtype=x.dtype)
    blocks.reshape(-1, rows.shape[1])[: len(rows)] = rows
    product = np.matmul(blocks, weight).reshape(-1, weight.shape[1])[: len(rows)]
    y = product.reshape(*x.shape[:-1], weight.shape[1])
    return y if bias is None else np.asarray(y + bias)


def conv1d(x: Array, weight: Array, bias: Array, stride: int = 1) -> Array:
    """Return the convolution of x (S, C) along S with weight (C_out, C, K), K odd: (ceil(S / stride), C_out).

    Output i sees the K inputs around i · stride, zeros beyond the ends.
    """
    size = weight.shape[2]
    padded = np.pad(x, ((size // 2, size // 2), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, size, axis=0)[::stride]  # (.., C, K)
    return np.asarray(windows.reshape(len(windows), -1) @ weight.reshape(len(weight), -1).T + bias)


def _in_chunks(function: Callable[[Array], Array], x: Array) -> Array:
    # Large temporaries are new memory, whose first use costs a page fault per 4 KiB; small ones are recycled.
    y = np.empty(x.shape, dtype=x.dtype)
    flat, out = x.reshape(-1), y.reshape(-1)
    for start in range(0, x.size, CHUNK):
        out[start : start + CHUNK] = function(flat[start : start + CHUNK])
    return y


def _erf(x: Array) -> Array:
    # NumPy has none. Abramowitz and Stegun 7.1.26, off by at most 1.5e-7.
    t = 1 / (1 + 0.3275911 * np.abs(x))
    tail = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    return np.asarray(np.copysign(1 - tail * np.exp(-x * x), x))
