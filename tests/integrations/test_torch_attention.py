"""selfattn's attention on tensors: all options, their gradients, and what is refused."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
from torch_operands import (
    FLOATS,
    checkpoint,
    compiling,
    gradients,
    integration,
    make_call,
    qkv,
    sdpa,
    skip_without_inductor,
    torch,
)

import selfattn as sa
from selfattn._attention import ONLY_HERE
from selfattn.integrations import _dropout

gradcheck, gradgradcheck = torch.autograd.gradcheck, torch.autograd.gradgradcheck
attention, T5Bias = integration.attention, integration.T5Bias


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(7)


def arrays(*tensors: Any) -> list[Any]:
    return [integration.to_array(x) for x in tensors]


OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "causal": {"causal": True, "window": (3, None), "q_offset": torch.tensor([0, 3])},
    "lengths": {"kv_lens": [7, 4], "q_lens": np.array([9, 5]), "kv_starts": torch.tensor([0, 2])},
    "masked": {"mask": torch.ones(9, 7).tril(2) > 0, "bias": torch.linspace(-1, 1, 7)[None], "scale": 0.4},
    "per head": {"sinks": torch.ones(4), "alibi_slopes": sa.alibi_slopes(4), "softcap": 3, "scale": 2},
    "chunk": {"causal": True, "chunk": 3},
    "prefix": {"causal": True, "prefix_lens": torch.tensor([5, 2])},
    "rest": {"precision": "medium", "num_threads": 1, "t5": sa.T5Bias(np.ones((8, 4), np.float32))},
}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_options_are_those_of_arrays(name: str, dtype: Any) -> None:
    q, k, v = qkv(dtype)
    expected = sa.attention(*arrays(q, k, v), return_weights=True, **OPTIONS[name])
    found = attention(q, k, v, return_weights=True, **OPTIONS[name])
    assert all(np.array_equal(x, y) for x, y in zip(arrays(*found), expected, strict=True))
    out, lse = attention(q, k, v, return_lse=True, **OPTIONS[name])
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def doubles(*shapes: tuple[int, ...]) -> list[Any]:
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def test_everything_has_both_derivatives() -> None:
    """Also log-sum-exp and weights as results, with options that hide whole rows and keys."""
    lengths = {"kv_lens": [4, 3], "q_lens": [3, 2], "kv_starts": [0, 1]}

    def call(q: Any, k: Any, v: Any, bias: Any, sinks: Any, slopes: Any, table: Any, scale: Any) -> Any:
        out, lse, weights = attention(
            q, k, v, bias=bias, sinks=sinks, alibi_slopes=slopes, scale=scale, t5=T5Bias(table, max_distance=3),
            softcap=2.0, causal=True, window=(2, None), return_lse=True, return_weights=True, **lengths,
        )  # fmt: skip
        return out, lse.masked_fill(lse == -torch.inf, 0), weights

    arguments = doubles((2, 2, 3, 2), (2, 1, 4, 2), (2, 1, 4, 1), (3, 4), (2,), (2, 2), (4, 2), ())
    assert gradcheck(call, arguments, nondet_tol=0)
    assert gradgradcheck(call, arguments, nondet_tol=0, fast_mode=True)


@pytest.mark.parametrize("options", [{"chunk": 2}, {"prefix_lens": torch.tensor([3, 1])}])
def test_both_derivatives_of_chunks_and_prefixes(options: dict[str, Any]) -> None:
    arguments = doubles((2, 2, 3, 2), (2, 1, 4, 2), (2, 1, 4, 1))
    call: Any = lambda *x: attention(*x, causal=True, **options)  # noqa: E731
    assert gradcheck(call, arguments, nondet_tol=0)
    assert gradgradcheck(call, arguments, nondet_tol=0)


def test_tokens_before_heads() -> None:
    arguments = doubles((2, 3, 2, 2), (2, 4, 1, 2), (2, 4, 1, 1))
    call: Any = lambda *x: attention(*x, layout="bshd", causal=True)  # noqa: E731
    assert gradcheck(call, arguments, nondet_tol=0)
    assert gradgradcheck(call, arguments, nondet_tol=0)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradients_are_those_of_arrays(dtype: Any) -> None:
    q, k, v = qkv(dtype)
    bias, sinks, table = torch.randn(9, 7).to(dtype), torch.randn(4), torch.randn(8, 4)
    found = gradients(
        lambda q, k, v, bias, sinks, table: attention(q, k, v, bias=bias, sinks=sinks, t5=T5Bias(table), scale=0.4),
        q, k, v, bias, sinks, table,
    )  # fmt: skip
    names = ("q", "k", "v", "bias", "sinks", "t5")
    options = {"bias": integration.to_array(bias), "sinks": sinks.numpy(), "t5": sa.T5Bias(table.numpy())}
    out, vjp = sa.attention_vjp(*arrays(q, k, v), wrt=names, scale=0.4, **options)
    upstream = torch.linspace(-1, 1, out.size).bfloat16().to(dtype).view(out.shape)
    expected = vjp(integration.to_array(upstream))
    for name, x in zip(names, found, strict=True):
        assert np.array_equal(integration.to_array(x), getattr(expected, name).astype(arrays(x)[0].dtype)), name


@compiling
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "inductor":
        skip_without_inductor()
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def block(q: Any, k: Any, v: Any, sinks: Any, table: Any, scale: Any) -> Any:
        options = {"causal": True, "window": (3, None), "sinks": sinks, "t5": T5Bias(table), "scale": scale}
        out, lse = attention(2 * q, k, v, return_lse=True, **options)
        return out.sum(-1) + lse

    torch._dynamo.reset()
    tensors = (*qkv(kv_len=9), torch.randn(4), torch.randn(8, 4), torch.tensor(0.3))
    found = gradients(torch.compile(block, backend=backend, fullgraph=True), *tensors)
    for x, y in zip(found, gradients(block, *tensors), strict=True):
        torch.testing.assert_close(x, y)


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "keyword": (lambda q, k, v: attention(q, k, v, is_causal=True), TypeError, "did you mean 'causal'"),
    "out": (lambda q, k, v: attention(q, k, v, out=q), TypeError, "unexpected keyword argument 'out'"),
    "array": (lambda q, k, v: attention(q, k.numpy(), v), TypeError, "k is a ndarray, but a tensor is needed"),
    "sparse": (
        lambda q, k, v: attention(q, k, v, sinks=torch.ones(4).to_sparse()), TypeError,
        "sinks is a tensor of layout torch.sparse",
    ),
    "window": (lambda q, k, v: attention(q, k, v, window=3), TypeError, "window is 3, but a pair"),
    "shape": (lambda q, k, v: attention(q.requires_grad_(), k[..., :3], v), ValueError, "k has head_dim 3 but q has"),
    "flag": (lambda q, k, v: attention(q, k, v, return_lse=1), TypeError, "return_lse is 1"),
    "rate": (lambda q, k, v: attention(q, k, v, dropout=1.0), ValueError, "dropout is 1.0, but it must be"),
    "seed": (lambda q, k, v: attention(q, k, v, dropout=0.5, seed=-1), ValueError, "seed is -1"),
    "dropout": (lambda q, k, v: attention(q, k, v, dropout="x"), TypeError, "dropout is 'x', but a real number"),
    "dropout flag": (lambda q, k, v: attention(q, k, v, dropout=False), TypeError, "dropout is False, but a real num"),
    "unused seed": (lambda q, k, v: attention(q, k, v, seed="x"), TypeError, "seed is 'x', but an integer"),
    "scale": (lambda q, k, v: attention(q, k, v, scale="x"), TypeError, "scale is 'x', but a real number is needed"),
    "scale flag": (lambda q, k, v: attention(q, k, v, scale=True), TypeError, "scale is True, but a real number"),
    "infinite scale": (lambda q, k, v: attention(q, k, v, scale=float("inf")), ValueError, "scale is inf, but it must"),
    "scales": (
        lambda q, k, v: attention(q, k, v, scale=torch.tensor([0.5, 1.0])), ValueError,
        r"scale has shape \(2,\), but a number, or a tensor with one element",
    ),
    "bool scale": (
        lambda q, k, v: attention(q, k, v, scale=torch.tensor(True)), TypeError, "scale has dtype torch.bool"),
    "t5": (lambda q, k, v: attention(q, k, v, t5=3), TypeError, "t5 is a int, but a T5Bias is needed"),
    "table": (lambda q, k, v: attention(q, k, v, t5=T5Bias("x")), TypeError, "t5 has dtype <U1, but a tensor"),
    **{
        name: (
            lambda q, k, v, name=name: attention(q, k, v, **{name: ["x"]}), TypeError,
            f"{name} has dtype <U1, but a tensor, an array or numbers are needed",
        )
        for name in (
            "mask", "bias", "sinks", "alibi_slopes", "q_offset", "q_lens", "kv_lens", "kv_starts", "prefix_lens",
        )
    },
    "object": (lambda q, k, v: attention(q, k, v, sinks=object()), TypeError, "sinks of type object is not an array"),
    "layout": (lambda q, k, v: attention(q, k, v, layout="sbhd"), ValueError, "layout is 'sbhd'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_errors(name: str) -> None:
    call, kind, message = BAD[name]
    with pytest.raises(kind, match=f"^attention: .*{message}"):
        call(*qkv())


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast_as_the_original(kind: Any) -> None:
    q, k, v = qkv()
    bias, sinks = torch.randn(9, 7), torch.randn(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        projected = torch.nn.functional.linear(q, torch.eye(16))
        found, lse = attention(projected, k.to(kind), v, bias=bias, sinks=sinks, return_lse=True)
        from_array = attention(projected, k.to(kind), v, bias=bias.numpy(), sinks=sinks.numpy())
        wide = attention(q.double(), k.double(), v.double(), bias=bias.double(), mask=torch.ones(9, 7) > 0)
    narrow = [x.to(torch.bfloat16) for x in (q, k.to(kind), v, bias)]
    expected, expected_lse = attention(*narrow[:3], bias=narrow[3], sinks=sinks, return_lse=True)
    assert found.dtype == projected.dtype == torch.bfloat16
    assert torch.equal(found, expected)
    assert torch.equal(from_array, expected)
    assert torch.equal(lse, expected_lse)
    assert wide.dtype == torch.float64


def test_gradients_under_autocast() -> None:
    def narrow(*x: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return attention(*x[:3], bias=x[3])

    tensors = (*qkv(), torch.randn(9, 7))
    found = gradients(narrow, *tensors)
    expected = gradients(lambda *x: attention(*x[:3], bias=x[3]), *(x.bfloat16() for x in tensors))
    assert all(x.dtype == torch.float32 and torch.equal(x, y.float()) for x, y in zip(found, expected, strict=True))


def test_signature_is_that_of_arrays() -> None:
    found, expected = inspect.signature(attention).parameters, inspect.signature(sa.attention).parameters
    assert list(found) == [name for name in expected if name not in ("out", *ONLY_HERE)]


def test_seeds_of_dropout() -> None:
    """From the generator, whose state checkpointing restores, or given."""
    drawn = [_dropout.dropout_options("f", "p", 0.1) for _ in "ab"]
    torch.manual_seed(7)
    again = _dropout.dropout_options("f", "p", 0.1)
    assert again == drawn[0] != drawn[1]
    for seed in (0, 1 << 63, (1 << 64) - 1):
        options = make_call(*qkv(), **_dropout.dropout_options("f", "p", 0.1, seed)).options()
        assert (options["dropout"], options["seed"]) == (0.1, seed)
    assert _dropout.dropout_options("f", "p", 0.0, 3) == {}


def test_dropout_has_both_derivatives() -> None:
    def call(q: Any, k: Any, v: Any) -> Any:
        return attention(q, k, v, causal=True, dropout=0.4, seed=(1 << 64) - 1)

    arguments = doubles((2, 2, 3, 2), (2, 1, 4, 2), (2, 1, 4, 1))
    assert gradcheck(call, arguments, nondet_tol=0)
    assert gradgradcheck(call, arguments, nondet_tol=0, fast_mode=True)


@compiling
def test_dropout_follows_the_generator() -> None:
    q, k, v = (x.requires_grad_() for x in qkv(kv_len=9))

    def run(function: Any) -> list[Any]:
        torch.manual_seed(3)
        out = function(q, k, v, dropout_p=0.5, is_causal=True)
        return [out, *torch.autograd.grad(out.sin().sum(), (q, k, v))]

    expected = run(sdpa)
    plain = sdpa(q, k, v, is_causal=True)
    assert not torch.equal(expected[0], plain)
    torch._dynamo.reset()
    forms = {
        "checkpoint": lambda *x, **o: checkpoint(sdpa, *x, use_reentrant=False, **o),
        "compiled": torch.compile(sdpa, backend="aot_eager", fullgraph=True),
    }
    for name, function in forms.items():
        for x, y in zip(run(function), expected, strict=True):
            torch.testing.assert_close(x, y, msg=name)
    mean = torch.stack([sdpa(q, k, v, dropout_p=0.1, is_causal=True).detach() for _ in range(200)]).mean(0)
    torch.testing.assert_close(mean, plain, atol=0.2, rtol=0)
