"""Gradients of PyTorch's attention function, computed by selfattn."""

from __future__ import annotations

import inspect
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from torch_operands import (
    FLOATS,
    backward_operator,
    checkpoint,
    compiling,
    gradients,
    integration,
    make_call,
    operator,
    original,
    qkv,
    randn,
    sdpa,
    torch,
)

gradcheck, gradgradcheck = torch.autograd.gradcheck, torch.autograd.gradgradcheck


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(7)


def assert_close(found: list[Any], expected: list[Any]) -> None:
    assert len(found) == len(expected)
    for x, y in zip(found, expected, strict=True):
        assert x.shape == y.shape
        tolerance = {torch.float32: 3e-6, torch.float64: 1e-13, torch.bfloat16: 1e-2, torch.float16: 2e-3}[x.dtype]
        top = max(1.0, float(y.abs().max()))
        torch.testing.assert_close(x.double(), y.double(), atol=tolerance * top, rtol=0)


CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "plain": (qkv, {}),
    "causal": (qkv, {"is_causal": True}),
    "bool mask": (lambda dtype: (*qkv(dtype), torch.rand(4, 9, 7) < 0.7), {}),
    "float mask": (lambda dtype: (*qkv(dtype), randn(2, 1, 9, 7, dtype=dtype)), {"scale": 0.3}),
    "single mask": (lambda dtype: (*qkv(dtype), randn(1, 7)), {}),
    "groups": (lambda dtype: qkv(dtype, heads=6, groups=2), {"enable_gqa": True, "is_causal": True}),
    "broadcast": (lambda dtype: [randn(*n, dtype=dtype) for n in ((1, 9, 8), (2, 4, 7, 8), (4, 7, 3))], {}),
    "one head": (lambda dtype: [randn(*n, dtype=dtype) for n in ((9, 8), (7, 8), (7, 3))], {}),
    "tokens first": (lambda dtype: [x.transpose(1, 2) for x in randn(3, 2, 9, 4, 16, dtype=dtype)], {}),
}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_first_derivatives(name: str, dtype: Any) -> None:
    make, options = CALLS[name]
    tensors = make(dtype)
    found = gradients(lambda *x: sdpa(*x, **options), *tensors)
    exact = [x.double() if x.is_floating_point() else x for x in tensors]
    assert [x.dtype for x in found] == [x.dtype for x in tensors if x.is_floating_point()]
    assert_close(found, gradients(lambda *x: original(*x, **options), *exact))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_gradients_are_rounded_once(dtype: Any) -> None:
    tensors = [1.5 * x for x in qkv(dtype, 70, 70)]
    found = gradients(sdpa, *tensors)
    for x, y in zip(found, gradients(original, *(x.double() for x in tensors)), strict=True):
        rounding = (y.to(dtype).double() - y).square().mean().sqrt()
        assert (x.double() - y).square().mean().sqrt() <= 2 * rounding


SMALL = {
    "mask": ((2, 2, 3, 2), (2, 1, 4, 2), (2, 1, 4, 3), (2, 3, 4)),
    "keys": ((1, 3, 2), (1, 4, 2), (1, 4, 1), (1, 4)),
    "one head": ((3, 2), (4, 2), (4, 1), (3, 1)),
}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("form", ["eager", "operator"])
def test_both_derivatives_numerically(name: str, form: str) -> None:
    tensors = [torch.randn(n, dtype=torch.float64, requires_grad=True) for n in SMALL[name]]

    def call(q: Any, k: Any, v: Any, mask: Any) -> Any:
        if form == "eager":
            return sdpa(q, k, v, mask, scale=0.8, enable_gqa=q.ndim > 2)
        return operator(*make_call(q, k, v, bias=mask, scale=0.8, return_lse=True))[0]

    assert gradcheck(call, tensors, nondet_tol=0)
    assert gradgradcheck(call, tensors, nondet_tol=0)


def test_second_derivatives_of_some_arguments() -> None:
    """As in a penalty on the gradient of the queries."""

    def penalty(attend: Any, q: Any, k: Any, v: Any) -> Any:
        (slope,) = torch.autograd.grad(attend(q, k, v, is_causal=True).sin().sum(), q, create_graph=True)
        return slope.square().sum()[None]

    def plain(q: Any, k: Any, v: Any, is_causal: bool) -> Any:
        scores = (q @ k.mT / 4).masked_fill(torch.ones(9, 9).triu(1) > 0, -torch.inf)
        return scores.softmax(-1) @ v

    tensors = qkv(kv_len=9)
    found = gradients(lambda *x: penalty(sdpa, *x), *tensors)
    assert_close(found, gradients(lambda *x: penalty(plain, *x), *(x.double() for x in tensors)))


@pytest.fixture
def backward_calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Record the arguments of every call of attention_backward."""
    calls: list[Any] = []
    module: Any = inspect.getmodule(make_call)
    real = module.attention_backward

    def spy(*arrays: Any, **options: Any) -> Any:
        calls.append((arrays, options))
        return real(*arrays, **options)

    monkeypatch.setattr(module, "attention_backward", spy)
    return calls


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nothing_is_copied(dtype: Any, backward_calls: list[Any]) -> None:
    q, k, v = (x.transpose(1, 2).requires_grad_() for x in randn(3, 2, 9, 4, 16, dtype=dtype))
    mask, grad_out = randn(9, 9, dtype=dtype).requires_grad_(), randn(2, 9, 4, 16, dtype=dtype).transpose(1, 2)
    sdpa(q, k, v, mask).backward(grad_out)
    ((arrays, options),) = backward_calls
    for array, tensor in zip([*arrays[:4], options["bias"]], (grad_out, q, k, v, mask), strict=True):
        assert array.ctypes.data == tensor.data_ptr()
        assert array.strides == tuple(n * tensor.element_size() for n in tensor.stride())
    exact = np.float64 if dtype == torch.float64 else np.float32
    assert (arrays[4].dtype, arrays[5].dtype) == (exact, np.float64)


@pytest.mark.parametrize("wanted", ["q", "kv", "v", "m", "qm"])
def test_only_what_is_wanted_is_computed(wanted: str, backward_calls: list[Any]) -> None:
    tensors = dict(zip("qkvm", (*qkv(), torch.randn(9, 7)), strict=True))
    for name in wanted:
        tensors[name].requires_grad_()
    sdpa(*tensors.values()).sum().backward()
    assert backward_calls[0][1]["wrt"] == ["bias" if name == "m" else name for name in wanted]
    assert [name for name, x in tensors.items() if x.grad is not None] == list(wanted)
    assert all(tensors[name].grad.is_contiguous() for name in wanted)


def test_no_array_holds_the_scores() -> None:
    q, k, v = (x.clone().requires_grad_() for x in randn(3, 1, 1, 1500, 8))
    mask = randn(1, 1500).requires_grad_()
    tracemalloc.start()
    try:
        sdpa(q, k, v, mask).sum().backward()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert mask.grad is not None
    assert peak < 1500 * 1500 / 4


def test_hidden_keys_have_no_gradient() -> None:
    q, k, v = qkv()
    hidden = torch.arange(7) >= 5
    k[..., hidden, :], v[..., hidden, :] = torch.nan, torch.inf
    found = gradients(sdpa, q, k, v, ~hidden.expand(9, 7))
    assert_close(found[:1], gradients(original, q, k[..., :5, :], v[..., :5, :])[:1])
    assert all(torch.equal(x[..., hidden, :], torch.zeros(2, 4, 2, 16)) for x in found[1:])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant: bool) -> None:
    tensors = (*qkv(), torch.randn(9, 7))

    def backward(function: Any) -> list[Any]:
        leaves = [x.clone().requires_grad_() for x in tensors]
        function(*leaves).sin().sum().backward()
        return [x.grad for x in leaves]

    found = backward(lambda *x: checkpoint(sdpa, *x, use_reentrant=use_reentrant))
    assert all(torch.equal(x, y) for x, y in zip(found, backward(sdpa), strict=True))


def test_autocast() -> None:
    tensors = (*qkv(), torch.randn(9, 7))

    def narrow(*x: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return sdpa(*x)

    found = gradients(narrow, *tensors)
    assert {x.dtype for x in found} == {torch.float32}
    expected = gradients(sdpa, *(x.bfloat16() for x in tensors))
    assert all(torch.equal(x, y.float()) for x, y in zip(found, expected, strict=True))


def test_changes_of_saved_tensors_are_noticed() -> None:
    q, k, v = qkv()
    out = sdpa(q.requires_grad_(), k, v)
    k.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_the_operator_needs_residuals() -> None:
    q, k, v = qkv()
    out, *_ = operator(*make_call(q.requires_grad_(), k, v))
    with pytest.raises(RuntimeError, match=r"selfattn::sdpa: residuals is False"):
        out.sum().backward()


def test_second_derivatives_have_the_factors_of_dropout_in_full_precision() -> None:
    factors = torch.ops.selfattn.dropout_factors([1, 2, 30, 40], torch.tensor(5), 0.3)
    assert set(factors.unique().tolist()) == {0.0, 1 / 0.7}


def leaf(*shape: int) -> Any:
    return randn(*shape).requires_grad_()


OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "bias and scale": lambda: {"bias": leaf(9, 7), "scale": torch.tensor(0.3, requires_grad=True)},
    "dropout": lambda: {"bias": leaf(9, 7), "dropout": 0.3, "seed": torch.tensor(5)},
    "alibi": lambda: {"alibi_slopes": leaf(4), "causal": True, "q_offset": torch.tensor([0, 3])},
    "t5": lambda: {"t5": integration.T5Bias(leaf(8, 4), max_distance=5)},
    "chunk": lambda: {"causal": True, "chunk": 3},
    "prefix": lambda: {"causal": True, "prefix_lens": torch.tensor([5, 2])},
    "softcap": lambda: {"softcap": 2.0, "mask": torch.rand(2, 1, 9, 7) < 0.7},
    "lengths": lambda: {"q_lens": torch.tensor([9, 5]), "kv_lens": torch.tensor([7, 4])},
    "sinks and window": lambda: {"sinks": leaf(4), "window": (3, 1)},
    "weights": lambda: {"return_weights": True},
}


@compiling
@pytest.mark.parametrize("name", OPTIONS)
def test_operators_are_well_behaved(name: str) -> None:
    q, k, v = (x.requires_grad_() for x in qkv(torch.bfloat16))
    call = make_call(q, k, v, return_lse=True, **OPTIONS[name]())
    results = torch.library.opcheck(operator, tuple(call))
    out, exact, lse, weights = (x.detach() for x in operator(*call))
    wanted = [x is not None and x.requires_grad for x in call[:8]]
    of_weights = torch.randn_like(weights) if weights.numel() else None
    arguments = (torch.randn_like(out).requires_grad_(), torch.randn_like(lse), of_weights, exact, lse, wanted, *call)
    for found in (results, torch.library.opcheck(backward_operator, arguments)):
        assert set(found.values()) == {"SUCCESS"}


@compiling
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(backend: str) -> None:
    torch._dynamo.reset()

    def block(q: Any, k: Any, v: Any, mask: Any) -> Any:
        return sdpa(2 * q, k, v, mask) + sdpa(q, k, v, is_causal=True)

    tensors = (*qkv(), torch.randn(9, 7))
    found = gradients(torch.compile(block, backend=backend, fullgraph=True), *tensors)
    assert_close(found, gradients(block, *tensors))
