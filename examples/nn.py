"""Functions that these models need besides layers."""

from __future__ import annotations

from typing import Any

import numpy as np

import selfattn as sa

Array = np.ndarray[Any, np.dtype[Any]]


def sigmoid(x: Array) -> Array:
    """Return 1 / (1 + exp(-x)) without overflow."""
    return np.asarray(0.5 * np.tanh(0.5 * x) + 0.5, dtype=x.dtype)


def sinusoids(positions: Array, rates: Array) -> Array:
    """Return position vectors, float32: the sines of position · rate, then the cosines.

    Vaswani et al. alternate sines and cosines; only the order of the model's features differs.
    """
    angles = np.outer(positions, rates)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


def conv1d(x: Array, layer: sa.Linear, stride: int = 1) -> Array:
    """Return the convolution of x (S, C) along S: (ceil(S / stride), C_out). The layer's weights are (C · K, C_out).

    Output i sees the K inputs around i · stride, zeros beyond the ends; K is odd.
    """
    size = layer.d_in // x.shape[1]
    padded = np.pad(x, ((size // 2, size // 2), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, size, axis=0)[::stride]  # (.., C, K)
    return layer(windows.reshape(len(windows), -1))
