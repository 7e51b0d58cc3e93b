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

# Keywords meant for other parts of a model, which do not affect attention.
_UNRELATED = {
    "cache_position", "deterministic", "encoder_attention_mask", "encoder_hidden_states", "input_ids",
    "is_first_iteration", "logits_to_keep", "max_length_k", "max_length_q", "mm_token_type_ids", "num_items_in_batch",
    "output_hidden_states", "output_router_logits", "position_embeddings", "position_ids", "return_dict", "seq_idx",
    "token_type_ids", "use_cache",
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
    sinks: torch.Tensor | None = None,
    indices: torch.Tensor | None = None,
    block_indices: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend by `selfattn.attention`, reading query (B, H, Sq, D), key and value (B, Hkv, Sk, D) in place.

    Returns the result as (B, Sq, H, D), and the weights (B, H, Sq, Sk) if `output_attentions` asks for them.
    If `attention_mask` is given, it alone decides what is visible. Otherwise `is_causal` (by default the module's, if
    any) aligns the last query with the last key and applies `sliding_window`. A `sliding_window` without mask and
    `is_causal` raises an error if it would hide a key.
    Sparse layers pass the keys that a query sees as `indices` (B, Sq, n), or as the `block_indices` of their indexer.
    Sinks (`sinks` or `s_aux`) are given per head, or per query: (B, H, Sq, 1).
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
    if indices is not None:
        _keep(options, _selected(indices, q, key), k.shape[2])
    if block_indices is not None:
        _keep(options, _selected_blocks(module, block_indices, q, key), k.shape[2])
    by_query = _add_sinks(options, module, sinks, s_aux, q)
    if output_attentions or _weights_are_recorded():
        options["return_weights"] = True
    if scaling is not None and type(scaling) is not float:
        scaling = float(scaling)
    options["scale"], options["softcap"] = scaling, softcap
    return _attend((q, k, v), options, by_query, key.shape[2], dtype)


def _attend(
    operands: tuple[NDArray[Any], NDArray[Any], NDArray[Any]],
    options: dict[str, Any],
    sinks: torch.Tensor | None,
    kv_len: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the result (B, Sq, H, D), and the weights of all `kv_len` keys if requested."""
    q, k, v = operands
    result = torch.empty((max(q.shape[0], k.shape[0]), q.shape[2], q.shape[1], v.shape[3]), dtype=dtype)
    out = as_array("result", result).swapaxes(1, 2)
    done = selfattn.attention(q, k, v, out=out, num_threads=_threads(), **options)
    weights = done[-1] if "return_weights" in options else None
    if sinks is not None:
        _absorb(result, weights, done[1], sinks)
    return result, None if weights is None else _as_weights(weights, kv_len, dtype)


def _operands(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], torch.dtype]:
    """Return the operands as arrays over their own memory, and their dtype."""
    if query.requires_grad or key.requires_grad or value.requires_grad:
        query, key, value = (_without_gradient(name, x) for name, x in zip(_OPERANDS, (query, key, value), strict=True))
    if not query.dtype is key.dtype is value.dtype:
        query, key, value = _autocast(query, key, value)
    q, k, v = as_array("query", query), as_array("key", key), as_array("value", value)
    if q.ndim != 4:
        raise ValueError(f"selfattn: query has shape {q.shape}, but (batch, heads, length, head_dim) is needed")
    return q, k, v, query.dtype


def as_array(name: str, tensor: torch.Tensor) -> NDArray[Any]:
    """Return an array that shares the tensor's memory."""
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
    """Convert the operands to autocast's dtype. Without autocast, return them unchanged; they are rejected later."""
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


def _by_mask(mask: torch.Tensor, q: NDArray[Any], k: NDArray[Any]) -> tuple[dict[str, Any], int]:
    """Return the options that hide keys, and the index from which on all keys are hidden."""
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
    """Set the bias option to a position bias over the first `kv_len` keys, plus the float mask if there is one."""
    bias = as_array("position_bias", _without_gradient("position_bias", position_bias))
    if bias.shape[-1] > kv_len:
        bias = bias[..., :kv_len]
    options["bias"] = bias + options["bias"] if "bias" in options else bias


def _check_shape(name: str, tensor: torch.Tensor, *needed: int | None) -> None:
    """Raise unless the tensor has the needed shape; None matches any length."""
    if tensor.ndim != len(needed) or any(n not in (None, size) for n, size in zip(needed, tensor.shape, strict=True)):
        axes = ", ".join("any" if n is None else str(n) for n in needed)
        raise ValueError(f"selfattn: {name} has shape {tuple(tensor.shape)}, but ({axes}) is needed")


def _selected(indices: torch.Tensor, q: NDArray[Any], key: torch.Tensor) -> NDArray[np.bool_]:
    """Return a mask (B, 1, Sq, Sk) of the keys with the given indices (B, Sq, n); negative indices are ignored."""
    batch, q_len, kv_len = max(q.shape[0], key.shape[0]), q.shape[2], key.shape[2]
    _check_shape("indices", indices, batch, q_len, None)
    chosen = as_array("indices", indices)
    if chosen.dtype.kind != "i":
        raise TypeError(f"selfattn: indices has dtype {indices.dtype}, but integers are needed")
    if chosen.size and chosen.max() >= kv_len:
        raise ValueError(f"selfattn: indices has {chosen.max()}, but there are {kv_len} keys")
    keep = np.zeros((batch, q_len, kv_len + 1), dtype=bool)
    np.put_along_axis(keep, np.where(chosen < 0, kv_len, chosen), True, axis=-1)
    return keep[:, None, :, :kv_len]


def _selected_blocks(module: Any, block_indices: torch.Tensor, q: NDArray[Any], key: torch.Tensor) -> NDArray[np.bool_]:
    """Return a mask (B, H, Sq, Sk) of the keys in the given blocks, built by the layer's indexer."""
    build = getattr(getattr(module, "indexer", None), "build_block_mask", None)
    if build is None:
        raise TypeError(f"selfattn: block_indices is given, but {type(module).__name__} has no indexer to read it")
    _check_shape("block_indices", block_indices, max(q.shape[0], key.shape[0]), None, q.shape[2], None)
    everything = torch.ones((1, 1, 1, 1), dtype=torch.bool)
    numbers = build(block_indices, everything, key.shape[2], torch.float32, key.device, None)
    keep: NDArray[np.bool_] = as_array("block_indices", numbers == 0)
    return keep


def _keep(options: dict[str, Any], selected: NDArray[np.bool_], kv_len: int) -> None:
    """Also hide those of the first `kv_len` keys that are not selected."""
    mask = selected[..., :kv_len]
    options["mask"] = options["mask"] & mask if "mask" in options else mask


def _add_sinks(
    options: dict[str, Any],
    module: torch.nn.Module,
    sinks: torch.Tensor | None,
    s_aux: torch.Tensor | None,
    q: NDArray[Any],
) -> torch.Tensor | None:
    """Set the sinks option; return sinks given per query (B, H, Sq), which are applied through lse afterwards."""
    if sinks is not None and s_aux is not None:
        raise TypeError("selfattn: sinks and s_aux are two names of one argument, but both are given")
    name, given = ("s_aux", s_aux) if sinks is None else ("sinks", sinks)
    if given is None:
        given = module._parameters.get("sinks")
        if given is None:
            return None
    given = _without_gradient(name, given)
    array = as_array(name, given)
    if given.ndim != 4:
        options["sinks"] = array
        return None
    _check_shape(name, given, q.shape[0], q.shape[1], q.shape[2], 1)
    options["return_lse"] = True
    return given[..., 0]


def _absorb(result: torch.Tensor, weights: NDArray[Any] | None, lse: NDArray[Any], sinks: torch.Tensor) -> None:
    """Scale a result (B, Sq, H, D) and weights by the share of the softmax that sinks (B, H, Sq) leave to the keys."""
    total = torch.from_numpy(lse)
    # exp(lse) / (exp(lse) + exp(sink)), and 0 for queries that see no key
    share = torch.sigmoid(total - sinks).where(total != -torch.inf, 0.0)
    result *= share.mT[..., None]
    if weights is not None:
        weights *= share[..., None].numpy()


def _threads() -> int:
    threads: int = torch.get_num_threads()
    return threads if threads == 1 else min(threads, selfattn.get_num_threads())


def _weights_are_recorded() -> bool:
    """Whether a hook collects the weights: some models, like GPT-2, do not pass `output_attentions` on."""
    outputs = _collector.get()
    return bool(outputs) and any(name.endswith("attentions") for name in outputs)


def _as_weights(weights: NDArray[Any], kv_len: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the weights of all keys in the layer's dtype."""
    if hidden := kv_len - weights.shape[-1]:
        weights = np.pad(weights, ((0, 0), (0, 0), (0, 0), (0, hidden)))
    return torch.from_numpy(weights).to(dtype)


def _refuse(keywords: dict[str, Any], dropout: float, attention_mask: torch.Tensor | None) -> None:
    """Raise for unsupported calls, and for unknown keywords that could change the result."""
    if torch._C._get_tracing_state():
        raise RuntimeError("selfattn: a traced model would repeat this call's numbers: torch.jit.trace cannot be used")
    if dropout:
        raise ValueError(f"selfattn: dropout is {dropout}, but there is none at inference: call model.eval() first")
    for name, given in keywords.items():
        if given is None or name in _UNRELATED:
            continue
        if name in _PACKED:
            # If there is a mask, it separates the packed sequences.
            if attention_mask is None and len(given) > 2:
                raise ValueError(f"selfattn: {name} packs {len(given) - 1} sequences, but there is no attention_mask")
            continue
        raise TypeError(f"selfattn: unexpected keyword argument '{name}', which could change what a layer computes")
