"""selfattn in Hugging Face models: call `register()`, then pass ``attn_implementation="selfattn"``."""

from __future__ import annotations

import transformers

from ._runtime import share_runtime
from ._versions import check_version

check_version(transformers)  # checked before names are imported that older versions lack

from transformers import AttentionInterface, AttentionMaskInterface  # noqa: E402

from ._hf_attention import attention_forward  # noqa: E402
from ._hf_cache import Cache  # noqa: E402
from ._hf_mask import make_mask  # noqa: E402
from ._hf_models import refuse_own_attention, teach_bloom, teach_falcon  # noqa: E402

__all__ = ["Cache", "register"]

NAME = "selfattn"


def register() -> None:
    """Register ``attn_implementation="selfattn"`` with transformers. Calling it again has no effect.

    Models that use transformers' `AttentionInterface` work unchanged. Bloom and Falcon are patched by this call. Other
    models with their own attention code raise an error when they are constructed with this name. If only some parts of
    a model have their own attention code (Gemma 3n's audio encoder, LongT5's encoder), these parts keep it.

    Models can be trained, also with dropout of attention weights and gradient checkpointing. Tensors must be in CPU
    memory; unsupported calls raise an error. The number of threads is limited by both ``torch.set_num_threads`` and
    `selfattn.set_num_threads`, and calls run in PyTorch's threads if both libraries use OpenMP. A query that sees no
    key, as in padding, gives 0.

    Examples
    --------
    >>> from selfattn.integrations import transformers as selfattn_transformers
    >>> selfattn_transformers.register()
    >>> from transformers import AutoModelForCausalLM, LlamaConfig
    >>> config = LlamaConfig(
    ...     vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    ... )
    >>> model = AutoModelForCausalLM.from_config(config, attn_implementation="selfattn")
    """
    teach_bloom()
    teach_falcon(NAME)
    share_runtime()
    refuse_own_attention(NAME)
    AttentionMaskInterface.register(NAME, make_mask)
    AttentionInterface.register(NAME, attention_forward)
