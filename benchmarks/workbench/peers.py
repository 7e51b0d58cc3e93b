"""Peers in addition to those of `selfattn bench`, in the order of the table's columns, and selfattn's own variants."""

from __future__ import annotations

from selfattn._bench.peers import add

from .cache_variants import CACHE_VARIANTS
from .cached import OwnOnCaches
from .jax_peer import Jax
from .onnx_peer import OnnxRuntime
from .openvino_peer import OpenVino
from .variants import NarrowHeads, OneThread, WithoutOption
from .vllm_peer import Vllm

NARROW_HEADS = (NarrowHeads(32), NarrowHeads(64))

add(OwnOnCaches(), OnnxRuntime(), OpenVino(), Jax(), Vllm())
add(WithoutOption(), OneThread(), *NARROW_HEADS, *CACHE_VARIANTS)
