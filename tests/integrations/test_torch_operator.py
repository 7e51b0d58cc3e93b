"""The operator of PyTorch: its schema, fake results, compilation, export and transformations."""

from __future__ import annotations

from typing import Any

import pytest
from torch_operands import (
    assert_same,
    compiling,
    exact,
    make_call,
    operator,
    qkv,
    randn,
    sdpa,
    skip_without_inductor,
    torch,
)

import selfattn
from selfattn._attention import ONLY_HERE


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(7)


def test_the_operator_takes_every_option() -> None:
    call = make_call(*qkv())
    others = {"window": "left", "return_lse": "residuals", "return_weights": "weights"}
    options = {others.get(name, name) for name in selfattn.attention.__kwdefaults__} - {"out", *ONLY_HERE}
    assert options <= set(call._fields)
    taken = [x.name for x in operator._schema.arguments]
    assert taken == ["query", "key", "value", *call._fields[3:]]


OPCHECKED: dict[str, Any] = {
    "plain": lambda: make_call(*qkv()),
    "causal bfloat16": lambda: make_call(*qkv(torch.bfloat16), causal=True, q_offset=0),
    "float16, groups": lambda: make_call(*qkv(torch.float16, heads=6, groups=2), scale=0.3, return_lse=True),
    "mask": lambda: make_call(*qkv(), mask=torch.rand(2, 1, 9, 7) < 0.5),
    "bias, float64": lambda: make_call(*qkv(torch.float64), bias=torch.randn(9, 7), return_lse=True),
    "tokens first": lambda: make_call(*(x.transpose(1, 2) for x in randn(3, 2, 9, 4, 16))),
    "one query": lambda: make_call(randn(1, 4, 1, 16), *randn(2, 2, 4, 7, 16)),
    "views of one row": lambda: make_call(*(x.expand(2, 4, 9, 16) for x in randn(3, 9, 16)), return_weights=True),
    "narrow values": lambda: make_call(randn(4, 9, 16), randn(4, 7, 16), randn(4, 7, 3)),
    "no keys": lambda: make_call(randn(2, 4, 9, 16), *randn(2, 2, 4, 0, 16), return_lse=True),
    "one head": lambda: make_call(randn(9, 16), randn(7, 16), randn(7, 3), return_lse=True),
    "tokens before heads": lambda: make_call(*randn(3, 2, 9, 4, 16), layout="bshd", return_lse=True),
}


@compiling
@pytest.mark.parametrize("name", OPCHECKED)
def test_operator_is_well_behaved(name: str) -> None:
    """Schema, aliasing, and the shapes and strides that the compiler gets, also for symbolic lengths."""
    results = torch.library.opcheck(operator, tuple(OPCHECKED[name]()))
    assert set(results.values()) == {"SUCCESS"}
    assert len(results) == 4


@pytest.fixture
def compile_whole() -> Any:
    """Compile as far as is possible without a C++ compiler."""
    torch._dynamo.reset()
    return lambda function, **options: torch.compile(function, backend="aot_eager", fullgraph=True, **options)


def block(x: Any, mask: Any = None, *, is_causal: bool = False) -> Any:
    """As in models: heads from one projection, attention, and the heads concatenated."""
    q, k, v = (x * scale for scale in (1.0, 0.5, 2.0))
    q, k, v = (y.unflatten(-1, (4, -1)).transpose(1, 2) for y in (q, k, v))
    return sdpa(q, k, v, mask, is_causal=is_causal, scale=0.25).transpose(1, 2).flatten(2) + 1


@compiling
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(compile_whole: Any, dynamic: bool) -> None:
    compiled = compile_whole(block, dynamic=dynamic)
    for tokens in (9, 12, 5):
        x = randn(2, tokens, 64)
        mask = torch.rand(tokens, tokens) < 0.8
        assert torch.equal(compiled(x, is_causal=True), block(x, is_causal=True))
        assert torch.equal(compiled(x, mask), block(x, mask))
    with torch.inference_mode():
        assert torch.equal(compiled(x.bfloat16()), block(x.bfloat16()))


@compiling
def test_compiled_by_default(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_without_inductor()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    results = []
    for function in (torch.compile(block, fullgraph=True), block):
        x = torch.linspace(-2, 2, 2 * 9 * 64).sin().view(2, 9, 64).requires_grad_()
        out = function(x, is_causal=True)
        out.square().sum().backward()
        results.append((out, x.grad))
    torch.testing.assert_close(*results, atol=1e-5, rtol=0)


@compiling
def test_exported() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return block(x, is_causal=True)

    x = randn(2, 9, 64)
    length = torch.export.Dim("length", min=2, max=100)
    program = torch.export.export(Model(), (x,), dynamic_shapes={"x": {1: length}})
    assert "selfattn.sdpa" in program.graph_module.code
    longer = randn(2, 30, 64)
    for y in (x, longer):
        assert torch.equal(program.module()(y), block(y, is_causal=True))


@compiling
def test_traced_and_transformed() -> None:
    """Code that records or transforms operations sees the operator, not a constant."""
    from torch.fx.experimental.proxy_tensor import make_fx

    q, k, v = qkv()
    graph = make_fx(lambda q: sdpa(q, k, v))(q)
    assert "selfattn.sdpa" in graph.code
    assert torch.equal(graph(2 * q), sdpa(2 * q, k, v))
    traced = torch.jit.trace(lambda q: sdpa(q, k, v), q)
    assert torch.equal(traced(2 * q), sdpa(2 * q, k, v))
    mapped = torch.func.vmap(lambda q: sdpa(q, k[0], v[0]))(q)
    assert_same(mapped, exact(q, k[0], v[0]))
    pure = torch.func.functionalize(lambda q: sdpa(q.mul_(2), k, v))(q.clone())
    assert torch.equal(pure, sdpa(2 * q, k, v))


def test_modes_see_the_operator() -> None:
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: list[Any] = []

    class Functions(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(function)
            return function(*args, **(kwargs or {}))

    class Dispatched(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(function)
            return function(*args, **(kwargs or {}))

    q, k, v = qkv()
    expected = sdpa(q, k, v)
    for mode in (Functions, Dispatched):
        seen.clear()
        with mode():
            assert torch.equal(sdpa(q, k, v), expected)
        assert seen.count(operator) == 1


def test_eager_calls_and_the_operator_agree() -> None:
    q, k, v = qkv()
    out, exact, lse, weights = operator(*make_call(q, k, v, causal=True, q_offset=0))
    assert torch.equal(out, sdpa(q, k, v, is_causal=True))
    assert exact.numel() == lse.numel() == weights.numel() == 0
