"""The interface of a peer, and the two peers that are always available."""

from __future__ import annotations

import importlib
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

import selfattn

from .check import join_heads, split_heads
from .dense import dense_bias, dense_mask
from .numbers import NARROW_ROUNDOFF
from .workload import Array, Arrays, Workload

Run = Callable[[], Any]

MAX_SCORES_BYTES = 2**31  # largest score matrix that a peer may store: 2 GiB

LAYER_INPUTS = ("w_q", "w_k", "w_v", "w_o", "b_q", "b_k", "b_v", "b_o")


class CannotRun(Exception):
    """A peer turned out to be unable to run a workload that it seemed to support."""


class Peer(ABC):
    """An implementation of attention to be measured.

    Attributes
    ----------
    name : str
        Its name in `--peers`.
    label : str
        Its name in tables and plots.
    module : str
        The module that must be importable.
    by_default : bool
        Whether it runs if no peers are named.
    in_tables : bool
        Whether its times are shown in tables.
    """

    name: str
    label: str
    module: str
    by_default = True
    in_tables = True

    def available(self) -> bool:
        """Whether the module is installed."""
        return importlib.util.find_spec(self.module) is not None

    def version(self) -> str:
        """Return the version of the module."""
        return str(importlib.import_module(self.module).__version__)

    def why_not(self, workload: Workload) -> str:
        """Why this peer cannot run the workload; empty if it can."""
        return ""

    def answered(self, workload: Workload) -> Workload:
        """Return the workload that this peer actually computes; only variants of selfattn compute a different one."""
        return workload

    def operands(self, workload: Workload, arrays: Arrays) -> Arrays:
        """Return the arrays of the workload from `answered`."""
        return arrays

    def held(self, workload: Workload, arrays: Arrays) -> Arrays:
        """Return the arrays as its call reads them: k and v are rounded if they are stored in a narrower dtype."""
        return arrays

    def supports(self, workload: Workload) -> bool:
        """Whether this peer can run the workload."""
        return not self.why_not(workload)

    @abstractmethod
    def prepare(self, workload: Workload, arrays: Arrays, threads: int) -> Run:
        """Do all work that a user would do only once, and return the call to be timed.

        The call returns something `numpy.asarray` accepts, shaped like selfattn's output.

        Raises
        ------
        CannotRun
            If the peer rejects the workload after all.
        """


class Own(Peer):
    """selfattn itself."""

    name = label = module = "selfattn"

    def prepare(self, workload: Workload, arrays: Arrays, threads: int) -> Run:
        """See `Peer.prepare`."""
        options = {**workload.attention_options(arrays), "num_threads": threads}
        if workload.precision != "highest":
            options["precision"] = workload.precision
        if workload.kind == "layer":
            weights: dict[str, Any] = {name: arrays[name] for name in LAYER_INPUTS}
            layer = selfattn.SelfAttention(**weights, num_heads=workload.num_heads, num_kv_heads=workload.num_kv_heads)
            return partial(layer, arrays["x"], **options)
        return partial(selfattn.attention, *(arrays[name] for name in "qkv"), **options)


class NumPy(Peer):
    """softmax(q kᵀ) v as a NumPy user would write it: unfused, with in-place operations where that is easy.

    `threads` has no effect here: NumPy's BLAS reads its number of threads from the environment at import.
    """

    name, label, module = "numpy", "NumPy", "numpy"

    def why_not(self, workload: Workload) -> str:
        """See `Peer.why_not`."""
        if workload.dtype in NARROW_ROUNDOFF:
            return "it multiplies 16-bit numbers one at a time"
        pairs = workload.batch * workload.num_heads * workload.q_len * workload.kv_len
        mask_bytes = workload.q_len * workload.kv_len
        if pairs * workload.itemsize + mask_bytes > MAX_SCORES_BYTES:
            return "its score matrix would take more than 2 GiB"
        return ""

    def prepare(self, workload: Workload, arrays: Arrays, threads: int) -> Run:
        """See `Peer.prepare`."""
        mask, bias = dense_mask(workload, arrays), dense_bias(workload, arrays)
        hidden = None if mask is None else ~mask
        softcap, scale = workload.options.softcap, workload.scale

        def attend(q: Array, k: Array, v: Array) -> Array:
            return numpy_attention((q, k, v), scale=scale, softcap=softcap, bias=bias, hidden=hidden)

        if workload.kind == "attention":
            q, k, v = (arrays[name] for name in "qkv")
            return lambda: attend(q, k, v)
        x, w_q, w_k, w_v, w_o, b_q, b_k, b_v, b_o = (arrays[n] for n in ("x", *LAYER_INPUTS))

        def layer() -> Array:
            q = split_heads(x @ w_q + b_q, workload.num_heads)
            k = split_heads(x @ w_k + b_k, workload.num_kv_heads)
            v = split_heads(x @ w_v + b_v, workload.num_kv_heads)
            return np.asarray(join_heads(attend(q, k, v)) @ w_o + b_o)

        return layer


def numpy_attention(
    operands: tuple[Array, Array, Array],
    *,
    scale: float,
    softcap: float | None,
    bias: Array | None,
    hidden: Array | None,
) -> Array:
    """Attention of q (B, H, Sq, D), k (B, Hkv, Sk, D), v (B, Hkv, Sk, Dv) in q's dtype."""
    q, k, v = operands
    batch, num_heads, q_len, head_dim = q.shape
    num_kv_heads, kv_len = k.shape[1:3]
    grouped = q.reshape(batch, num_kv_heads, -1, head_dim)
    scores = (grouped @ k.swapaxes(-1, -2)).reshape(batch, num_heads, q_len, kv_len)
    scores *= scale
    if softcap is not None:
        scores /= softcap
        np.tanh(scores, out=scores)
        scores *= softcap
    if bias is not None:
        scores += bias
    if hidden is not None:
        np.copyto(scores, -np.inf, where=hidden)
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    out: Array = scores.reshape(batch, num_kv_heads, -1, kv_len) @ v
    return out.reshape(batch, num_heads, q_len, v.shape[-1])
