"""flash-attn's functions on tensors, against formulas in float64 and their gradients by PyTorch."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from flash_reference import OPTIONS, plain
from torch_operands import FLOATS, compiling, integration, original, randn, torch

from selfattn import compat

BOUNDS = torch.tensor([0, 4, 4, 10], dtype=torch.int32), torch.tensor([0, 7, 9, 14], dtype=torch.int32)
TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-13, torch.bfloat16: 4e-2, torch.float16: 5e-3}
NAMES = [name for name in compat.__all__ if name.startswith("flash")]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(7)


def formula(q: Any, k: Any, v: Any, b: int, options: dict[str, Any]) -> Any:
    """Attention of one sequence (tokens, heads, size) in float64, with an autograd graph."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scale = options.get("softmax_scale") or q.shape[-1] ** -0.5
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    if softcap := options.get("softcap"):
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))
    if (slopes := options.get("alibi_slopes")) is not None:
        slopes = torch.as_tensor(slopes).double()
        scores = scores - (slopes[b] if slopes.ndim == 2 else slopes)[:, None, None] * distance.abs()
    left, right = options.get("window_size", (-1, -1))
    hidden = (distance < 0) & options.get("causal", False)
    hidden = hidden | ((distance > left) & (left >= 0)) | ((-distance > right) & (right >= 0))
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).masked_fill(hidden.all(-1, keepdim=True), 0)
    return torch.einsum("hqk,khd->qhd", weights, v)


def check(call: Any, parts: Any, tensors: Any, dtype: Any) -> None:
    """Compare result and gradients of `call` with those of `parts`, which computes in float64."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    exact = [x.detach().double().requires_grad_() for x in tensors]
    found, expected = call(*leaves), parts(*exact)
    assert found.dtype == dtype
    upstream = torch.linspace(-1, 1, found.numel()).view(found.shape).bfloat16()
    wanted = torch.autograd.grad(expected, exact, upstream.double())
    pairs = zip([found, *torch.autograd.grad(found, leaves, upstream.to(dtype))], [expected, *wanted], strict=True)
    for own, other in pairs:
        assert own.dtype == dtype
        torch.testing.assert_close(own.double(), other, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    with torch.no_grad():  # without residuals, in 16 bits rounded elsewhere
        torch.testing.assert_close(call(*tensors).double(), expected.detach(), atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("lengths", [(6, 6), (4, 9), (9, 4)], ids=str)
def test_flash_attn_func(name: str, dtype: Any, lengths: Any) -> None:
    q, k, v = randn(3, lengths[0], 4, 8, dtype=dtype), *(randn(3, lengths[1], 2, n, dtype=dtype) for n in (8, 5))
    options = {x: torch.as_tensor(y) if x == "alibi_slopes" else y for x, y in OPTIONS[name].items()}

    def parts(q: Any, k: Any, v: Any) -> Any:
        return torch.stack([formula(q[b], k[b], v[b], b, options) for b in range(3)])

    check(lambda *x: integration.flash_attn_func(*x, **options), parts, (q, k, v), dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_flash_attn_varlen_func(name: str, dtype: Any) -> None:
    q, k, v = randn(10, 4, 8, dtype=dtype), *(randn(14, 2, n, dtype=dtype) for n in (8, 5))
    options = {x: torch.as_tensor(y) if x == "alibi_slopes" else y for x, y in OPTIONS[name].items()}
    rows, keys = (list(zip(x[:-1].tolist(), x[1:].tolist(), strict=True)) for x in BOUNDS)

    def parts(q: Any, k: Any, v: Any) -> Any:
        found = [
            formula(q[slice(*rows[b])], k[slice(*keys[b])], v[slice(*keys[b])], b, options) for b in range(len(rows))
        ]
        return torch.cat(found)

    check(lambda *x: integration.flash_attn_varlen_func(*x, *BOUNDS, 6, 7, **options), parts, (q, k, v), dtype)


@pytest.mark.parametrize("causal", [False, True])
def test_as_the_function_of_pytorch(causal: bool) -> None:
    q, k, v = randn(2, 9, 4, 16), randn(2, 9, 2, 16), randn(2, 9, 2, 16)
    found = integration.flash_attn_func(q, k, v, causal=causal)
    expected = original(*(x.double().transpose(1, 2) for x in (q, k, v)), is_causal=causal, enable_gqa=True)
    torch.testing.assert_close(found.double(), expected.transpose(1, 2), atol=2e-6, rtol=0)


@pytest.mark.parametrize("varlen", [False, True])
def test_gradients_of_slopes_and_log_sum_exps(varlen: bool) -> None:
    q, k, v = randn(10, 4, 8), randn(14, 2, 8), randn(14, 2, 8)
    q, k, v = (x.double().requires_grad_() for x in ((q, k, v) if varlen else (q[None], k[None], v[None])))
    slopes = torch.rand(*((3, 4) if varlen else (4,)), dtype=torch.float64).requires_grad_()
    more = (*BOUNDS, 6, 7) if varlen else ()
    function = integration.flash_attn_varlen_func if varlen else integration.flash_attn_func

    def call(q: Any, k: Any, v: Any, slopes: Any) -> Any:
        out, lse, nothing = function(q, k, v, *more, alibi_slopes=slopes, window_size=(5, 2), return_attn_probs=True)
        assert nothing is None
        return out, lse.masked_fill(lse.isinf(), 0)

    assert torch.autograd.gradcheck(call, (q, k, v, slopes), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (q, k, v, slopes), fast_mode=True)


@pytest.mark.parametrize("varlen", [False, True])
def test_dropout(varlen: bool) -> None:
    q, k, v = randn(10, 4, 8), randn(14, 4, 8), randn(14, 4, 8)
    q, k, v = (x.double().requires_grad_() for x in ((q, k, v) if varlen else (q[None], k[None], v[None])))
    more = (*BOUNDS, 6, 8) if varlen else ()
    function = integration.flash_attn_varlen_func if varlen else integration.flash_attn_func

    def call(q: Any, k: Any, v: Any) -> Any:
        torch.manual_seed(3)
        return function(q, k, v, *more, dropout_p=0.3, causal=True, return_attn_probs=True)

    out, _, signed = call(q, k, v)
    kept = signed.clamp(min=0) / 0.7
    pieces = [(0, slice(0, 10), slice(0, 14))]
    if varlen:
        pieces = [(b, *(slice(*x[b : b + 2].tolist()) for x in BOUNDS)) for b in range(3)]
        assert signed.shape == (3, 4, 6, 8)
    for b, rows, keys in pieces:
        tokens, own = (out[rows], v[keys]) if varlen else (out[0], v[0])
        part = kept[b, :, : tokens.shape[0], : own.shape[0]]
        torch.testing.assert_close(torch.einsum("hqk,khd->qhd", part, own), tokens)
        undropped = signed[b, :, : tokens.shape[0]].abs().sum(-1)
        assert torch.all((undropped - 1).abs().lt(1e-12) | undropped.eq(0))
    share = (signed < 0).sum() / (signed != 0).sum()
    assert 0.15 < share < 0.45
    assert not torch.equal(function(q, k, v, *more, dropout_p=0.3), function(q, k, v, *more, dropout_p=0.3))
    assert torch.autograd.gradcheck(lambda *x: call(*x)[0], (q, k, v), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda *x: call(*x)[0], (q, k, v), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("varlen", [False, True])
def test_packed_operands(varlen: bool, dtype: Any) -> None:
    """They give the bits of the separate operands, also of the gradients."""
    front = (14,) if varlen else (2, 7)
    qkv, kv = (randn(*front, *x, 8, dtype=dtype).requires_grad_() for x in ((3, 4), (2, 2)))
    bounds = torch.tensor([0, 7, 7, 14])
    one, two = ((bounds, 7), (bounds, bounds, 7, 7)) if varlen else ((), ())
    prefix = "flash_attn_varlen" if varlen else "flash_attn"
    separate, of_all, of_keys = (getattr(integration, f"{prefix}_{x}func") for x in ("", "qkvpacked_", "kvpacked_"))
    q, k, v = qkv.unbind(-3)
    options: dict[str, Any] = {"causal": True, "softcap": 3.0}
    found = of_all(qkv, *one, **options), of_keys(q, kv, *two, **options)
    expected = separate(q, k, v, *two, **options), separate(q, *kv.unbind(-3), *two, **options)
    for own, other in zip(found, expected, strict=True):
        assert torch.equal(own, other)
        pair = [torch.autograd.grad(x.sum(), (qkv, kv), allow_unused=True, retain_graph=True) for x in (own, other)]
        assert all(torch.equal(a, b) for a, b in zip(*pair, strict=True) if a is not None)


def block(x: Any, bounds: Any) -> Any:
    q, k, v = (x @ torch.ones(8, 8) * n for n in (1, 2, 3))
    dense = integration.flash_attn_func(q[None], k[None], v[None], causal=True, window_size=(3, 0))
    return dense[0] + integration.flash_attn_varlen_func(q, k, v, bounds, bounds, 6, 6, causal=True, softcap=2.0)


@compiling
def test_compiled() -> None:
    x, bounds = randn(10, 2, 8).requires_grad_(), BOUNDS[0]
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    expected = block(x, bounds)
    found = compiled(x, bounds)
    torch.testing.assert_close(found, expected)
    pair = [torch.autograd.grad(y.square().sum(), x)[0] for y in (found, expected)]
    torch.testing.assert_close(*pair)


def test_mapped() -> None:
    x = randn(3, 10, 2, 8)
    call = lambda x: integration.flash_attn_varlen_func(x, x, x, BOUNDS[0], BOUNDS[0], 6, 6, causal=True)  # noqa: E731
    assert torch.equal(torch.func.vmap(call)(x), torch.stack([call(y) for y in x]))
    found = torch.func.vmap(torch.func.grad(lambda x: call(x).square().sum()))(x)
    y = x.clone().requires_grad_()
    torch.stack([call(z) for z in y]).square().sum().backward()
    torch.testing.assert_close(found, y.grad)


@pytest.mark.parametrize("name", NAMES)
def test_signatures_are_those_of_compat(name: str) -> None:
    own, other = (inspect.signature(getattr(x, name)).parameters.values() for x in (integration, compat))
    assert [(p.name, p.default) for p in own] == [(p.name, p.default) for p in other]


def test_pages() -> None:
    q, pages = randn(5, 4, 8), randn(4, 3, 2, 8)
    given = q, pages, pages, torch.tensor([0, 2, 5]), torch.tensor([0, 3, 8]), 3, 5
    table = torch.tensor([[3, 0], [1, 2]], dtype=torch.int32)
    found = integration.flash_attn_varlen_func(*given, causal=True, block_table=table)
    first = plain(q[:2].numpy(), pages[3].numpy(), pages[3].numpy(), causal=True)[0]
    assert abs(found[:2].numpy() - first).max() < 2e-6
    with pytest.raises(ValueError, match="pages have no gradients"):
        integration.flash_attn_varlen_func(q.requires_grad_(), *given[1:], block_table=table)


X = torch.ones(2, 3, 4, 8)
ERRORS: dict[str, Any] = {
    "flash_attn_func: k is a ndarray": lambda f: f.flash_attn_func(X, X.numpy(), X),
    "flash_attn_func: q has dtype torch.int32": lambda f: f.flash_attn_func(X.int(), X.int(), X.int()),
    "flash_attn_func: v has dtype torch.float16 but q has torch.float32": lambda f: f.flash_attn_func(X, X, X.half()),
    "flash_attn_func: k has shape \\(3, 4, 8\\)": lambda f: f.flash_attn_func(X, X[0], X),
    "flash_attn_func: k has head_dim 7 but q has 8": lambda f: f.flash_attn_func(X, X[..., :7], X),
    "flash_attn_func: dropout_p is 1.0": lambda f: f.flash_attn_func(X, X, X, 1.0),
    "flash_attn_func: softmax_scale is '1'": lambda f: f.flash_attn_func(X, X, X, 0.0, "1"),
    "flash_attn_func: window_size is 3": lambda f: f.flash_attn_func(X, X, X, window_size=3),
    "flash_attn_func: deterministic is 0": lambda f: f.flash_attn_func(X, X, X, deterministic=0),
    "flash_attn_func: alibi_slopes has shape": lambda f: f.flash_attn_func(X, X, X, alibi_slopes=torch.ones(3)),
    "flash_attn_func: alibi_slopes has dtype <U1": lambda f: f.flash_attn_func(X, X, X, alibi_slopes=["x"] * 4),
    "flash_attn_func: alibi_slopes is a tensor of layout": lambda f: f.flash_attn_func(
        X, X, X, alibi_slopes=torch.ones(4).to_sparse()
    ),
    "flash_attn_func: dropout_p is '1'": lambda f: f.flash_attn_func(X, X, X, "1"),
    "flash_attn_varlen_func: cu_seqlens_k has dtype <U1": lambda f: f.flash_attn_varlen_func(
        X[0], X[0], X[0], torch.tensor([0, 3]), ["x"], 3, 3
    ),
    "flash_attn_varlen_func: max_seqlen_k is 2, but": lambda f: f.flash_attn_varlen_func(
        X[0], X[0], X[0], torch.tensor([0, 3]), torch.tensor([0, 3]), 3, 2
    ),
    "flash_attn_varlen_func: cu_seqlens_q goes from 0 to 2": lambda f: f.flash_attn_varlen_func(
        X[0], X[0], X[0], torch.tensor([0, 2]), torch.tensor([0, 3]), 3, 3
    ),
    "flash_attn_qkvpacked_func: qkv has shape": lambda f: f.flash_attn_qkvpacked_func(X),
    "flash_attn_kvpacked_func: kv has head_dim 6 but q": lambda f: f.flash_attn_kvpacked_func(
        X, X[:, :, None, :2, :6].expand(2, 3, 2, 2, 6)
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        ERRORS[message](integration)
