"""The plans of calls other than `attention`: a call is made in a rehearsal, in which the core computes nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from inspect import Parameter, signature
from typing import Any

import numpy as np

from . import _core
from ._apply_rope import apply_rope
from ._attention import attention
from ._cached import attention_with_kvcache
from ._errors import refusal
from ._explain import Explanation
from ._feed_forward import FeedForward
from ._gradients import attention_backward
from ._layer import SelfAttention
from ._linear import Linear
from ._norm import LayerNorm, RMSNorm, layer_norm, rms_norm
from ._relative import relative_attention
from ._relative_gradients import relative_attention_backward
from ._self_attention import self_attention
from ._states import merge_states
from ._threads import active_isa
from ._varlen import attention_varlen
from ._varlen_gradients import attention_varlen_backward

_NAME = "explain_call"
_LAYERS = (SelfAttention, Linear, FeedForward, LayerNorm, RMSNorm)
_FUNCTIONS: tuple[Callable[..., Any], ...] = (
    attention, attention_varlen, attention_with_kvcache, relative_attention, self_attention, attention_backward,
    attention_varlen_backward, relative_attention_backward, merge_states, layer_norm, rms_norm, apply_rope,
)  # fmt: skip
_WRITTEN = ("out", "into")  # arguments that a call writes to; `out` of a backward function is only read


def explain_call(call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Explanation:
    """Tell what a call would do, without computing anything.

    Parameters
    ----------
    call : callable
        `attention`, `attention_varlen`, `attention_with_kvcache`, `relative_attention`, `self_attention`, the backward
        function of one of them, `merge_states`, `layer_norm`, `rms_norm`, `apply_rope`, or a layer: `SelfAttention`,
        `Linear`, `FeedForward`, `LayerNorm` or `RMSNorm`.
    *args, **kwargs
        The arguments of the call, except those that it writes to, `out` and `into`. They are checked as the call checks
        them. A cache keeps its tokens and lengths.

    Returns
    -------
    Explanation
        A dict with a readable `str()`: isa, flops (of all parts), and parts: a list of Explanations, one for each thing
        that a team of threads would compute, in that order. Each part tells its work ("attention", "attention
        gradients", "linear", "feed-forward", "norm", "rotation", "merge"), tasks, threads and flops. A part with
        attention tells what `explain` tells. `attention_varlen` has such a part for each sequence; one team computes
        all of them.

    Raises
    ------
    TypeError, ValueError, MemoryError
        As from the call. Also if `call` is something else, or `out` or `into` is given.

    Notes
    -----
    The call is made in full, except for what the core computes. So its results are allocated, and if it converts or
    packs arguments, it does so. What NumPy computes with the results of the core, for example a sum over the batch, is
    computed of unspecified numbers. Code of the arguments that runs meanwhile, such as an ``__array__`` method, must
    not call this package: its calls would compute nothing either.

    Examples
    --------
    >>> import numpy as np
    >>> import selfattn as sa
    >>> cache = sa.KVCache(2, num_kv_heads=1, head_dim=64, capacity=100)
    >>> x = np.zeros((2, 1, 5, 64), dtype=np.float32)
    >>> plan = sa.explain_call(sa.attention_with_kvcache, x, cache, x, x, rope=True)
    >>> [part["work"] for part in plan["parts"]]
    ['rotation', 'attention']
    >>> cache.lengths
    array([0, 0])
    """
    if not isinstance(call, _LAYERS) and not any(call is function for function in _FUNCTIONS):
        known = ", ".join(function.__name__ for function in _FUNCTIONS)
        what = getattr(call, "__name__", type(call).__name__)
        raise refusal(TypeError, _NAME, "call", f" is {what}, but {known} or a layer is needed")
    known_names = signature(call).parameters
    for name in _WRITTEN:
        if kwargs.get(name) is not None and name in known_names and known_names[name].kind is Parameter.KEYWORD_ONLY:
            raise refusal(ValueError, _NAME, name, " is given, but nothing is computed that could be written to it")
    with np.errstate(all="ignore"):  # NumPy may compute with results of the core, which are unspecified
        parts = [Explanation(part) for part in _core.rehearse(partial(call, *args, **kwargs))]
    return Explanation(isa=active_isa(), flops=sum(part["flops"] for part in parts), parts=parts)
