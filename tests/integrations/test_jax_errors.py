"""What JAX's attention function, computed by selfattn, refuses, and what it tells XLA about itself."""

from __future__ import annotations

import ctypes
import re
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from jax_operands import attend, jax, lengths, mask, normal, qkv

from selfattn import _core

# XLA's INVALID_ARGUMENT: the first in a program that runs on the caller's thread, the second from another thread.
RUN_ERRORS = (ValueError, jax.errors.JaxRuntimeError)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"key": normal(2, 2, 7, 2, 4), "value": normal(2, 2, 7, 2, 4)},
            ValueError,
            "key has head_dim 4 but query has",
        ),
        ({"query": normal(1, 2, 9, 3, 8)}, ValueError, "query has 3 heads, which is not a multiple of the 2"),
        ({"value": normal(1, 2, 9, 2, 8)}, ValueError, r"value has shape \(2, 9, 2, 8\) but key has \(2, 7, 2, 8\)"),
        ({"query": normal(1, 3, 9, 4, 8)}, ValueError, "key has a batch of 2 but query has 3"),
        ({"query": normal(1, 9, 8)[0]}, ValueError, "3 or 4 dimensions are needed"),
        ({"query": normal(1, 2, 9, 4, 8, dtype="bfloat16")}, TypeError, "key has dtype float32 but query has bfloat16"),
        ({"query": lengths(1)}, TypeError, "query has dtype int32, but float16, bfloat16, float32"),
        ({"query": normal(1, 2, 9, 4, 0)}, ValueError, "query has head_dim 0"),
        ({"bias": lengths(1)}, TypeError, "bias has dtype int32, but float16, bfloat16, float32"),
        ({"bias": normal(1, 3, 1, 9, 7)}, ValueError, r"bias has shape \(3, 1, 9, 7\), which does not broadcast to"),
        ({"mask": normal(1, 9, 7)}, TypeError, "mask has dtype float32, but bool is needed"),
        ({"mask": mask(1, 2, 4, 9, 7)}, ValueError, r"mask has shape \(1, 2, 4, 9, 7\), which does not broadcast to"),
        ({"scale": "2"}, TypeError, "scale is '2', but a real number is needed"),
        ({"is_causal": 1}, TypeError, "is_causal is 1, but True or False is needed"),
        ({"query_seq_lengths": lengths(1)}, ValueError, r"query_seq_lengths has shape \(1,\), but \(2,\) is needed"),
        ({"query_seq_lengths": normal(1, 2)}, TypeError, "query_seq_lengths has dtype float32, but int32 or int64"),
        ({"local_window_size": (1, -1)}, ValueError, r"local_window_size is \(1, -1\), but it cannot be negative"),
        ({"implementation": "cudnn"}, ValueError, "implementation is 'cudnn'"),
    ],
)
def test_errors_when_traced(change: Any, error: Any, message: str) -> None:
    q, k, v = qkv()
    with pytest.raises(error, match=f"^dot_product_attention: .*{message}"):
        attend(**{"query": q, "key": k, "value": v, **change})


def test_traced_scale_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^dot_product_attention: scale is .*, but a real number is needed"):
        jax.jit(lambda s: attend(*qkv(), scale=s))(1.0)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("name", "length", "limit", "of"),
    [
        ("query_seq_lengths", 10, 9, "query"),
        ("key_value_seq_lengths", 8, 7, "key"),
        ("query_seq_lengths", -1, 9, "query"),
    ],
)
def test_errors_when_run(compiled: bool, name: str, length: int, limit: int, of: str) -> None:
    function = jax.jit(attend) if compiled else attend
    wanted = f"dot_product_attention: {name} holds {length}, which is outside 0..{limit} (the length of {of})"
    with pytest.raises(RUN_ERRORS, match=re.escape(wanted)):
        jax.block_until_ready(function(*qkv(), **{name: lengths(5, length)}))
    with pytest.raises(RUN_ERRORS, match=re.escape(wanted)):
        jax.block_until_ready(jax.grad(lambda q, *rest: function(q, *rest, **{name: lengths(5, length)}).sum())(*qkv()))


def test_other_devices_are_refused() -> None:
    module = sys.modules[attend.__module__]
    there = SimpleNamespace(dtype=np.dtype("float32"), devices=lambda: [SimpleNamespace(platform="gpu")])
    with pytest.raises(ValueError, match=r"^dot_product_attention: key is on device .*, but only JAX's CPU backend"):
        module._check_place("key", there)
    program = jax.jit(attend).trace(*qkv()).lower(lowering_platforms=("cuda",)).as_text()
    assert "@selfattn_attention_for_cpus" in program  # XLA's error there names the missing target


def test_handlers_report_the_oldest_interface() -> None:
    # A newer version than jaxlib's own keeps its CPU backend from starting.
    class Version(ctypes.Structure):
        _fields_ = (
            ("size", ctypes.c_size_t),
            ("extensions", ctypes.c_void_p),
            ("major", ctypes.c_int),
            ("minor", ctypes.c_int),
        )

    class Metadata(ctypes.Structure):
        _fields_ = (("size", ctypes.c_size_t), ("version", Version), ("traits", ctypes.c_uint32))

    class Extension(ctypes.Structure):
        _fields_ = (
            ("size", ctypes.c_size_t),
            ("kind", ctypes.c_int),
            ("next", ctypes.c_void_p),
            ("metadata", ctypes.POINTER(Metadata)),
        )

    class Frame(ctypes.Structure):
        _fields_ = (
            ("size", ctypes.c_size_t),
            ("extensions", ctypes.POINTER(Extension)),
            ("rest", ctypes.c_void_p * 40),
        )

    address = ctypes.pythonapi.PyCapsule_GetPointer
    address.restype, address.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    for capsule in (_core.xla_attention, _core.xla_attention_backward):
        metadata = Metadata(version=Version(major=7, minor=7))
        frame = Frame(extensions=ctypes.pointer(Extension(kind=1, metadata=ctypes.pointer(metadata))))
        handler = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(Frame))(address(capsule, None))
        assert handler(ctypes.byref(frame)) is None
        assert (metadata.version.major, metadata.version.minor) == (0, 1)
