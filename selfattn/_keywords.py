"""The keywords of public functions: what `help` shows of them, and the message for one that a function lacks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from difflib import get_close_matches
from inspect import Parameter, signature
from typing import Any, TypeVar

_F = TypeVar("_F", bound=Callable[..., Any])

# What other libraries call our options.
_HINTS = {
    "attn_bias": "bias",
    "position_bias": "t5",
    "attn_mask": "mask",
    "attention_bias": "bias",
    "attention_mask": "mask",
    "cache_seqlens": "kv_lens",
    "dropout_p": None,
    "dropout": None,
    "enable_gqa": None,
    "is_causal": "causal",
    "key_value_seq_lengths": "kv_lens",
    "local_window_size": "window",
    "logit_softcap": "softcap",
    "logits_soft_cap": "softcap",
    "n_threads": "num_threads",
    "need_weights": "return_weights",
    "nonpad_kv_seqlen": "kv_lens",
    "query_seq_lengths": "q_lens",
    "return_softmax_lse": "return_lse",
    "sm_scale": "scale",
    "softmax_scale": "scale",
    "window_size": "window",
}
_NO_NEED = {
    "dropout_p": "there is no dropout at inference",
    "dropout": "there is no dropout at inference",
    "enable_gqa": "grouped heads are recognised by the shapes of k and v",
}


def clean_signature(options: Callable[..., Any] | None = None, without: Collection[str] = ()) -> Callable[[_F], _F]:
    """Let `help` and `inspect.signature` show named keywords instead of a function's ``**``.

    They are those of `options`, which ``**`` passes on. Without `options`, ``**`` only catches misspelt keywords. The
    function itself stays as it is: a wrapper would cost each call some time.
    """
    others = [] if options is None else list(signature(options).parameters.values())

    def decorate(function: _F) -> _F:
        own = signature(function)
        kept = [x for x in own.parameters.values() if x.kind is not Parameter.VAR_KEYWORD]
        taken = {*own.parameters, *without}
        added = [x for x in others if x.kind is Parameter.KEYWORD_ONLY and x.name not in taken]
        function.__signature__ = own.replace(parameters=[*kept, *added])  # type: ignore[attr-defined]
        return function

    return decorate


def refuse_unknown(function: str, unknown: Iterable[str], hints: Mapping[str, str] | None = None) -> None:
    """Raise the TypeError for keywords that `function` does not have, with a hint (or its own) where one is known."""
    for name in unknown:
        message = f"{function}: unexpected keyword argument '{name}'"
        hint = (hints or {}).get(name, _HINTS.get(name))
        if hint is None and name not in _NO_NEED:
            hint = _closest(name, (hints or {}).values())
        if name in _NO_NEED:
            message += f" ({_NO_NEED[name]})"
        elif hint:
            message += f" (did you mean '{hint}'?)"
        raise TypeError(message)


def _closest(name: str, hints: Iterable[str]) -> str | None:
    """Return the keyword of a public function that `name` is most likely a misspelling of, or None."""
    package = sys.modules[__package__]
    public = (*(getattr(package, name) for name in package.__all__), package.SelfAttention.__call__)
    known = {*hints, *(keyword for function in public for keyword in getattr(function, "__kwdefaults__", None) or ())}
    return next(iter(get_close_matches(name, sorted(known), n=1, cutoff=0.75)), None)
