"""The function that transformers calls for every attention layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers.utils import output_capturing

import selfattn

from .. import _core
from . import _torch_autograd
from ._dropout import dropout_options
from ._hf_mask import VisibleKeys
from ._hf_packed import attend_packed, packed_bounds
from ._hf_sinks import absorb, add_sinks
from ._hf_sparse import Selection, as_array, on_cpu
from ._hf_stored import StoredTokens, attend_stored, can_attend
from ._tensors import bfloat16, empty_pair, opaque, to_array, wants_gradient
from ._torch_call import make_call

# Keywords meant for other parts of a model, which do not affect attention.
_UNRELATED = {
    "cache_position", "deterministic", "encoder_attention_mask", "encoder_hidden_states", "input_ids",
    "is_first_iteration", "logits_to_keep", "max_length_k", "max_length_q", "mm_token_type_ids", "num_items_in_batch",
    "output_hidden_states", "output_router_logits", "position_embeddings", "position_ids", "return_dict", "seq_idx",
    "token_type_ids", "use_cache",
}  # fmt: skip
_collector: Any = output_capturing._active_collector


@opaque
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
    sinks: torch.Tensor | None = None,
    indices: torch.Tensor | None = None,
    block_indices: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend by `selfattn.attention`, reading query (B, H, Sq, D), key and value (B, Hkv, Sk, D) in place.

    Returns the result as (B, Sq, H, D), and the weights (B, H, Sq, Sk) if `output_attentions` asks for them.
    If `attention_mask` is given, it alone decides what is visible. Otherwise `is_causal` (by default the module's, if
    it has one) aligns the last query with the last key, and `sliding_window` applies. If there is neither a mask nor
    `is_causal`, a `sliding_window` that would hide a key raises an error.
    Sparse layers pass the keys that a query sees as `indices` (B, Sq, n), or as the `block_indices` of their indexer.
    Sinks (`sinks` or `s_aux`) are given per head, or per query: (B, H, Sq, 1).
    `cu_seq_lens_q` and `cu_seq_lens_k` are the bounds of sequences that are packed into one batch entry without padding
    between them; each sequence attends only to itself. An `attention_mask` of numbers or booleans also applies within
    each sequence.
    """
    for name, given in kwargs.items():
        if given is not None and name not in _UNRELATED:
            raise TypeError(f"selfattn: unexpected keyword argument '{name}', which could change what a layer computes")
    if (
        position_bias is s_aux is sinks is indices is block_indices is cu_seq_lens_q is cu_seq_lens_k is None
        and type(attention_mask) is VisibleKeys
        and not (dropout or output_attentions)
    ):
        result = _attend_plainly(module, (query, key, value), attention_mask, scaling, softcap)
        if result is not None:
            return result, None
    q, k, v = _operands(query, key, value)
    kv_len = end = k.shape[2]
    if attention_mask is None:
        options = _by_default(module, q.shape[2], kv_len, is_causal, sliding_window)
    else:
        options, end = _by_mask(attention_mask, q.shape, k.shape)
        if end < kv_len:
            k, v = k[:, :, :end], v[:, :, :end]
    if position_bias is not None:
        _add_bias(options, position_bias, end)
    selection = Selection.of(module, indices, block_indices, q, key)
    by_query = add_sinks(options, module, sinks, s_aux, q)
    if output_attentions or _weights_are_recorded():
        options["return_weights"] = True
    if selection is not None:
        packed = cu_seq_lens_q is not None or cu_seq_lens_k is not None
        plain = not (packed or dropout or "return_weights" in options or _has_gradient((q, k, v), options, by_query))
        _select(options, selection, (q.shape[1], k.shape[1], end), plain)
    if scaling is not None and type(scaling) is not float:
        scaling = float(scaling)
    options["scale"], options["softcap"] = scaling, softcap
    options["num_threads"] = _threads()
    if cu_seq_lens_q is not None or cu_seq_lens_k is not None:
        bounds = packed_bounds(cu_seq_lens_q, cu_seq_lens_k, (q, k), attention_mask, options)
        if bounds is not None:
            return attend_packed(_attend, (q, k, v), options, (by_query, dropout), bounds)
    if dropout:
        options |= dropout_options("selfattn", "dropout", dropout)
    return _attend((q, k, v), options, by_query, kv_len)


def _attend_plainly(
    module: torch.nn.Module,
    operands: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    mask: VisibleKeys,
    scale: Any,
    softcap: float | None,
) -> torch.Tensor | None:
    """Return the result of a call that has a described mask and no other options; None for any other call.

    Between the products of a model, this code is not in the processor's caches: it must be short to be fast.
    """
    query, key, value = operands
    if (
        mask.made is not None
        or type(key) is StoredTokens
        or not query.dtype is key.dtype is value.dtype
        or (type(scale) is not float and scale is not None)
        or "sinks" in module._parameters
        or _collector.get()
        or torch._C._get_tracing_state()
        or wants_gradient(query, key, value)
    ):
        return None
    try:
        if query.dtype is torch.bfloat16:
            kind = bfloat16()
            q, k, v = (x.view(torch.uint16).numpy().view(kind) for x in operands)
        else:
            q, k, v = query.numpy(), key.numpy(), value.numpy()
    except (RuntimeError, TypeError):  # wrapped, on another device, or a leaf with gradients: see `to_array`
        return None
    if q.ndim != 4 or mask.sizes != (max(len(q), len(k)), q.shape[2], k.shape[2]):
        return None
    if mask.end < k.shape[2]:
        k, v = k[:, :, : mask.end], v[:, :, : mask.end]
    options = mask.prepare(scale, softcap, _threads())
    result = _core.attention(q.swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2), None, options)
    if query.dtype is torch.bfloat16:
        return torch.from_numpy(result.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(result)


def _attend(
    operands: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    options: dict[str, Any],
    sinks: torch.Tensor | None,
    kv_len: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the result (B, Sq, H, D), and the weights of all `kv_len` keys if requested."""
    if "dropout" in options or _has_gradient(operands, options, sinks):
        result, lse, weights = _torch_autograd.attend(make_call(*operands, **options))
        result = result.transpose(1, 2).contiguous()
    else:
        result, lse, weights = _attend_now(operands, options)
    if sinks is not None:
        result, weights = absorb(result, weights, lse, sinks)
    if "return_weights" not in options:
        return result, None
    return result, torch.nn.functional.pad(weights, (0, kv_len - weights.shape[-1])).to(result.dtype)


def _has_gradient(operands: tuple[torch.Tensor, ...], options: dict[str, Any], sinks: torch.Tensor | None) -> bool:
    return wants_gradient(*operands, options.get("bias"), options.get("sinks"), sinks)


def _select(options: dict[str, Any], selection: Selection, shape: tuple[int, int, int], plain: bool) -> None:
    """Hide the keys that are not selected; `plain`: the call has no option that needs a mask for that."""
    heads, kv_heads, kv_len = shape
    chosen = selection.options(kv_heads, kv_len) if plain else None
    if chosen is not None:
        options |= chosen
        return
    mask = selection.mask(heads, kv_len)
    options["mask"] = options["mask"] & mask if "mask" in options else mask


def _attend_now(
    operands: tuple[torch.Tensor, torch.Tensor, torch.Tensor], options: dict[str, Any]
) -> tuple[torch.Tensor, Any, Any]:
    """Return the result (B, Sq, H, D), lse and weights, without recording gradients."""
    q, k, v = operands
    for name in ("bias", "sinks"):
        if name in options:
            options[name] = to_array(options[name])
    q_array = to_array(q)
    batch, heads, q_len, _ = q_array.shape
    result, out = empty_pair((max(batch, k.shape[0]), q_len, heads, v.shape[3]), q.dtype)
    out = out.swapaxes(1, 2)
    if can_attend(q_len, k, v, options):
        done = attend_stored(q_array, k, out, options)
    else:
        done = selfattn.attention(q_array, to_array(k), to_array(v), out=out, **options)
    if done is out:
        return result, None, None
    lse = torch.from_numpy(done[1]) if "return_lse" in options else None
    weights = torch.from_numpy(done[-1]) if "return_weights" in options else None
    return result, lse, weights


def _operands(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the operands in one dtype; they must be in CPU memory."""
    if torch._C._get_tracing_state():
        raise RuntimeError("selfattn: a traced model would repeat this call's numbers: torch.jit.trace cannot be used")
    if not query.dtype is key.dtype is value.dtype:
        query, key, value = _autocast(query, key, value)
    if not (query.is_cpu and key.is_cpu and value.is_cpu):
        for name, x in (("query", query), ("key", key), ("value", value)):
            on_cpu(name, x)
    if query.ndim != 4:
        raise ValueError(
            f"selfattn: query has shape {tuple(query.shape)}, but (batch, heads, length, head_dim) is needed"
        )
    return query, key, value


def _autocast(*operands: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Convert the operands to autocast's dtype. Without autocast, return them unchanged; they are checked later."""
    if not torch.is_autocast_enabled("cpu"):
        return operands
    dtype = torch.get_autocast_dtype("cpu")
    return tuple(operand.to(dtype) for operand in operands)


def _by_default(
    module: torch.nn.Module, q_len: int, kv_len: int, is_causal: bool | None, sliding_window: int | None
) -> dict[str, Any]:
    """Return the options that hide keys if there is no mask."""
    if q_len == 1 and sliding_window is None:
        return {}
    if is_causal is None:
        is_causal = getattr(module, "is_causal", False)
    if not is_causal:
        # Models differ in whether a two-sided window includes the query itself; they pass a mask if it hides any key.
        if sliding_window is not None and kv_len > sliding_window + 1:
            raise ValueError(
                f"selfattn: sliding_window is {sliding_window} for {kv_len} keys without is_causal: "
                "an attention_mask is needed"
            )
        return {}
    if sliding_window is not None and kv_len > sliding_window:
        return {"causal": True, "window": (sliding_window - 1, None)}
    return {"causal": True} if q_len > 1 else {}


def _by_mask(mask: torch.Tensor, q: torch.Size, k: torch.Size) -> tuple[dict[str, Any], int]:
    """Return the options that hide keys, and the index from which on all keys are hidden."""
    if type(mask) is VisibleKeys:
        if mask.made is None and mask.sizes == (max(q[0], k[0]), q[2], k[2]):
            return dict(mask.options), mask.end
        mask = mask.dense()
    if mask.dtype is torch.bool:
        return {"mask": as_array("attention_mask", mask)}, k[2]
    if not mask.is_floating_point():
        raise TypeError(f"selfattn: attention_mask has dtype {mask.dtype}, but bool or numbers to add are needed")
    return {"bias": on_cpu("attention_mask", mask)}, k[2]


def _add_bias(options: dict[str, Any], position_bias: torch.Tensor, kv_len: int) -> None:
    """Set the bias option to a position bias over the first `kv_len` keys, plus the float mask if there is one."""
    bias = on_cpu("position_bias", position_bias)
    if bias.shape[-1] > kv_len:
        bias = bias[..., :kv_len]
    options["bias"] = bias + options["bias"] if "bias" in options else bias


def _threads() -> int:
    threads: int = torch.get_num_threads()
    return threads if threads == 1 else min(threads, selfattn.get_num_threads())


def _weights_are_recorded() -> bool:
    """Whether a hook collects the weights: some models, like GPT-2, do not pass `output_attentions` on."""
    outputs = _collector.get()
    return bool(outputs) and any(name.endswith("attentions") for name in outputs)
