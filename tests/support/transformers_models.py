"""Small Hugging Face models with random weights, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf

VOCABULARY, BATCH, TOKENS, TARGETS = 99, 2, 24, 13
PADDED = 9  # of the first sequence's tokens
# Weights large enough that attention is far from uniform and generated tokens differ.
SPREAD = {"initializer_range": 0.3}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BASE = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 128, **IDS, **SPREAD,
}  # fmt: skip
GROUPED = {**BASE, "num_key_value_heads": 2, "head_dim": 8}
VISION = {**SPREAD, "image_size": 20, "patch_size": 4, "hidden_size": 32, "intermediate_size": 48}
VISION |= {"num_hidden_layers": 2, "num_attention_heads": 4}
SEQ2SEQ = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "init_std": 0.3,
    "decoder_start_token_id": 1, **IDS,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One model: how to make its configuration, its class, and its kind of input."""

    make: Callable[[], Any]
    kind: str = "decoder"  # or encoder, seq2seq, vision, clip, speech
    of: Any = hf.AutoModelForCausalLM


def _clip() -> Any:
    text = {name: x for name, x in BASE.items() if name != "initializer_range"}
    return hf.CLIPConfig(
        text_config={**text, "initializer_factor": 5.0}, vision_config={**VISION, "initializer_factor": 5.0}
    )


def _mixture(**changes: Any) -> Any:
    # Plain rotary positions, not scaled for the real model's length.
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    return hf.GptOssConfig(
        **GROUPED, sliding_window=7, num_local_experts=2, num_experts_per_tok=1, rope_parameters=rope, **changes
    )


CASES = {
    "bert": Case(lambda: hf.BertConfig(**BASE), "encoder", hf.AutoModel),
    "roberta": Case(lambda: hf.RobertaConfig(**BASE), "encoder", hf.AutoModel),
    "distilbert": Case(
        lambda: hf.DistilBertConfig(vocab_size=VOCABULARY, dim=32, hidden_dim=48, n_layers=2, n_heads=4, **SPREAD),
        "encoder",
        hf.AutoModel,
    ),
    "modernbert": Case(
        lambda: hf.ModernBertConfig(
            **{**BASE, "num_hidden_layers": 4}, local_attention=8, cls_token_id=1, sep_token_id=2
        ),
        "encoder",
        hf.AutoModel,
    ),
    "vit": Case(lambda: hf.ViTConfig(**VISION), "vision", hf.AutoModel),
    "clip": Case(_clip, "clip", hf.AutoModel),
    "whisper": Case(
        lambda: hf.WhisperConfig(**SEQ2SEQ, num_mel_bins=16, max_source_positions=30, max_target_positions=64),
        "speech",
        hf.WhisperForConditionalGeneration,
    ),
    "bart": Case(lambda: hf.BartConfig(**SEQ2SEQ), "seq2seq", hf.AutoModelForSeq2SeqLM),
    "t5": Case(
        lambda: hf.T5Config(
            vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=1,
            **IDS,
        ),
        "seq2seq",
        hf.AutoModelForSeq2SeqLM,
    ),
    "gpt2": Case(
        lambda: hf.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128, **IDS, **SPREAD)
    ),
    "llama": Case(lambda: hf.LlamaConfig(**GROUPED)),
    "mistral": Case(lambda: hf.MistralConfig(**GROUPED, sliding_window=7)),
    "qwen2": Case(lambda: hf.Qwen2Config(**GROUPED)),
    "qwen3": Case(lambda: hf.Qwen3Config(**GROUPED)),
    "gemma2": Case(
        lambda: hf.Gemma2Config(**GROUPED, sliding_window=7, attn_logit_softcapping=1.5, query_pre_attn_scalar=8)
    ),
    "gemma3": Case(lambda: hf.Gemma3TextConfig(**GROUPED, sliding_window=7, query_pre_attn_scalar=8)),
    "llama4": Case(
        lambda: hf.Llama4TextConfig(
            **GROUPED, attention_chunk_size=7, num_local_experts=2, num_experts_per_tok=1, intermediate_size_mlp=48
        )
    ),
    "phi3": Case(lambda: hf.Phi3Config(**{**BASE, "num_key_value_heads": 2})),
    "gpt_oss": Case(_mixture),
    "deepseek_v4": Case(
        lambda: hf.DeepseekV4Config(
            **{**GROUPED, "num_key_value_heads": 1, "head_dim": 16}, sliding_window=7, q_lora_rank=16,
            n_routed_experts=2, num_experts_per_tok=1, moe_intermediate_size=32, o_lora_rank=16, o_groups=2,
            index_n_heads=2, index_head_dim=16,
        )
    ),
    "bloom": Case(lambda: hf.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, **IDS, **SPREAD)),
    "falcon": Case(
        lambda: hf.FalconConfig(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **IDS, **SPREAD
        )
    ),
}  # fmt: skip
ENCODERS = [name for name, case in CASES.items() if case.kind == "encoder"]
DECODERS = [name for name, case in CASES.items() if case.kind == "decoder"]
WRITERS = [*DECODERS, *(name for name, case in CASES.items() if case.kind in ("seq2seq", "speech"))]


def build(name: str, implementation: str = "selfattn", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Return a model in eval mode, with the same weights for every implementation and dtype."""
    case = CASES[name]
    config = case.make()
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    make = getattr(case.of, "from_config", None) or case.of._from_config
    model = make(config, attn_implementation=implementation).eval()
    sinks = [parameter for key, parameter in model.named_parameters() if key.endswith("sinks")]
    with torch.no_grad():
        for parameter in sinks:  # not initialised by transformers
            parameter.normal_()
    return model.to(dtype)


def inputs(name: str, padding: str = "none", dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Return the model's input, the first sequence padded on one side."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    def tokens(count: int) -> torch.Tensor:
        return torch.randint(3, VOCABULARY, (BATCH, count), generator=generator)

    kind = CASES[name].kind
    fed: dict[str, torch.Tensor] = {}
    if kind in ("vision", "clip"):
        fed["pixel_values"] = normal(BATCH, 3, 20, 20)
    if kind == "speech":
        fed["input_features"] = normal(BATCH, 16, 60)
    elif kind != "vision":
        fed["input_ids"] = tokens(TOKENS)
        fed["attention_mask"] = real_tokens(padding)
        fed["input_ids"][fed["attention_mask"] == 0] = 0
    if kind in ("seq2seq", "speech"):
        fed["decoder_input_ids"] = tokens(TARGETS)
    return fed


def real_tokens(padding: str) -> torch.Tensor:
    """Return an attention mask (B, TOKENS)."""
    mask = torch.ones((BATCH, TOKENS), dtype=torch.long)
    if padding == "left":
        mask[0, :PADDED] = 0
    elif padding == "right":
        mask[0, -PADDED:] = 0
    return mask


def paddings(name: str) -> tuple[str, ...]:
    """Return the kinds of batches that a model takes."""
    return ("none",) if CASES[name].kind in ("vision", "speech") else ("none", "left", "right")


def states(output: Any, mask: torch.Tensor | None, part: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the hidden states and attention weights of an output, those of real tokens only."""
    for name, value in output.items():
        if hasattr(value, "items"):
            yield from states(value, mask, f"{part}{name}.")
        elif name.endswith(("hidden_states", "attentions")) and isinstance(value, tuple):
            for layer, state in enumerate(value):
                if name.endswith("attentions"):
                    state = state.transpose(1, 2)
                real = mask is not None and state.shape[1] == mask.shape[1]
                yield f"{part}{name}[{layer}]", state[mask.bool()] if real else state


def layer(**attributes: Any) -> torch.nn.Module:
    """Return a substitute for an attention layer."""
    module = torch.nn.Module()
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return unit normals."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
