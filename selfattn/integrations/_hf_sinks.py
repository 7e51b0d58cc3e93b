"""Sinks: logits that take a share of the softmax, per head or per query."""

from __future__ import annotations

from typing import Any

import torch

from ._hf_sparse import check_shape, on_cpu


def add_sinks(
    options: dict[str, Any],
    module: torch.nn.Module,
    sinks: torch.Tensor | None,
    s_aux: torch.Tensor | None,
    q: torch.Tensor,
) -> torch.Tensor | None:
    """Set the sinks option; return sinks given per query (B, H, Sq), which are applied through lse afterwards."""
    if sinks is not None and s_aux is not None:
        raise TypeError("selfattn: sinks and s_aux are two names of one argument, but both are given")
    name, given = ("s_aux", s_aux) if sinks is None else ("sinks", sinks)
    if given is None:
        given = module._parameters.get("sinks")
        if given is None:
            return None
    if on_cpu(name, given).ndim != 4:
        options["sinks"] = given
        return None
    check_shape(name, given, q.shape[0], q.shape[1], q.shape[2], 1)
    options["return_lse"] = True
    return given[..., 0]


def absorb(result: torch.Tensor, weights: Any, lse: Any, sinks: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """Scale a result (B, Sq, H, D) and weights by the share of the softmax that sinks (B, H, Sq) leave to the keys."""
    # exp(lse) / (exp(lse) + exp(sink)), and 0 for queries that see no key
    share = torch.sigmoid(lse - sinks).where(lse != -torch.inf, 0.0).to(lse.dtype)
    result = (result * share.mT[..., None]).to(result.dtype)
    return result, None if weights is None else weights * share[..., None]
