"""`copy` and `pickle` of layers, whose weights are packed for an instruction set."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from copy_ways import ways

import selfattn as sa


def bits(x: Any) -> Any:
    return None if x is None else (x.dtype, x.shape, np.ascontiguousarray(x).tobytes())


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
def test_a_layer_gives_its_weights_back(isa: str, dtype: Any) -> None:
    rng = np.random.default_rng(0)
    for depth, heads, dim, value_dim in ((1, 1, 1, 1), (7, 3, 5, 3), (33, 2, 16, 17), (64, 4, 32, 8)):
        for has_output in (False, True):
            shapes = [(depth, heads * dim), (depth + 2, dim), (depth + 2, value_dim), (heads * value_dim, depth)]
            weights: list[Any] = [rng.standard_normal(shape).astype(dtype) for shape in shapes]
            biases: list[Any] = [
                None if i == 1 else rng.standard_normal(s[1]).astype(dtype) for i, s in enumerate(shapes)
            ]
            if not has_output:
                weights[3] = biases[3] = None
            named = dict(zip(("b_q", "b_k", "b_v", "b_o"), biases, strict=True))
            layer = sa.SelfAttention(*weights, **named, num_heads=heads, num_kv_heads=1)
            _, (_, _, found, found_biases, *_) = layer.__reduce__()
            assert [bits(x) for x in found] == [bits(x) for x in weights]
            assert [bits(x) for x in found_biases] == [bits(x) for x in biases]


@ways
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_layer_computes_the_same_after_it_was_copied(way: Any, dtype: Any, isa: str) -> None:
    rng = np.random.default_rng(0)
    w_q, w_k, w_v, w_o = rng.standard_normal((4, 24, 24)).astype(dtype)
    rope = sa.RoPE(interleaved=True)
    layer = sa.SelfAttention(w_q, w_k, w_v, w_o, b_v=w_q[0], num_heads=3, rope=rope)
    twin = way(layer)
    x = rng.standard_normal((2, 5, 24)).astype(dtype)
    assert repr(twin) == repr(layer)
    assert np.array_equal(twin(x), layer(x))


@pytest.mark.one_isa(reason="selects a set itself")
def test_a_layer_is_packed_for_the_machine_that_loads_it() -> None:
    w = np.random.default_rng(0).standard_normal((24, 24)).astype(np.float32)
    pickled = pickle.dumps(sa.SelfAttention(w, w, w, w, num_heads=3))
    with sa.use_isa("portable"):
        assert pickle.loads(pickled).isa == "portable"
    layer = sa.SelfAttention(w, w, w, num_heads=3)
    assert copy.copy(layer) is copy.deepcopy(layer) is layer


@pytest.mark.one_isa
def test_a_layer_of_another_version_is_refused() -> None:
    w = np.ones((4, 4), np.float32)
    load, (cls, version, *parts) = sa.SelfAttention(w, w, w, num_heads=1).__reduce__()
    with pytest.raises(ValueError, match="version"):
        load(cls, version + 1, *parts)
