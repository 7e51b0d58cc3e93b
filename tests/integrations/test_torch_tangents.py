"""Forward-mode differentiation, which is refused: no function loses a tangent silently."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
from torch_operands import compiling, integration, qkv, sdpa, torch

ad = importlib.import_module("torch.autograd.forward_ad")
attention, T5Bias = integration.attention, integration.T5Bias
flash, varlen, cached = (
    integration.flash_attn_func,
    integration.flash_attn_varlen_func,
    integration.flash_attn_with_kvcache,
)
pytestmark = compiling  # PyTorch compiles parts of forward-mode differentiation
jvp, vmap, grad = torch.func.jvp, torch.func.vmap, torch.func.grad


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(7)


def dual(*shape: int) -> Any:
    return ad.make_dual(torch.rand(shape), torch.ones(shape))


def packed(q: Any, k: Any, v: Any, **options: Any) -> Any:
    """Attention of the first entry as one packed sequence."""
    bounds = torch.tensor([0, q.shape[1]]), torch.tensor([0, k.shape[1]])
    return varlen(q[0], k[0], v[0], *bounds, q.shape[1], k.shape[1], **options)


def paged(q: Any, k: Any, v: Any) -> Any:
    """Attention to a cache of one page."""
    bounds = torch.tensor([0, q.shape[1]]), torch.tensor([0, k.shape[1]])
    pages = torch.zeros(1, 1, dtype=torch.int32)
    return varlen(q[0], k, v, *bounds, q.shape[1], k.shape[1], block_table=pages)


CALLS: dict[str, tuple[Callable[..., Any], str]] = {
    "query": (lambda q, k, v: sdpa(dual(*q.shape), k, v), "scaled_dot_product_attention: query"),
    "value": (lambda q, k, v: sdpa(q, k, dual(*v.shape)), "scaled_dot_product_attention: value"),
    "mask": (lambda q, k, v: sdpa(q, k, v, dual(9, 9)), "scaled_dot_product_attention: attn_mask"),
    "groups": (lambda q, k, v: sdpa(q, dual(*k.shape), v, enable_gqa=True), "scaled_dot_product_attention: key"),
    "recorded": (lambda q, k, v: sdpa(q.requires_grad_(), dual(*k.shape), v), "scaled_dot_product_attention: key"),
    "q": (lambda q, k, v: attention(dual(*q.shape), k, v), "attention: q"),
    "bias": (lambda q, k, v: attention(q, k, v, bias=dual(9, 9)), "attention: bias"),
    "sinks": (lambda q, k, v: attention(q, k, v, sinks=dual(4)), "attention: sinks"),
    "scale": (lambda q, k, v: attention(q, k, v, scale=dual()), "attention: scale"),
    "table": (lambda q, k, v: attention(q, k, v, t5=T5Bias(dual(8, 4))), "attention: t5"),
    "flash": (lambda q, k, v: flash(q, dual(*k.shape), v), "flash_attn_func: k"),
    "slopes": (lambda q, k, v: flash(q, k, v, alibi_slopes=dual(9)), "flash_attn_func: alibi_slopes"),
    "varlen": (lambda q, k, v: packed(q, k, dual(*v.shape)), "flash_attn_varlen_func: v"),
    "pages": (lambda q, k, v: paged(dual(*q.shape), k, v), "flash_attn_varlen_func: q"),
    "packed": (lambda q, k, v: integration.flash_attn_qkvpacked_func(dual(2, 9, 3, 4, 16)),
               "flash_attn_qkvpacked_func: qkv"),
    "cache": (lambda q, k, v: cached(dual(*q.shape), k, v), "flash_attn_with_kvcache: q"),
    "new keys": (
        lambda q, k, v: cached(q, k, v, dual(2, 1, 9, 16), v[:, :1], cache_seqlens=1), "flash_attn_with_kvcache: k"),
    "below vmap": (
        lambda q, k, v: vmap(lambda q: sdpa(q, k[0], v[0]))(dual(*q.shape)), "scaled_dot_product_attention: query"),
    "below grad": (
        lambda q, k, v: grad(lambda k: sdpa(dual(*q.shape), k, v).sum())(k), "scaled_dot_product_attention: query"),
}  # fmt: skip


@pytest.mark.parametrize("recording", [True, False])
@pytest.mark.parametrize("name", CALLS)
def test_dual_tensors_are_refused(name: str, recording: bool) -> None:
    call, words = CALLS[name]
    with (
        ad.dual_level(),
        torch.set_grad_enabled(recording),
        pytest.raises(NotImplementedError, match=f"^{words} has a tangent, but there is no forward-mode"),
    ):
        call(*(x.clone() for x in qkv(kv_len=9)))


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "jvp": lambda f, q: jvp(f, (q,), (q,)),
    "linearize": lambda f, q: torch.func.linearize(f, q)[1](q),
    "jacfwd": lambda f, q: torch.func.jacfwd(f)(q),
    "hessian": lambda f, q: torch.func.hessian(lambda q: f(q).sum())(q),
    "vmap in jvp": lambda f, q: jvp(lambda q: vmap(lambda x: f(x[None]))(q), (q,), (q,)),
    "jvp in vmap": lambda f, q: vmap(lambda q: jvp(lambda x: f(x[None]), (q,), (q,)))(q),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_forward_mode_are_refused(name: str) -> None:
    q, k, v = qkv()
    with pytest.raises(NotImplementedError, match=r"^scaled_dot_product_attention: query has a tangent"):
        FUNCTIONS[name](lambda q: sdpa(q, k[:1], v[:1]), q)
    with pytest.raises(NotImplementedError, match=r"^attention: q has a tangent"):
        FUNCTIONS[name](lambda q: attention(q, k[:1], v[:1], causal=True), q)


def test_upstream_gradients_with_tangents_are_refused() -> None:
    q, k, v = qkv()
    leaf = q.clone().requires_grad_()
    out = sdpa(leaf, k, v)
    with ad.dual_level(), pytest.raises(NotImplementedError, match="grad_out has a tangent"):
        torch.autograd.grad(out, leaf, dual(*out.shape))
    _, pull = torch.func.vjp(lambda q: sdpa(q, k, v), q)
    with pytest.raises(NotImplementedError, match="grad_out has a tangent"):
        jvp(pull, (q,), (q,))


def test_calls_without_tangents_take_part() -> None:
    """Where something else has a tangent."""
    q, k, v = qkv()
    out, tangent = jvp(lambda x: sdpa(2 * q, k, v) + x, (q,), (q,))
    assert torch.equal(out, sdpa(2 * q, k, v) + q)
    assert torch.equal(tangent, q)
    with ad.dual_level():
        assert torch.equal(ad.unpack_dual(attention(q, k, v) + ad.make_dual(q, q)).tangent, q)


def test_models_are_refused() -> None:
    """Also where transformers calls the integration without recording gradients."""
    pytest.importorskip("transformers")
    forward = importlib.import_module("selfattn.integrations._hf_attention").attention_forward
    q, k, v = qkv()
    with ad.dual_level(), torch.no_grad(), pytest.raises(NotImplementedError, match="q has a tangent"):
        forward(torch.nn.Module(), dual(*q.shape), k, v, None, scaling=0.3, is_causal=False)
    module = torch.nn.Module()
    assert forward(module, q, k, v, None, scaling=0.3, is_causal=False)[0].shape == (2, 9, 4, 16)
