"""Norms of a layer's queries and keys, against their definition in float64 and against transformers' layers."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
from layer_definition import close

import selfattn as sa
from selfattn import reference

HEADS, KV_HEADS, DIM, D_MODEL = 4, 2, 6, 20


def weights(rng: Any, dtype: Any = np.float32) -> dict[str, Any]:
    columns = {"q": HEADS * DIM, "k": KV_HEADS * DIM, "v": KV_HEADS * DIM, "o": D_MODEL}
    depths = {"q": D_MODEL, "k": D_MODEL, "v": D_MODEL, "o": HEADS * DIM}
    found = {f"w_{x}": (rng.standard_normal((depths[x], n)) / 4).astype(dtype) for x, n in columns.items()}
    return found | {f"b_{x}": rng.standard_normal(n).astype(dtype) for x, n in columns.items()}


def norms(rng: Any, kind: str) -> dict[str, Any]:
    q, k = (rng.standard_normal((2, n)) for n in (HEADS * DIM, KV_HEADS * DIM))
    return {
        "each head": {"q_norm": sa.RMSNorm(q[0, :DIM], eps=1e-3), "k_norm": sa.RMSNorm(k[0, :DIM])},
        "all heads": {"q_norm": sa.RMSNorm(q[0]), "k_norm": sa.RMSNorm(k[0], eps=1e-3)},
        "layer norms": {"q_norm": sa.LayerNorm(q[0, :DIM], q[1, :DIM]), "k_norm": sa.LayerNorm(*k)},
        "no vectors": {"q_norm": sa.LayerNorm(eps=1e-2), "k_norm": sa.RMSNorm()},
        "queries only": {"q_norm": sa.RMSNorm(q[0, :DIM])},
        "bias only": {"k_norm": sa.LayerNorm(None, k[0])},
    }[kind]


KINDS = ["each head", "all heads", "layer norms", "no vectors", "queries only", "bias only"]


def normalised(x: Any, norm: Any, heads: int) -> Any:
    """x (..., heads · DIM) as (..., heads, DIM), normalised in float64."""
    given = [] if norm is None else [v for v in (norm.weight, norm.bias) if v is not None]
    rows = x.reshape(*x.shape[:-1], *((1, heads * DIM) if given and len(given[0]) == heads * DIM else (heads, DIM)))
    if norm is not None:
        if isinstance(norm, sa.LayerNorm):
            rows = rows - rows.mean(-1, keepdims=True)
        rows = rows / np.sqrt((rows**2).mean(-1, keepdims=True) + norm.eps)
        rows = rows * (1 if norm.weight is None else norm.weight) + (0 if norm.bias is None else norm.bias)
    return rows.reshape(*x.shape[:-1], heads, DIM)


def definition(x: Any, w: dict[str, Any], own: dict[str, Any], rope: Any, **options: Any) -> Any:
    w = {name: array.astype(np.float64) for name, array in w.items()}
    context = options.pop("context", x).astype(np.float64)
    x = x.astype(np.float64)
    q = normalised(x @ w["w_q"] + w["b_q"], own.get("q_norm"), HEADS)
    k = normalised(context @ w["w_k"] + w["b_k"], own.get("k_norm"), KV_HEADS)
    v = normalised(context @ w["w_v"] + w["b_v"], None, KV_HEADS)
    if rope:
        q, k = (sa.apply_rope(z, layout="bshd") for z in (q, k))
    out = reference.attention(*(z.swapaxes(-2, -3) for z in (q, k, v)), **options).out.swapaxes(-2, -3)
    return out.reshape(*x.shape[:-1], HEADS * DIM) @ w["w_o"] + w["b_o"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rope", [None, True])
def test_definition(isa: str, rng: Any, normal: Any, kind: str, dtype: Any, rope: Any) -> None:
    w, own = weights(rng, dtype), norms(rng, kind)
    layer = sa.SelfAttention(**w, num_heads=HEADS, num_kv_heads=KV_HEADS, rope=rope, **own)
    for shape in ((2, 37), (1,), (2, 1, 5), (0, 4)):
        x = normal(*shape, D_MODEL, dtype=dtype)
        y = layer(x, causal=True)
        close(y, definition(x, w, own, rope, causal=True, q_offset=0))
        once = sa.self_attention(x, **w, num_heads=HEADS, num_kv_heads=KV_HEADS, rope=rope, causal=True, **own)
        assert np.array_equal(once, y)
    x, context = normal(2, 5, D_MODEL, dtype=dtype), normal(2, 9, D_MODEL, dtype=dtype)
    close(layer(x, context=context), definition(x, w, own, rope, context=context))


def test_bits_and_pickles(isa: str, rng: Any, normal: Any) -> None:
    own = norms(rng, "layer norms")
    layer = sa.SelfAttention(
        **weights(rng), num_heads=HEADS, num_kv_heads=KV_HEADS, rope=True, norm=sa.RMSNorm(), **own
    )
    x = normal(3, 130, D_MODEL)
    y = layer(x)
    for threads in (1, 2, 3):
        assert np.array_equal(layer(x, num_threads=threads), y)
    assert np.array_equal(layer(x[1:2]), y[1:2])
    assert np.array_equal(pickle.loads(pickle.dumps(layer))(x), y)


def test_steps_on_a_cache(rng: Any, normal: Any) -> None:
    layer = sa.SelfAttention(
        **weights(rng), num_heads=HEADS, num_kv_heads=KV_HEADS, rope=True, **norms(rng, "each head")
    )
    x = normal(2, 9, D_MODEL)
    cache = sa.KVCache(2, KV_HEADS, DIM, 16)
    parts = [layer(part, cache=cache) for part in (x[:, :4], x[:, 4:5], x[:, 5:])]
    close(np.concatenate(parts, axis=1), layer(x, causal=True))


def test_hidden_tokens_do_not_matter(rng: Any, normal: Any) -> None:
    layer = sa.SelfAttention(**weights(rng), num_heads=HEADS, num_kv_heads=KV_HEADS, **norms(rng, "all heads"))
    x = normal(2, 9, D_MODEL)
    y = layer(x, kv_lens=[5, 9], causal=True)
    x[0, 5:] = np.nan
    assert np.array_equal(layer(x, kv_lens=[5, 9], causal=True), y)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_layers(isa: str, rng: Any, normal: Any, dtype: str) -> None:
    pytest.importorskip("ml_dtypes")
    w, own = weights(rng, np.dtype(dtype)), norms(rng, "each head")
    x = normal(2, 17, D_MODEL, dtype=np.dtype(dtype))
    y = sa.SelfAttention(**w, num_heads=HEADS, num_kv_heads=KV_HEADS, **own)(x)
    assert y.dtype == np.dtype(dtype)
    tolerance = 3e-2 if dtype == "float16" else 0.2
    assert np.max(abs(y.astype(np.float64) - definition(x, w, own, None))) < tolerance


@pytest.mark.one_isa
def test_errors(rng: Any) -> None:
    w = weights(rng)
    for name, count in (("q_norm", 24), ("k_norm", 12)):
        message = (
            f"SelfAttention: {name} is of 7 numbers, but 6 .for each head. or {count} .for all heads together. are"
        )
        with pytest.raises(ValueError, match=message):
            sa.SelfAttention(**w, num_heads=HEADS, num_kv_heads=KV_HEADS, **{name: sa.RMSNorm(np.ones(7))})
        with pytest.raises(TypeError, match=f"self_attention: {name} is a ndarray, but a LayerNorm or an RMSNorm"):
            sa.self_attention(np.ones((3, 20), np.float32), **w, num_heads=4, num_kv_heads=2, **{name: np.ones(6)})


@pytest.mark.parametrize("model", ["Qwen3", "Olmo2"])
def test_layers_of_transformers(model: str) -> None:
    """Qwen 3 normalises each head, OLMo 2 all heads of a token together; both before rotary embedding."""
    torch, hf = pytest.importorskip("torch"), pytest.importorskip("transformers")
    import importlib

    module = importlib.import_module(f"transformers.models.{model.lower()}.modeling_{model.lower()}")
    torch.manual_seed(3)
    config = getattr(hf, f"{model}Config")(
        hidden_size=24, num_attention_heads=4, num_key_value_heads=2, head_dim=6, vocab_size=20, num_hidden_layers=1,
        intermediate_size=8, attn_implementation="eager", max_position_embeddings=32, rms_norm_eps=1e-5,
    )  # fmt: skip
    theirs, turn = getattr(module, f"{model}Attention")(config, 0), getattr(module, f"{model}RotaryEmbedding")(config)
    for norm in (theirs.q_norm, theirs.k_norm):
        torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 7, 24)
    hidden = torch.full((7, 7), -torch.inf).triu(1)[None, None]
    with torch.no_grad():
        expected = theirs(x, position_embeddings=turn(x, torch.arange(7)[None]), attention_mask=hidden)[0].numpy()
    matrices = {f"w_{y}": getattr(theirs, f"{y}_proj").weight.detach().numpy().T for y in "qkvo"}
    own = {y: sa.RMSNorm(getattr(theirs, y).weight.detach().numpy(), eps=1e-5) for y in ("q_norm", "k_norm")}
    theta = config.rope_parameters["rope_theta"]
    layer = sa.SelfAttention(**matrices, num_heads=4, num_kv_heads=2, rope=sa.RoPE(theta), **own)
    assert np.max(abs(layer(x.numpy(), causal=True) - expected)) < 3e-6
