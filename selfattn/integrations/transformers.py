"""Hugging Face models attend through selfattn: `register()`, then ``attn_implementation="selfattn"``."""

from __future__ import annotations

import transformers

from ._runtime import check_version, share_runtime

check_version(transformers)  # before names that older versions lack

from transformers import AttentionInterface, AttentionMaskInterface  # noqa: E402

from ._hf_attention import attention_forward  # noqa: E402
from ._hf_mask import make_mask  # noqa: E402
from ._hf_models import refuse_own_attention, teach_bloom, teach_falcon  # noqa: E402

NAME = "selfattn"


def register() -> None:
    """Make ``attn_implementation="selfattn"`` known to transformers. Calling it again changes nothing.

    Models that attend through transformers' `AttentionInterface` work as they are, Bloom and Falcon because this
    call teaches them. Every other model with attention code of its own raises when it is made with this name; a part
    with such code beside parts without (Gemma 3n's for sound, LongT5's encoder) keeps it. Models attend in eval mode
    on CPU tensors, under ``torch.no_grad()`` or ``torch.inference_mode()``; what cannot be computed raises. At most as
    many threads work as ``torch.set_num_threads`` and `selfattn.set_num_threads` both allow, and calls run in PyTorch's
    threads where both use OpenMP. A query that sees nothing, as in padding, gives 0.

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
