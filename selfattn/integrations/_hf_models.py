"""Models of transformers with their own attention code: Bloom and Falcon are patched, the others are refused."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

import torch
from transformers import PreTrainedModel

_TAUGHT = {"transformers.models.bloom.modeling_bloom", "transformers.models.falcon.modeling_falcon"}
_LIBRARY = ("transformers.models.", "transformers_modules.")  # models in the library, and code downloaded with weights


def refuse_own_attention(name: str) -> None:
    """Make models raise at construction if they ask for this name but never call a registered attention function.

    Otherwise some of them would add our boolean mask to their scores, and others would silently ignore the name. If a
    module also contains parts that call registered functions, only these parts use selfattn: parts with their own
    attention code (for example an audio encoder) keep that code.
    """
    choose: Any = PreTrainedModel.get_correct_attn_implementation
    if getattr(choose, "knows_selfattn", False):
        return

    def get_correct_attn_implementation(
        self: Any, requested_attention: str | None, *arguments: Any, **keywords: Any
    ) -> Any:
        if requested_attention == name:
            _check_model(type(self), name)
        return choose(self, requested_attention, *arguments, **keywords)

    get_correct_attn_implementation.knows_selfattn = True  # type: ignore[attr-defined]
    PreTrainedModel.get_correct_attn_implementation = get_correct_attn_implementation


def _check_model(kind: type, requested: str) -> None:
    for base in kind.__mro__:
        name = base.__module__
        if name.startswith(_LIBRARY) and name not in _TAUGHT and _has_own_attention(sys.modules[name], requested):
            raise ValueError(
                f"selfattn: {kind.__name__} has its own attention code ({name}), which never calls selfattn: "
                'pass attn_implementation="eager", or a dict with "eager" or "selfattn" for each sub-model'
            )


def _has_own_attention(module: Any, requested: str) -> bool:
    tables = (x for name, x in vars(module).items() if name.endswith("ATTENTION_CLASSES") and isinstance(x, dict))
    if any(requested not in table for table in tables):
        return True
    if hasattr(module, "ALL_ATTENTION_FUNCTIONS"):
        return False
    own = (x for x in vars(module).values() if isinstance(x, type) and x.__module__ == module.__name__)
    return any("Attention" in x.__name__ and issubclass(x, torch.nn.Module) for x in own)


def _merge(out: torch.Tensor) -> torch.Tensor:
    return out.flatten(2)


def teach_bloom() -> None:
    """Make BloomAttention call selfattn unless its mask is one of the float masks of eager attention."""
    from ._hf_attention import attention_forward

    bloom: Any = import_module("transformers.models.bloom.modeling_bloom")
    eager = bloom.BloomAttention.forward
    if getattr(eager, "knows_selfattn", False):
        return

    def forward(
        self: Any,
        hidden_states: torch.Tensor,
        residual: torch.Tensor,
        alibi: torch.Tensor,
        attention_mask: torch.Tensor | None,
        layer_past: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> Any:
        if attention_mask is not None and attention_mask.is_floating_point():
            return eager(
                self, hidden_states, residual, alibi, attention_mask, layer_past, use_cache, output_attentions, **kwargs
            )
        query, key, value = self._reshape(self.query_key_value(hidden_states))
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        out, weights = attention_forward(
            self, query, key, value, attention_mask,
            dropout=self.attention_dropout.p if self.training else 0.0, scaling=self.inv_norm_factor, is_causal=True,
            position_bias=alibi.view(-1, self.num_heads, *alibi.shape[1:]), output_attentions=output_attentions,
            **kwargs,
        )  # fmt: skip
        return bloom.dropout_add(self.dense(_merge(out)), residual, self.hidden_dropout, self.training), weights

    forward.knows_selfattn = True  # type: ignore[attr-defined]
    bloom.BloomAttention.forward = forward


def teach_falcon(name: str) -> None:
    """Register an attention class under the given name in Falcon's table."""
    from ._hf_attention import attention_forward

    falcon: Any = import_module("transformers.models.falcon.modeling_falcon")
    if name in falcon.FALCON_ATTENTION_CLASSES:
        return

    class SelfattnFalconAttention(falcon.FalconAttention):  # type: ignore[misc]
        def forward(
            self,
            hidden_states: torch.Tensor,
            alibi: torch.Tensor | None,
            attention_mask: torch.Tensor | None,
            position_ids: Any = None,
            layer_past: Any = None,
            use_cache: bool = False,
            output_attentions: bool = False,
            position_embeddings: Any = None,
            **kwargs: Any,
        ) -> Any:
            query, key, value = (x.transpose(1, 2) for x in self._split_heads(self.query_key_value(hidden_states)))
            if alibi is None:
                query, key = falcon.apply_rotary_pos_emb(query, key, *position_embeddings)
            if layer_past is not None:
                key, value = layer_past.update(key, value, self.layer_idx)
            # The mask from the model already includes ALiBi, divided by the square root of head_dim.
            out, weights = attention_forward(
                self, query, key, value, attention_mask,
                dropout=self.attention_dropout.p if self.training and alibi is not None else 0.0,
                scaling=self.inv_norm_factor, output_attentions=output_attentions, **kwargs,
            )  # fmt: skip
            return self.dense(_merge(out)), weights

    falcon.FALCON_ATTENTION_CLASSES[name] = SelfattnFalconAttention
