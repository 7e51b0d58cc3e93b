"""The function that transformers calls for every attention layer."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.utils import output_capturing

import selfattn

from ._hf_mask import VisibleKeys

# Keywords on their way to other parts of a model, which say nothing about attention.
_UNRELATED = {
    "cache_position", "deterministic", "encoder_attention_mask", "encoder_hidden_states", "is_first_iteration",
    "logits_to_keep", "max_length_k", "max_length_q", "mm_token_type_ids", "num_items_in_batch", "output_hidden_states",
    "output_router_logits", "position_embeddings", "position_ids", "return_dict", "seq_idx", "token_type_ids",
    "use_cache",
}  # fmt: skip
_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k")
_OPERANDS = ("query", "key", "value")
_collector: Any = output_capturing._active_collector


@torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    output_attentions: bool | None = False,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend by `selfattn.attention`, reading query (B, H, Sq, D), key and value (B, Hkv, Sk, D) where they stand.

    Returns the result as (B, Sq, H, D), and the weights (B, H, Sq, Sk) if `output_attentions` asks for them.
    A given `attention_mask` alone decides what is seen. Without one, `is_causal` (else the module's, if any) aligns the
    last query with the last key, and `sliding_window` counts; without both, it raises where it would hide a key.
    """
    if kwargs or dropout or torch._C._get_tracing_state():
        _refuse(kwargs, dropout, attention_mask)
    q, k, v, dtype = _operands(query, key, value)
    if attention_mask is None:
        options = _by_default(module, q.shape[2], k.shape[2], is_causal, sliding_window)
    else:
        options, end = _by_mask(attention_mask, q, k)
        if end < k.shape[2]:
            k, v = k[:, :, :end], v[:, :, :end]
    if position_bias is not None:
        _add_bias(options, position_bias, k.shape[2])
    if s_aux is None:
        s_aux = module._parameters.get("sinks")
    if s_aux is not None:
        options["sinks"] = as_array("s_aux", _without_gradient("s_aux", s_aux))
    if output_attentions or _weights_are_recorded():
        options["return_weights"] = output_attentions = True
    if scaling is not None and type(scaling) is not float:
        scaling = float(scaling)
    result = torch.empty((max(q.shape[0], k.shape[0]), q.shape[2], q.shape[1], v.shape[3]), dtype=dtype)
    out = as_array("result", result).swapaxes(1, 2)
    done = selfattn.attention(q, k, v, out=out, scale=scaling, softcap=softcap, num_threads=_threads(), **options)
    return result, _as_weights(done[1], key.shape[2], dtype) if output_attentions else None


def _operands(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], torch.dtype]:
    """Return the operands' memory, and their dtype."""
    if query.requires_grad or key.requires_grad or value.requires_grad:
        query, key, value = (_without_gradient(name, x) for name, x in zip(_OPERANDS, (query, key, value), strict=True))
    if not query.dtype is key.dtype is value.dtype:
        query, key, value = _autocast(query, key, value)
    q, k, v = as_array("query", query), as_array("key", key), as_array("value", value)
    if q.ndim != 4:
        raise ValueError(f"selfattn: query has shape {q.shape}, but (batch, heads, length, head_dim) is needed")
    return q, k, v, query.dtype


def as_array(name: str, tensor: torch.Tensor) -> NDArray[Any]:
    """Return a tensor's own memory as an array."""
    if not tensor.is_cpu:
        raise ValueError(f"selfattn: {name} is on device {tensor.device}, but only CPU tensors are accepted")
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(_bfloat16())  # type: ignore[no-any-return, unused-ignore]
    return tensor.numpy()  # type: ignore[no-any-return, unused-ignore]


@cache
def _bfloat16() -> Any:
    try:
        from ml_dtypes import bfloat16
    except ImportError as error:
        raise ImportError("selfattn: bfloat16 tensors need the package ml_dtypes (extra `transformers`)") from error
    return bfloat16


def _without_gradient(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"selfattn: {name} requires a gradient, which selfattn does not compute: "
            "call the model under torch.no_grad() or torch.inference_mode()"
        )
    return tensor.detach()


def _autocast(*operands: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Give the operands the one dtype in which autocast multiplies; without it, leave them to be refused."""
    if not torch.is_autocast_enabled("cpu"):
        return operands
    dtype = torch.get_autocast_dtype("cpu")
    return tuple(operand.to(dtype) for operand in operands)


def _by_default(
    module: torch.nn.Module, q_len: int, kv_len: int, is_causal: bool | None, sliding_window: int | None
) -> dict[str, Any]:
    """Return what hides keys where no mask does."""
    if q_len == 1 and sliding_window is None:
        return {}
    if is_causal is None:
        is_causal = getattr(module, "is_causal", False)
    if not is_causal:
        # A two-sided window may count itself or not; models ask for a mask where it hides anything.
        if sliding_window is not None and kv_len > sliding_window + 1:
            raise ValueError(
                f"selfattn: sliding_window is {sliding_window} for {kv_len} keys without is_causal: "
                "an attention_mask is needed"
            )
        return {}
    if sliding_window is not None and kv_len > sliding_window:
        return {"causal": True, "window": (sliding_window - 1, None)}
    return {"causal": True} if q_len > 1 else {}


def _by_mask(mask: torch.Tensor, q: NDArray[Any], k: NDArray[Any]) -> tuple[dict[str, Any], int]:
    """Return what hides keys, and the key from which on all are hidden."""
    if type(mask) is VisibleKeys:
        if mask.made is None and mask.sizes == (max(q.shape[0], k.shape[0]), q.shape[2], k.shape[2]):
            return dict(mask.options), mask.end
        mask = mask.dense()
    if mask.dtype is torch.bool:
        return {"mask": as_array("attention_mask", mask)}, k.shape[2]
    if not mask.is_floating_point():
        raise TypeError(f"selfattn: attention_mask has dtype {mask.dtype}, but bool or numbers to add are needed")
    return {"bias": as_array("attention_mask", _without_gradient("attention_mask", mask))}, k.shape[2]


def _add_bias(options: dict[str, Any], position_bias: torch.Tensor, kv_len: int) -> None:
    """Put a position bias among the options, over the first `kv_len` keys; a float mask is added to it."""
    bias = as_array("position_bias", _without_gradient("position_bias", position_bias))
    if bias.shape[-1] > kv_len:
        bias = bias[..., :kv_len]
    options["bias"] = bias + options["bias"] if "bias" in options else bias


def _threads() -> int:
    threads: int = torch.get_num_threads()
    return threads if threads == 1 else min(threads, selfattn.get_num_threads())


def _weights_are_recorded() -> bool:
    """Whether a hook waits for the weights: some models, like GPT-2, do not pass `output_attentions` on."""
    outputs = _collector.get()
    return bool(outputs) and any(name.endswith("attentions") for name in outputs)


def _as_weights(weights: NDArray[Any], kv_len: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the weights of all keys, in the dtype of the layer."""
    if hidden := kv_len - weights.shape[-1]:
        weights = np.pad(weights, ((0, 0), (0, 0), (0, 0), (0, hidden)))
    return torch.from_numpy(weights).to(dtype)


def _refuse(keywords: dict[str, Any], dropout: float, attention_mask: torch.Tensor | None) -> None:
    """Raise for what cannot be computed, and for a keyword that could change the result."""
    if torch._C._get_tracing_state():
        raise RuntimeError("selfattn: a traced model would repeat this call's numbers: torch.jit.trace cannot be used")
    if dropout:
        raise ValueError(f"selfattn: dropout is {dropout}, but there is none at inference: call model.eval() first")
    for name, given in keywords.items():
        if given is None or name in _UNRELATED:
            continue
        if name in _PACKED:
            # With a mask, that tells the packed sequences apart.
            if attention_mask is None and len(given) > 2:
                raise ValueError(f"selfattn: {name} packs {len(given) - 1} sequences, but there is no attention_mask")
            continue
        raise TypeError(f"selfattn: unexpected keyword argument '{name}', which could change what a layer computes")
