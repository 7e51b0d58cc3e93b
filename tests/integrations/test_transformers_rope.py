"""RoPE.from_config and apply_rope against the rotary code of transformers' models, which computes in float32."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
hf = pytest.importorskip("transformers")

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: E402

import selfattn as sa  # noqa: E402

YARN = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096}
LONG = {"rope_type": "longrope", "short_factor": [1 + i / 99 for i in range(16)], "long_factor": [9.0] * 16}
LLAMA = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
PARAMETERS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": YARN,
    "yarn, mscale": {**YARN, "mscale": 0.8, "mscale_all_dim": 1.0, "beta_fast": 24, "beta_slow": 2},
    "yarn, not truncated": {**YARN, "truncate": False, "attention_factor": 1.5},
    "longrope": {**LONG, "original_max_position_embeddings": 4096},
    "longrope, factor": {**LONG, "factor": 3.0},
    "llama3": {**LLAMA, "original_max_position_embeddings": 8192},
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.5},
    "linear, a part": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.25},
}


def model(family: str) -> Any:
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}")


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("seq_len", [None, 100, 200000])
def test_frequencies(name: str, seq_len: int | None) -> None:
    parameters = {"rope_theta": 500000.0, **PARAMETERS[name]}
    config = hf.LlamaConfig(
        hidden_size=128, num_attention_heads=4, max_position_embeddings=65536, rope_parameters=parameters
    )
    wanted, scaling = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu", seq_len=seq_len)
    for given in (config, config.to_dict()):
        rope = sa.RoPE.from_config(given, seq_len=seq_len)
        # transformers rounds an exponent of the base to float32, which moves a frequency by up to 13 · 2**-24 of it.
        assert np.allclose(rope.inv_freq, wanted.double(), rtol=2e-6, atol=0)
        assert np.isclose(rope.attention_scaling, scaling, rtol=1e-12)


def rotated(rotary: Any, apply: Any, heads: list[Any], positions: Any, *more: Any) -> list[Any]:
    """Queries and keys (B, H, S, D), rotated by a model's code."""
    tensors = [torch.from_numpy(x) for x in heads]
    cos, sin = rotary(tensors[0], torch.from_numpy(positions), *more)
    return [x.numpy() for x in apply(*tensors, cos, sin)]


def agree(found: Any, wanted: Any) -> None:
    # Angles of transformers are float32, at positions up to 200 here.
    assert np.max(abs(found - wanted)) < 1e-4


CONFIGS: dict[str, tuple[str, str, dict[str, Any], bool]] = {
    "Llama": ("llama", "LlamaConfig", {"rope_parameters": {"rope_theta": 1e6, **LLAMA}}, False),
    "Phi-3": ("phi3", "Phi3Config", {
        "rope_scaling": {**LONG, "type": "longrope"}, "original_max_position_embeddings": 4096, "pad_token_id": 0,
    }, False),
    "GPT-NeoX": ("gpt_neox", "GPTNeoXConfig", {"rotary_pct": 0.25, "rotary_emb_base": 5000}, False),
    "GLM": ("glm", "GlmConfig", {"partial_rotary_factor": 0.5, "head_dim": 32, "pad_token_id": 0}, True),
    "Cohere": ("cohere", "CohereConfig", {}, True),
    "Qwen3, yarn": ("qwen3", "Qwen3Config", {"rope_parameters": YARN, "head_dim": 32}, False),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_models(normal: Any, rng: Any, name: str) -> None:
    family, config_name, settings, interleaved = CONFIGS[name]
    config = getattr(hf, config_name)(hidden_size=128, num_attention_heads=4, max_position_embeddings=65536, **settings)
    module = model(family)
    (rotary,) = [x for x in vars(module).values() if str(getattr(x, "__name__", "")).endswith("RotaryEmbedding")]
    positions, heads = rng.integers(0, 200, (2, 10)), [normal(2, h, 10, 32) for h in (4, 2)]
    rope = sa.RoPE.from_config(config.to_dict(), interleaved=interleaved)
    wanted = rotated(rotary(config), module.apply_rotary_pos_emb, heads, positions)
    for x, y in zip(heads, wanted, strict=True):
        agree(sa.apply_rope(x, positions, rope), y)


def test_gemma_rotates_types_of_layers_in_two_ways(normal: Any, rng: Any) -> None:
    old = {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "head_dim": 32, "num_hidden_layers": 6}
    config, module = hf.Gemma3TextConfig(**sizes, **old), model("gemma3")
    positions, heads = rng.integers(0, 200, (2, 10)), [normal(2, h, 10, 32) for h in (4, 2)]
    rotary = module.Gemma3RotaryEmbedding(config)
    for layer_type in ("full_attention", "sliding_attention"):
        wanted = rotated(rotary, module.apply_rotary_pos_emb, heads, positions, layer_type)
        for given in ({**sizes, **old}, config.to_dict()):
            rope = sa.RoPE.from_config(given, layer_type=layer_type)
            agree(sa.apply_rope(heads[0], positions, rope), wanted[0])


def test_deepseek_gives_the_same_scores(normal: Any, rng: Any) -> None:
    config = hf.DeepseekV3Config(qk_rope_head_dim=32, rope_parameters={**YARN, "mscale": 1.0, "mscale_all_dim": 0.7})
    module, positions = model("deepseek_v3"), rng.integers(0, 200, (2, 10))
    heads = [normal(2, h, 10, 32) for h in (4, 1)]
    # Its elements end up in another order.
    q, k = rotated(module.DeepseekV3RotaryEmbedding(config), module.apply_rotary_pos_emb_interleave, heads, positions)
    rope = sa.RoPE.from_config(config)
    own = [sa.apply_rope(x, positions, rope) for x in heads]
    assert rope.interleaved
    assert np.allclose(own[0] @ own[1].swapaxes(2, 3), q @ k.swapaxes(2, 3), rtol=0, atol=1e-3)


SECTIONS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "Qwen2-VL": ("qwen2_vl", "Qwen2VLTextConfig", "Qwen2VLRotaryEmbedding", {"type": "mrope"}),
    "Qwen2.5-VL": ("qwen2_5_vl", "Qwen2_5_VLTextConfig", "Qwen2_5_VLRotaryEmbedding", {"type": "mrope"}),
    "Qwen3-VL": ("qwen3_vl", "Qwen3VLTextConfig", "Qwen3VLTextRotaryEmbedding", {"mrope_interleaved": True}),
    "Qwen2-VL, yarn": ("qwen2_vl", "Qwen2VLTextConfig", "Qwen2VLRotaryEmbedding", YARN),
}


@pytest.mark.parametrize("name", SECTIONS)
def test_positions_in_time_and_space(normal: Any, rng: Any, name: str) -> None:
    family, config_name, rotary_name, parameters = SECTIONS[name]
    module = model(family)
    scaling = {"rope_type": "default", **parameters, "mrope_section": [4, 6, 6], "rope_theta": 1e6}
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "max_position_embeddings": 65536}
    config = getattr(importlib.import_module(f"transformers.models.{family}"), config_name)(
        **sizes, head_dim=32, rope_parameters=dict(scaling)
    )
    heads, rotary = [normal(2, h, 10, 32) for h in (4, 2)], getattr(module, rotary_name)(config)
    for positions in (rng.integers(0, 200, (3, 2, 10)), np.broadcast_to(np.arange(10), (3, 2, 10)).copy()):
        wanted = rotated(rotary, module.apply_rotary_pos_emb, heads, positions)
        for given in (config.to_dict(), {**sizes, "rope_scaling": scaling}):
            rope = sa.RoPE.from_config(given)
            agree(sa.apply_rope(heads[0], positions, rope), wanted[0])
    agree(sa.apply_rope(heads[0], None, rope), wanted[0])


def test_patches_of_images(normal: Any) -> None:
    module = model("qwen2_vl")
    config = importlib.import_module("transformers.models.qwen2_vl").Qwen2VLVisionConfig(embed_dim=80, num_heads=2)
    positions, heads = np.indices((6, 7)).reshape(2, 42), [normal(42, h, 40) for h in (2, 2)]
    rotary = module.Qwen2VLVisionRotaryEmbedding(config)
    # Its positions are (tokens, coordinates) to PyTorch, and its heads (tokens, heads, elements).
    tensors = [torch.from_numpy(x) for x in heads]
    wanted = module.apply_rotary_pos_emb_vision(*tensors, *rotary(tensors[0], torch.from_numpy(positions.T.copy())))
    rope = sa.RoPE.from_config(config)
    agree(sa.apply_rope(heads[0], positions, rope, layout="bshd"), wanted[0].numpy())
    given = {"head_dim": 40, "rope_parameters": {"rope_type": "axial"}}
    assert sa.RoPE.from_config(given) == rope
