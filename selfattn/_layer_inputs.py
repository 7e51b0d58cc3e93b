"""Checks of the arguments of a layer's call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import _core
from ._any_cache import AnyCache, no_cache
from ._arguments import as_array
from ._errors import refusal
from ._rope import positions_for

if TYPE_CHECKING:
    from ._layer import SelfAttention

Inputs = tuple[Any, Any, Any, Any]  # x, context, positions, residual


def check_with_cache(function: str, cache: Any, context: Any, options: dict[str, Any]) -> None:
    """Raise if `cache` is not a cache, or if another argument sets what the cache determines."""
    if not isinstance(cache, AnyCache):
        raise no_cache(function, cache)
    if cache.values != "own":
        raise refusal(ValueError, function, "cache", " takes its values from the keys, but a layer computes both")
    if context is not None:
        raise refusal(
            ValueError, function, "context", " and ", "cache", " are given, but a cache holds the keys of ", "x", ""
        )
    for name in ("q_offset", "q_lens", "kv_lens"):
        if options.get(name) is not None:
            raise refusal(ValueError, function, name, " is given, but a cache knows where its tokens are")


def layer_inputs(function: str, layer: SelfAttention, inputs: Inputs, step: _core.Step | None) -> _core.LayerInputs:
    """Return the arrays of one call for the core, which checks their shapes."""
    x, context, positions, residual = inputs
    x = as_array(function, "x", x)
    if context is not None:
        context = as_array(function, "context", context)
    if positions is not None:
        if layer._rope is None:
            raise refusal(ValueError, function, "positions", " is given, but the layer has no rope")
        positions = positions_for(function, positions, x.shape[:-1], layer._rope)
    if residual is not None:
        if not layer._has_output:
            raise refusal(ValueError, function, "residual", " is given, but the layer has no w_o")
        residual = as_array(function, "residual", residual)
    return _core.LayerInputs(x=x, context=context, positions=positions, residual=residual, step=step)
