"""Attention under torch.func: gradients as functions, batches by vmap, and both together."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
from torch_operands import integration, make_call, original, qkv, sdpa, torch

grad, vjp, vmap = torch.func.grad, torch.func.vjp, torch.func.vmap
EVERY = (0, 1, 2, 3)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(7)


def loss(q: Any, k: Any, v: Any, mask: Any) -> Any:
    return sdpa(q, k, v, mask).sin().sum()


def original_loss(q: Any, k: Any, v: Any, mask: Any) -> Any:
    return original(q, k, v, mask).sin().sum()


def operands() -> tuple[Any, ...]:
    return (*qkv(), torch.randn(9, 7))


def assert_close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_gradients_as_functions() -> None:
    tensors = operands()
    assert_close(grad(loss, EVERY)(*tensors), grad(original_loss, EVERY)(*tensors))
    (out, pull), (theirs, their_pull) = vjp(sdpa, *tensors), vjp(original, *tensors)
    assert_close(out, theirs)
    assert_close(pull(theirs), their_pull(theirs))


MAPPED: dict[str, tuple[Callable[..., Any], Any]] = {
    "all": (lambda q, k, v, m: (q, k, v), (0, 0, 0, None)),
    "shared keys": (lambda q, k, v, m: (q, k[0], v[0]), (0, None, None, None)),
    "shared queries": (lambda q, k, v, m: (q[0], k, v), (None, 0, 0, None)),
    "a mask for each": (lambda q, k, v, m: (q[0], k[0], v[0], torch.stack([m, 2 * m])), (None, None, None, 0)),
    "heads": (lambda q, k, v, m: (q[0], k[0], v[0]), (0, 0, 0, None)),
    "another axis": (lambda q, k, v, m: (q.movedim(0, -1), k.movedim(0, 2), v), (-1, 2, 0, None)),
    "other ranks": (lambda q, k, v, m: (q, k[:, 0], v[:, 0]), (0, 0, 0, None)),
}


@pytest.mark.parametrize("name", MAPPED)
def test_batches_and_their_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = operands()
    choose, dims = MAPPED[name]
    chosen = (*choose(*tensors), tensors[-1])[:4]
    calls = count_kernels(monkeypatch)
    found = vmap(sdpa, dims)(*chosen)
    assert_close(found, vmap(original, dims)(*chosen))
    found = vmap(grad(loss, EVERY), dims)(*chosen)
    assert_close(found, vmap(grad(original_loss, EVERY), dims)(*chosen))
    total: Any = lambda f: lambda *x: vmap(f, dims)(*x).sum()  # noqa: E731
    assert_close(grad(total(loss), EVERY)(*chosen), grad(total(original_loss), EVERY)(*chosen))
    assert len(calls) == 5  # one for each pass, not for each entry


def count_kernels(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets longer with every call of the core."""
    calls: list[int] = []
    module: Any = inspect.getmodule(make_call)
    core = module._core.attention
    backward = module.attention_backward
    monkeypatch.setattr(module, "attention_backward", lambda *a, **k: (calls.append(1), backward(*a, **k))[1])

    class Core:
        @staticmethod
        def attention(*arguments: Any) -> Any:
            calls.append(1)
            return core(*arguments)

    monkeypatch.setattr(module, "_core", Core)
    return calls


def test_batches_within_batches() -> None:
    q, k, v, mask = operands()
    nested = vmap(vmap(sdpa, (0, 0, 0, None)), (0, 0, 0, None))
    assert_close(nested(q, k, v, mask), original(q, k, v, mask))


def test_batches_of_numbers_per_head() -> None:
    """A separate call for each entry."""
    q, k, v, _ = operands()
    sinks = torch.randn(2, 4)

    def call(q: Any, k: Any, v: Any, sinks: Any) -> Any:
        return integration.attention(q, k, v, sinks=sinks, causal=True).sin().sum()

    found = vmap(grad(call, EVERY))(q, k, v, sinks)
    each = [grad(call, EVERY)(q[i], k[i], v[i], sinks[i]) for i in range(2)]
    assert_close(found, tuple(torch.stack(parts) for parts in zip(*each, strict=True)))


def test_empty_batches_of_numbers_per_head() -> None:
    q, k, v, _ = operands()
    sinks, lengths = torch.randn(0, 4), torch.ones(3, 0, 2, dtype=torch.int64)

    def call(sinks: Any) -> Any:
        return integration.attention(q, k, v, sinks=sinks).sum()

    assert vmap(call)(sinks).shape == (0,)
    assert vmap(grad(call))(sinks).shape == sinks.shape
    assert grad(lambda sinks: vmap(call)(sinks).sum())(sinks).shape == sinks.shape
    results = vmap(lambda n: integration.attention(q, k, v, kv_lens=n[0], return_lse=True), 1)(lengths)
    assert [x.shape for x in results] == [(0, 2, 4, 9, 16), (0, 2, 4, 9)]


def test_batches_of_upstream_gradients() -> None:
    q, k, v, mask = (x.requires_grad_() for x in operands())
    upstream = torch.randn(3, 2, 4, 9, 16)
    found = torch.autograd.grad(sdpa(q, k, v, mask), (q, k, v, mask), upstream, is_grads_batched=True)
    out = sdpa(q, k, v, mask)
    each = [torch.autograd.grad(out, (q, k, v, mask), x, retain_graph=True) for x in upstream]
    assert_close(found, tuple(torch.stack(parts) for parts in zip(*each, strict=True)))


def small(q: Any, k: Any, v: Any, mask: Any) -> Any:
    return ((q @ k.mT / 2**0.5 + mask).softmax(-1) @ v).sin().sum()


def test_second_and_third_derivatives() -> None:
    shapes = ((2, 3, 2), (2, 4, 2), (2, 4, 1), (3, 4))
    tensors = tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)

    def hessian(f: Any) -> Any:
        return torch.func.jacrev(torch.func.jacrev(f, EVERY), EVERY)(*tensors)

    torch.testing.assert_close(hessian(loss), hessian(small))

    def third(f: Any) -> Any:
        slope = grad(lambda x: f(x, x, x, (x @ x.mT)[0]))
        curvature = grad(lambda x: slope(x).sin().sum())
        return grad(lambda x: curvature(x).cos().sum())(tensors[0])

    torch.testing.assert_close(third(loss), third(small))


def test_functionalized() -> None:
    q, k, v, mask = operands()
    assert torch.equal(
        torch.func.functionalize(lambda q: sdpa(q.mul_(2), k, v, mask))(q.clone()), sdpa(2 * q, k, v, mask)
    )
