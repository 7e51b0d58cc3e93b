"""Models of transformers whose layers choose keys, or have one sink per query."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
hf = pytest.importorskip("transformers")
pytest.importorskip("ml_dtypes")

from transformers_models import layer, normal  # noqa: E402

import selfattn  # noqa: E402
from selfattn.integrations import _hf_sparse  # noqa: E402
from selfattn.integrations._hf_attention import attention_forward  # noqa: E402
from selfattn.integrations._hf_mask import make_mask  # noqa: E402
from selfattn.integrations.transformers import register  # noqa: E402

TOKENS, PADDED = 24, 5
COMMON = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64, "num_experts_per_tok": 1,
    "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
INDEXED = {
    **COMMON, "n_routed_experts": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "kv_lora_rank": 16,
    "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "head_dim": 8, "index_topk": 6,
    "index_head_dim": 16, "index_n_heads": 2,
}  # fmt: skip
INKLING = {
    **COMMON, "num_key_value_heads": 2, "head_dim": 8, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2,
    "swa_head_dim": 8, "sliding_window_size": 7, "d_rel": 4, "rel_extent": 16, "n_routed_experts": 2,
    "unpadded_vocab_size": 99, "layer_types": ["hybrid_sliding", "hybrid"],
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "DeepseekV32Model": INDEXED,
    "GlmMoeDsaModel": INDEXED,
    "AXK2Model": {**INDEXED, "gated_norm_rank": 4},
    "HYV4Model": INDEXED,
    "HYV4VLTextModel": {
        **INDEXED,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    },
    "MistralLarge4TextModel": INDEXED,
    "Dots3NoteTextModel": {
        **INDEXED, "sliding_window": 7, "shared_experts_intermediate_size": 16, "num_hidden_layers": 3,
        "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16,
        "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8,
    },
    "MiniMaxM3VLTextModel": {
        **COMMON, "num_key_value_heads": 2, "head_dim": 8, "rotary_dim": 4, "num_local_experts": 2,
        "dense_intermediate_size": 32, "shared_intermediate_size": 16, "index_n_heads": 2, "index_head_dim": 8,
        "index_block_size": 4, "index_topk_blocks": 2, "layer_types": ["full_attention", "minimax_m3_sparse"],
    },
    "Inkling2TextModel": INKLING,
    "Inkling2LoopTextModel": {
        **INKLING, "num_hidden_layers": 4, "n_layers_per_attn_res_block": 1, "loop_layer_index_start": 1,
        "loop_layer_index_end": 3, "loop_num_passes": 2, "loop_gate_rank": 4,
        "layer_types": ["hybrid_sliding", "hybrid"] * 2,
    },
    # Builds a float mask from its indices.
    "Glm5NextTextModel": {
        **INDEXED, "qk_rope_head_dim": 0, "head_dim": 0, "index_kpool": 2, "linear_head_dim": 8, "linear_num_heads": 4,
        "hc_mult": 2, "layer_types": ["linear_attention", "full_attention"],
    },
}  # fmt: skip


# The option that takes what a model selects. The other models make masks of their own.
CHOSEN_BY = {
    "MiniMaxM3VLTextModel": "block_indices",
    **dict.fromkeys(
        ("DeepseekV32Model", "GlmMoeDsaModel", "AXK2Model", "HYV4Model", "HYV4VLTextModel", "MistralLarge4TextModel",
         "Dots3NoteTextModel"), "key_indices"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    register()
    with torch.no_grad():
        yield


def build(name: str) -> Any:
    kind = getattr(hf, name, None)
    if kind is None:
        pytest.skip(f"transformers {hf.__version__} has no {name}")
    torch.manual_seed(0)
    model = kind._from_config(kind.config_class(**MODELS[name]), attn_implementation="eager").eval()
    for parameter in model.parameters():
        if not parameter.isfinite().all() or parameter.abs().max() > 1e3:  # not initialised by transformers
            parameter.normal_()
    return model


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_models_that_choose_keys(name: str, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    cost = 1 if padded else 100  # numbers of keys, or a mask
    monkeypatch.setattr(_hf_sparse, "COST", {"single": cost, "many": cost})
    model = build(name)
    calls: list[dict[str, Any]] = []
    attention = selfattn.attention
    monkeypatch.setattr(selfattn, "attention", lambda *x, **options: calls.append(options) or attention(*x, **options))
    ids = torch.randint(3, 99, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    real = torch.ones((2, TOKENS), dtype=torch.long)
    if padded:
        real[0, TOKENS - PADDED :] = 0
    found = {}
    for implementation in ("eager", "selfattn"):
        model.set_attn_implementation(implementation)
        model.config._attn_implementation = implementation
        whole = model(ids, attention_mask=real).last_hidden_state[real.bool()]
        start = model(ids[1:, :-4], use_cache=True)
        past = getattr(start, "cache", None) or start.past_key_values
        steps = model(ids[1:, -4:], past_key_values=past).last_hidden_state
        found[implementation] = torch.cat([whole, steps[0]])
        assert bool(calls) == (implementation == "selfattn")
    assert (found["selfattn"] - found["eager"]).abs().max() < 5e-5 * found["eager"].abs().max()
    chosen = {option for call in calls for option in call} & {"key_indices", "block_indices"}
    assert chosen == ({CHOSEN_BY[name]} if padded and name in CHOSEN_BY else set())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sinks_of_single_queries(dtype: Any) -> None:
    q, k, v = normal(2, 4, 5, 8), normal(2, 2, 5, 8, seed=1), normal(2, 2, 5, 8, seed=2)
    real = torch.ones((2, 5), dtype=torch.bool)
    real[0, :2] = False  # two queries see nothing
    mask = make_mask(2, 5, 5, attention_mask=real)
    sinks = normal(2, 4, 5, 1, seed=3)
    sinks[1, 0] = -torch.inf
    scores = (q @ k.repeat_interleave(2, 1).mT / 8**0.5).masked_fill(~mask.dense(), -torch.inf).double()
    weights = torch.cat([scores, sinks.double()], -1).softmax(-1)[..., :-1]
    wanted = (weights @ v.repeat_interleave(2, 1).double()).transpose(1, 2)
    mask = make_mask(2, 5, 5, attention_mask=real)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    tolerance = 1e-6 if dtype is torch.float32 else 0.03
    for name in ("sinks", "s_aux"):
        out, found = attention_forward(layer(), q, k, v, mask, output_attentions=True, **{name: sinks})
        assert (out - wanted).abs().max() < tolerance
        assert (found - weights).abs().max() < tolerance
        assert torch.equal(attention_forward(layer(), q, k, v, mask, **{name: sinks})[0], out)
    assert mask.made is None


@pytest.mark.parametrize("cost", [1, 100])
@pytest.mark.parametrize("kind", ["none", "described", "dense", "numbers"])
def test_indices_work_with_every_mask(kind: str, cost: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_hf_sparse, "COST", {"single": cost, "many": cost})
    q, k, v = normal(2, 4, 3, 8), normal(2, 2, 9, 8, seed=1), normal(2, 2, 9, 8, seed=2)
    indices = torch.stack([torch.randperm(7)[:4] for _ in range(6)]).view(2, 3, 4).int()
    indices[0, 1, 2:] = -1  # none
    seen = torch.zeros((2, 1, 3, 9), dtype=torch.bool)
    for batch, row in ((b, i) for b in range(2) for i in range(3)):
        seen[batch, 0, row, [j for j in indices[batch, row] if j >= 0]] = True
    real = torch.ones((2, 9), dtype=torch.bool)
    real[0, :3] = False
    mask = make_mask(2, 3, 9, q_offset=4, attention_mask=real)  # a static cache, of which 7 keys are filled
    limit = mask.dense() if kind != "none" else torch.ones((3, 9), dtype=torch.bool).tril(6)
    given = {"none": None, "described": make_mask(2, 3, 9, q_offset=4, attention_mask=real), "dense": limit}
    given["numbers"] = torch.zeros(limit.shape).masked_fill(~limit, -torch.inf)
    scores = (q @ k.repeat_interleave(2, 1).mT / 8**0.5).masked_fill(~(seen & limit), -torch.inf)
    wanted = (scores.softmax(-1).nan_to_num(0.0) @ v.repeat_interleave(2, 1)).transpose(1, 2)
    out, _ = attention_forward(layer(is_causal=True), q, k, v, given[kind], indices=indices)
    assert (out - wanted).abs().max() < 1e-6
