"""Gradients of layers that normalise their queries and keys."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import selfattn as sa

HEADS, KV_HEADS, DIM, D_MODEL, LENGTH = 4, 2, 6, 10, 7
VECTORS = ("q_norm.weight", "q_norm.bias", "k_norm.weight", "k_norm.bias")


def call(rng: Any, kind: str) -> dict[str, Any]:
    columns = {"q": HEADS * DIM, "k": KV_HEADS * DIM, "v": KV_HEADS * DIM}
    given = {f"w_{x}": rng.standard_normal((D_MODEL, n)) / 3 for x, n in columns.items()}
    given |= {"w_o": rng.standard_normal((HEADS * DIM, 5)) / 3, "b_q": rng.standard_normal(HEADS * DIM)}
    q, k = (rng.standard_normal((2, n)) for n in (HEADS * DIM, KV_HEADS * DIM))
    own = {
        "each head": {"q_norm": sa.RMSNorm(q[0, :DIM], eps=0.1), "k_norm": sa.RMSNorm(k[0, :DIM])},
        "all heads": {"q_norm": sa.LayerNorm(*q), "k_norm": sa.LayerNorm(*k, eps=0.1)},
        "no vectors": {"q_norm": sa.LayerNorm(eps=0.1), "k_norm": sa.RMSNorm()},
        "keys only": {"k_norm": sa.LayerNorm(None, k[0, :DIM])},
    }[kind]
    x = rng.standard_normal((2, LENGTH, D_MODEL))
    return {"x": x, **given, **own, "num_heads": HEADS, "num_kv_heads": KV_HEADS, "rope": True, "causal": True}


KINDS = ["each head", "all heads", "no vectors", "keys only"]


def vector_of(given: dict[str, Any], name: str) -> Any:
    norm, part = name.split(".")
    return getattr(given.get(norm), part, None)


def nudged(given: dict[str, Any], name: str, by: Any) -> dict[str, Any]:
    if "." not in name:
        return {**given, name: given[name] + by}
    norm, part = name.split(".")
    parts = {x: getattr(given[norm], x) for x in ("weight", "bias")}
    parts[part] = parts[part] + by
    if isinstance(given[norm], sa.RMSNorm):
        del parts["bias"]
    return {**given, norm: type(given[norm])(**parts, eps=given[norm].eps)}


@pytest.mark.parametrize("kind", KINDS)
def test_central_differences(rng: Any, kind: str) -> None:
    given = call(rng, kind)
    names = ["x", "w_q", "w_k", "w_v", "w_o", "b_q", *(x for x in VECTORS if vector_of(given, x) is not None)]
    y, vjp = sa.self_attention_vjp(**given, wrt=names)
    assert np.allclose(y, sa.self_attention(**given), rtol=0, atol=1e-13)
    upstream = rng.standard_normal(y.shape)
    found = vjp(upstream)
    for name in names:
        array = vector_of(given, name) if "." in name else given[name]
        assert found[name].shape == array.shape
        way = rng.standard_normal(array.shape)
        high, low = (np.sum(upstream * sa.self_attention(**nudged(given, name, h * way))) for h in (1e-6, -1e-6))
        assert np.isclose((high - low) / 2e-6, np.sum(found[name] * way), rtol=1e-6, atol=1e-6), name


def test_context(rng: Any) -> None:
    given = call(rng, "each head") | {"context": rng.standard_normal((2, 4, D_MODEL)), "causal": False}
    y, vjp = sa.self_attention_vjp(**given, wrt=("context", "x"))
    upstream, way = rng.standard_normal(y.shape), rng.standard_normal((2, 4, D_MODEL))
    high, low = (np.sum(upstream * sa.self_attention(**nudged(given, "context", h * way))) for h in (1e-6, -1e-6))
    assert np.isclose((high - low) / 2e-6, np.sum(vjp(upstream)["context"] * way), rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_tokens_do_not_matter(rng: Any, kind: str) -> None:
    given = call(rng, kind) | {"kv_lens": [4, LENGTH]}
    names = ("x", "w_q", "w_k", *(x for x in VECTORS if vector_of(given, x) is not None))
    y, vjp = sa.self_attention_vjp(**given, wrt=names)
    grads = vjp(np.ones_like(y))
    given["x"] = given["x"].copy()
    given["x"][0, 4:] = np.nan
    y, vjp = sa.self_attention_vjp(**given, wrt=names)
    again = vjp(np.ones_like(y))
    assert all(np.array_equal(again[name], grads[name]) for name in names)
    assert not again["x"][0, 4:].any()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_types(rng: Any, dtype: Any) -> None:
    """A gradient has the dtype of its argument, also a vector's that is wider than the layer."""
    given = call(rng, "each head")
    narrow = {name: x.astype(dtype) if isinstance(x, np.ndarray) else x for name, x in given.items()}
    names = ("x", "w_q", "q_norm.weight", "k_norm.weight")
    _, vjp = sa.self_attention_vjp(**{name: x.astype(np.float64) if isinstance(x, np.ndarray) else x
                                      for name, x in narrow.items()}, wrt=names)  # fmt: skip
    y, narrow_vjp = sa.self_attention_vjp(**narrow, wrt=names)
    exact, found = vjp(np.ones(y.shape)), narrow_vjp(np.ones_like(y))
    assert [found[name].dtype for name in names] == [dtype, dtype, np.float64, np.float64]
    for name in names:
        error = abs(found[name].astype(np.float64) - exact[name]).max() / abs(exact[name]).max()
        assert error < {2: 0.05, 4: 1e-5}[np.dtype(dtype).itemsize], name


@pytest.mark.one_isa
def test_errors(rng: Any) -> None:
    given = call(rng, "keys only")
    with pytest.raises(ValueError, match=r"wrt names 'q_norm.weight', but there is no q_norm.weight"):
        sa.self_attention_vjp(**given, wrt=("q_norm.weight",))
    with pytest.raises(ValueError, match=r"self_attention_vjp: q_norm is of 7 numbers, but 6 .for each head"):
        sa.self_attention_vjp(**given | {"q_norm": sa.RMSNorm(np.ones(7))})
