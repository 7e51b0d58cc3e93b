"""The keywords of public functions: how `help` shows them, and the error for an unknown one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from difflib import get_close_matches
from functools import wraps
from inspect import Parameter, signature
from typing import Any, TypeVar

_F = TypeVar("_F", bound=Callable[..., Any])

# Other libraries' names of our options.
_HINTS = {
    "attn_bias": "bias",
    "position_bias": "t5",
    "attn_mask": "mask",
    "attention_bias": "bias",
    "attention_mask": "mask",
    "attention_dropout": "dropout",
    "cache_seqlens": "kv_lens",
    "dropout_p": "dropout",
    "dropout_rate": "dropout",
    "dropout_seed": "seed",
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
    "enable_gqa": "grouped heads are recognised by the shapes of k and v",
}


def clean_signature(options: Callable[..., Any] | None = None, without: Collection[str] = ()) -> Callable[[_F], _F]:
    """Make `help` and `inspect.signature` show named keywords instead of a function's ``**``.

    The function `options`, to which ``**`` is passed on, has these keywords. Without `options`, ``**`` only catches
    misspelt keywords. The function is not wrapped, since a wrapper would slow down each call.
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


def refuse_unknown(function: Callable[..., Any], given: Iterable[str], hints: Mapping[str, str] | None = None) -> None:
    """Raise a TypeError for a keyword that `function` does not have, with a hint if there is one.

    `hints` maps keywords to the names that this function has for them.
    """
    name = function.__qualname__.partition(".")[0]
    known = signature(function).parameters
    for keyword in given:
        if keyword in known:
            continue
        message = f"{name}: unexpected keyword argument '{keyword}'"
        if keyword in _NO_NEED:
            message += f" ({_NO_NEED[keyword]})"
        elif hint := _hint(keyword, known, hints or {}):
            message += f" (did you mean '{hint}'?)"
        raise TypeError(message)


def _hint(keyword: str, known: Iterable[str], hints: Mapping[str, str]) -> str | None:
    """Return the keyword of the function that is most likely meant, or None."""
    named = {name: name for name in known if name != "self"}
    others = {name: hints.get(ours, ours) for name, ours in _HINTS.items()} | dict(hints)
    ours = {our: name for name, our in _HINTS.items() if name in named}  # for functions that use other libraries' names
    spellings = ours | {name: our for name, our in others.items() if our in named} | named
    close = get_close_matches(keyword, sorted(spellings), n=1, cutoff=0.75)
    return spellings[close[0]] if close else None


def hinted(function: _F) -> _F:
    """Make a function or class refuse unknown keywords with a hint. Too slow for functions that are called often."""
    if isinstance(function, type):
        function.__init__ = hinted(function.__init__)  # type: ignore[misc]
        return function
    known = signature(function).parameters.keys()

    @wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        if not kwargs.keys() <= known:
            refuse_unknown(function, kwargs)
        return function(*args, **kwargs)

    return checked  # type: ignore[return-value]
