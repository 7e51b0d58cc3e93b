"""Small language models of transformers with random weights, which examples/llm.py has to equal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 120, "max_position_embeddings": 400, "initializer_range": 0.15,
    "eos_token_id": None, "bos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
LLAMA_3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA_3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
LONG |= {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0.9}
GEMMA = {"head_dim": 16, "sliding_window": 9, "query_pre_attn_scalar": 20}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 20}
MLA = {"num_key_value_heads": 4, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12}
MLA |= {"n_routed_experts": 8, "first_k_dense_replace": 1, "moe_intermediate_size": 20}
MLA |= {"num_experts_per_tok": 3, "n_group": 4, "topk_group": 2}
CHOSEN = 8
DSA = {"q_lora_rank": 24, "index_topk": CHOSEN, "index_n_heads": 16, "index_head_dim": 16}
INDEXERS = ["full", "shared", "shared", "full", "shared"]
QWEN = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
LLAMA_4 = {"head_dim": 16, "num_hidden_layers": 4, "intermediate_size_mlp": 80, "num_local_experts": 4}
LLAMA_4 |= {"attention_chunk_size": 12, "floor_scale": 16, "interleave_moe_layer_step": 2, "attn_scale": 0.8}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-3": ("Llama", {"rope_parameters": LLAMA_3, "head_dim": 24, "tie_word_embeddings": True}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"}),
    "mistral": ("Mistral", {"sliding_window": 9}),
    "qwen2": ("Qwen2", QWEN),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3-moe": ("Qwen3Moe", {**EXPERTS, "head_dim": 16, "num_experts": 4, "norm_topk_prob": True}),
    "gemma2": ("Gemma2", {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3Text", {**GEMMA, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    "phi3": ("Phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 200}),
    "phi3-long": ("Phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 12, "sliding_window": 15}),
    "olmo2": ("Olmo2", {}),
    "llama4": ("Llama4Text", LLAMA_4),
    "deepseek-v2": ("DeepseekV2", {**MLA, "q_lora_rank": None, "topk_method": "group_limited_greedy"}),
    "deepseek-v2-greedy": ("DeepseekV2", {**MLA, "q_lora_rank": 24, "topk_method": "greedy"}),
    "deepseek-v3-halves": ("DeepseekV3", {**MLA, "q_lora_rank": None, "rope_interleave": False, "num_mtp_layers": 0}),
    "deepseek-v3": ("DeepseekV3", {**MLA, "q_lora_rank": 24, "rope_parameters": YARN, "num_mtp_layers": 0}),
    "deepseek-v3.2": ("DeepseekV32", {**MLA, **DSA, "rope_parameters": YARN, "attention_bias": True}),
    "glm-dsa": ("GlmMoeDsa", {**MLA, **DSA, "num_hidden_layers": 5, "indexer_types": INDEXERS}),
}
LONGEST = 94


def build(name: str, values: dict[str, Any]) -> Any:
    """Return a model all of whose weights are random: biases and norms too, which start as 0 and 1."""
    torch.manual_seed(1)
    # Configurations change the dictionaries that they are given.
    values = json.loads(json.dumps({**SIZES, **values}))
    config = getattr(transformers, f"{name}Config")(**values, attn_implementation="eager")
    model = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config).eval()
    with torch.no_grad():
        for part, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.add_(0.3 * torch.randn_like(weight))
            if "Gemma" in name and part == "model.embed_tokens.weight":
                weight.mul_(0.05)  # else every token follows itself, since the head is the same matrix
            if "Gemma" in name and part == "model.norm.weight":
                weight.add_(10)
        for part, weight in model.named_buffers():
            if part.endswith("e_score_correction_bias"):
                weight.normal_(std=0.2)
    return model


def load(llm: Any, folder: Path, dtype: str = "float32") -> Any:
    values = json.loads((folder / "config.json").read_text(encoding="utf8"))
    return llm.Decoder(llm.Config(values, LONGEST), llm.Weights(folder, dtype))


def pair_of(name: str, llm: Any, folder: Path) -> tuple[Any, Any]:
    """Return the decoder of llm.py and transformers' model with the same weights."""
    peer = build(*CONFIGS[name])
    peer.save_pretrained(folder)
    return load(llm, folder), peer


def draw(*shape: int) -> Any:
    return np.random.default_rng(3).integers(1, SIZES["vocab_size"], shape)


def logits_of(peer: Any, ids: Any) -> Any:
    with torch.no_grad():
        return peer(torch.from_numpy(ids)).logits.float().numpy()


def greedy(peer: Any, prompt: Any, tokens: int) -> list[int]:
    ids = torch.from_numpy(prompt[None])
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    result = peer.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, **options)
    top = torch.stack(result.scores).topk(2).values
    assert (top[..., 0] - top[..., 1]).min() > 1e-4, "rounding may decide between two tokens: take another seed"
    return result.sequences[0, len(prompt) :].tolist()
