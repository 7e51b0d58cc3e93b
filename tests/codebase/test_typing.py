"""Signatures of the public functions as type checkers, `help` and misspelt keywords see them."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
from places import ROOT

import selfattn as sa
from selfattn import _elements, _typing, compat, viz
from selfattn._attention import ONLY_HERE
from selfattn.compat import _jax

X = np.zeros((1, 2, 3, 8), np.float32)
LAYER = sa.SelfAttention(*[np.eye(8, dtype=np.float32)] * 3, num_heads=2)
CACHE = sa.KVCache(1, 2, 8, capacity=10)

GRADIENTS_OWN = {"wrt", "grad_lse", "grad_weights", "into", "accumulate"}
LAYER_OWN = {"wrt", "b_q", "b_k", "b_v", "b_o", "num_heads", "num_kv_heads", "context", "rope", "positions"}
LAYER_OWN |= {"q_norm", "k_norm"}

# Functions, the dict of their options, and the keywords that each overload spells out.
OPTIONS: list[tuple[Callable[..., Any], Any, set[str]]] = [
    (sa.attention, _typing.AttentionOptions, {"return_lse", "return_weights", *ONLY_HERE}),
    (sa.explain, _typing.ExplainOptions, set()),
    (sa.attention_backward, _typing.GradientOptions, GRADIENTS_OWN),
    (sa.attention_vjp, _typing.VjpOptions, {"wrt"}),
    (sa.AttentionState, _typing.StateOptions, {"kv_len", "first"}),
    (sa.attention_varlen_backward, _typing.VarlenGradientOptions, GRADIENTS_OWN - {"grad_weights"}),
    (sa.attention_varlen_vjp, _typing.VarlenVjpOptions, {"wrt"}),
    (sa.relative_attention, _typing.RelativeOptions, {"return_lse", "return_weights"}),
    (sa.relative_attention_backward, _typing.RelativeGradientOptions, GRADIENTS_OWN),
    (sa.relative_attention_vjp, _typing.RelativeVjpOptions, {"wrt"}),
    (sa.attention_varlen, _typing.VarlenOptions, {"return_lse", "return_weights"}),
    (sa.attention_with_kvcache, _typing.CachedOptions, {"return_lse", "return_weights"}),
    (sa.self_attention, _typing.SelfAttentionOptions, {"return_lse", "return_weights", "num_heads"}),
    (sa.self_attention_vjp, _typing.LayerVjpOptions, LAYER_OWN),
    (sa.SelfAttention, _typing.LayerSettings, {"num_heads"}),
    (sa.SelfAttention.__call__, _typing.LayerCallOptions, {"return_lse", "return_weights"}),
    (compat.dot_product_attention, _jax._Options, {"return_residual"}),
]


def keywords(function: Callable[..., Any]) -> set[str]:
    parameters = inspect.signature(function).parameters.values()
    assert not any(x.kind is x.VAR_KEYWORD for x in parameters)
    return {x.name for x in parameters if x.kind is x.KEYWORD_ONLY}


def test_mypy_finds_every_wrong_call_and_no_other() -> None:
    pytest.importorskip("mypy", reason="needs mypy")
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", "tests/codebase/typing_calls.py"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(("function", "options", "own"), OPTIONS, ids=lambda x: getattr(x, "__qualname__", ""))
def test_overloads_have_the_keywords_of_their_function(function: Any, options: Any, own: set[str]) -> None:
    assert options.__optional_keys__ == set(options.__annotations__) == keywords(function) - own


def test_storage_types_are_those_of_the_core() -> None:
    names, *_ = get_args(_typing.StorageType)
    assert set(get_args(names)) == set(_elements.ELEMENT_TYPES)


def test_signatures_show_the_defaults() -> None:
    shown = inspect.signature(sa.attention).parameters
    assert shown["precision"].default == "highest"
    assert list(shown)[:3] == ["q", "k", "v"]
    assert inspect.signature(LAYER).parameters["causal"].default is False
    assert "layout" not in inspect.signature(sa.self_attention).parameters
    assert inspect.signature(sa.explain).parameters["out"].default is None
    assert inspect.signature(sa.explain).parameters["causal"].default is False


MISSPELT: dict[str, tuple[Callable[..., Any], str, str]] = {
    "attention": (lambda **x: sa.attention(X, X, X, **x), "casual", "causal"),
    "explain": (lambda **x: sa.explain(X, X, X, **x), "num_thread", "num_threads"),
    "relative_attention": (lambda **x: sa.relative_attention(X, X, X, X, X, X, **x), "memlen", "mem_len"),
    "relative_attention_backward": (
        lambda **x: sa.relative_attention_backward(*[X] * 9, **x), "accumulte", "accumulate"
    ),
    "relative_attention_vjp": (lambda **x: sa.relative_attention_vjp(X, X, X, X, X, X, **x), "memlen", "mem_len"),
    "attention_varlen": (lambda **x: sa.attention_varlen(X, X, X, [0], **x), "soft_cap", "softcap"),
    "attention_with_kvcache": (lambda **x: sa.attention_with_kvcache(X, CACHE, **x), "position", "positions"),
    "SelfAttention.__call__": (lambda **x: LAYER(X[0], **x), "contex", "context"),
    "self_attention": (lambda **x: sa.self_attention(X[0], *[np.eye(8)] * 3, num_heads=2, **x), "biass", "bias"),
    "SelfAttention": (lambda **x: sa.SelfAttention(*[np.eye(8)] * 3, num_heads=2, **x), "num_kv_head", "num_kv_heads"),
    "AttentionState": (lambda **x: sa.AttentionState(X, kv_len=3, **x), "is_casual", "causal"),
    "KVCache": (lambda **x: sa.KVCache(1, 2, 8, 10, **x), "windw", "window"),
    "PagedKVCache": (lambda **x: sa.PagedKVCache(1, 2, 2, 8, **x), "valu_dim", "value_dim"),
    "RoPE": (lambda **x: sa.RoPE(**x), "bas", "base"),
    "T5Bias": (lambda **x: sa.T5Bias(np.eye(8), **x), "bidirectionl", "bidirectional"),
    "alibi_slopes": (lambda **x: sa.alibi_slopes(**x), "num_head", "num_heads"),
    "apply_rope": (lambda **x: sa.apply_rope(X, **x), "postions", "positions"),
    "t5_bias": (lambda **x: sa.t5_bias(np.eye(8), 3, 3, **x), "max_distnce", "max_distance"),
    "merge_states": (lambda **x: sa.merge_states([X], **x), "lse", "lses"),
    "heatmap": (lambda **x: viz.heatmap(np.eye(2), **x), "tokns", "tokens"),
    "head_view": (lambda **x: viz.head_view(np.eye(2), **x), "heads", "head"),
    "text": (lambda **x: viz.text(np.eye(2), **x), "tokns", "tokens"),
    "attention (reference)": (lambda **x: sa.reference.attention(X, X, X, **x), "casual", "causal"),
    "dot_product_attention": (lambda **x: compat.dot_product_attention(X, X, X, **x), "casual", "is_causal"),
    "scaled_dot_product_attention": (
        lambda **x: compat.scaled_dot_product_attention(X, X, X, **x), "casual", "is_causal"
    ),
    "flash_attn_func": (lambda **x: compat.flash_attn_func(X, X, X, **x), "is_causal", "causal"),
    "flash_attn_varlen_func": (
        lambda **x: compat.flash_attn_varlen_func(X, X, X, [0], [0], 1, 1, **x), "scale", "softmax_scale"
    ),
    "flash_attn_with_kvcache": (lambda **x: compat.flash_attn_with_kvcache(X, X, X, **x), "casual", "causal"),
    "attention_varlen (its own)": (lambda **x: sa.attention_varlen(X, X, X, [0], **x), "cache_seqlens", "cu_seqlens_k"),
}  # fmt: skip

# Keywords of other functions, which the one that was called does not have.
ELSEWHERE: dict[str, tuple[Callable[..., Any], str]] = {
    "attention": (lambda **x: sa.attention(X, X, X, **x), "sequences"),
    "explain": (lambda **x: sa.explain(X, X, X, **x), "sequences"),
    "attention_with_kvcache": (lambda **x: sa.attention_with_kvcache(X, CACHE, **x), "kv_lens"),
    "attention_with_kvcache (another's)": (lambda **x: sa.attention_with_kvcache(X, CACHE, **x), "cache_seqlens"),
    "SelfAttention": (lambda **x: LAYER(X[0], **x), "layout"),
    "KVCache": (lambda **x: sa.KVCache(1, 2, 8, 10, **x), "attn_mask"),
}


@pytest.mark.parametrize("name", MISSPELT)
def test_misspelt_keywords_are_told_what_may_be_meant(name: str) -> None:
    call, wrong, right = MISSPELT[name]
    name = name.split(" ")[0].removesuffix(".__call__")
    message = f"{name}: unexpected keyword argument '{wrong}' (did you mean '{right}'?)"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        call(**{wrong: 1})


@pytest.mark.parametrize("name", ELSEWHERE)
def test_no_keyword_is_proposed_that_a_function_lacks(name: str) -> None:
    call, wrong = ELSEWHERE[name]
    with pytest.raises(TypeError, match=f"^{name.split(' ')[0]}: unexpected keyword argument '{wrong}'$"):
        call(**{wrong: 1})


@pytest.mark.parametrize("hot", [sa.attention, sa.attention_with_kvcache, sa.SelfAttention.__call__])
def test_calls_of_models_have_no_wrapper(hot: Any) -> None:
    assert not hasattr(hot, "__wrapped__")
