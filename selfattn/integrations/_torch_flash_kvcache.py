"""flash-attn 2's function for caches that the caller owns as CPU tensors."""

from __future__ import annotations

from typing import Any

import torch

from .. import compat
from ._tensors import check_memory, no_tangents, opaque, to_array, to_tensor
from ._torch_flash import Window, check_operands

_NAME = "flash_attn_with_kvcache"


@opaque
def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    cache_seqlens: int | torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: torch.Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Compute ``flash_attn.flash_attn_with_kvcache`` of CPU tensors; the caches are updated in place.

    As in the original, the result has no gradient, even if q requires one.

    Parameters
    ----------
    q : Tensor, shape (B, Sq, H, D)
    k_cache : Tensor, shape (Bc, capacity, Hkv, D)
    v_cache : Tensor, shape (Bc, capacity, Hkv, Dv)
        With `block_table`: pages, (num_blocks, page_size, Hkv, ·). In q's dtype, read in place.
    k : Tensor, shape (B, T, Hkv, D), optional
    v : Tensor, shape (B, T, Hkv, Dv), optional
        New tokens, written into the caches after the existing ones, before q attends.
    rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx, cache_leftpad, block_table, softmax_scale, causal
        As in `selfattn.compat.flash_attn_with_kvcache`, as tensors.
    window_size, softcap, rotary_interleaved, alibi_slopes, num_splits
        As in `selfattn.compat.flash_attn_with_kvcache`.
    return_softmax_lse : bool
        Also return the log-sum-exps.

    Returns
    -------
    out : Tensor, shape (B, Sq, H, Dv)
    softmax_lse : Tensor, shape (B, H, Sq)
        Only with `return_softmax_lse`.

    Raises
    ------
    TypeError, ValueError
        The caches are then unchanged.
    NotImplementedError
        Tensors with tangents: there is no forward-mode differentiation.

    Examples
    --------
    >>> import torch
    >>> from selfattn.integrations.torch import flash_attn_with_kvcache
    >>> k_cache, v_cache = torch.zeros(2, 1, 16, 2, 8, dtype=torch.bfloat16)
    >>> q, k, v = torch.randn(3, 1, 3, 2, 8).bfloat16()
    >>> flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=5, causal=True).shape
    torch.Size([1, 3, 2, 8])
    >>> torch.equal(k_cache[:, 5:8], k)
    True
    """
    check_operands(_NAME, 4, q=q, k_cache=k_cache, v_cache=v_cache)
    for name, tensor in (("k_cache", k_cache), ("v_cache", v_cache)):
        if tensor.is_neg():
            raise TypeError(f"{_NAME}: {name} holds numbers whose signs are still to be changed: pass .resolve_neg()")
        if k is not None and tensor.requires_grad and tensor.is_leaf and torch.is_grad_enabled():
            raise ValueError(f"{_NAME}: {name} requires grad, but k is to be written into it: pass .detach()")
    given = {
        "k": k, "v": v, "rotary_cos": rotary_cos, "rotary_sin": rotary_sin, "cache_seqlens": cache_seqlens,
        "cache_batch_idx": cache_batch_idx, "cache_leftpad": cache_leftpad, "block_table": block_table,
        "alibi_slopes": alibi_slopes,
    }  # fmt: skip
    no_tangents(_NAME, **given)
    result = compat.flash_attn_with_kvcache(
        to_array(q), to_array(k_cache), to_array(v_cache), softmax_scale=softmax_scale, causal=causal,
        window_size=window_size, softcap=softcap, rotary_interleaved=rotary_interleaved, num_splits=num_splits,
        return_softmax_lse=return_softmax_lse, **{name: _array(name, x) for name, x in given.items()},
    )  # fmt: skip
    if k is not None:
        torch.autograd.graph.increment_version((k_cache, v_cache))
    return tuple(to_tensor(x) for x in result) if return_softmax_lse else to_tensor(result)


def _array(name: str, value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    check_memory(_NAME, name, value)
    return to_array(value)
