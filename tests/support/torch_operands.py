"""Operands and expected results of tests with PyTorch."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("ml_dtypes")
integration = importlib.import_module("selfattn.integrations.torch")

sdpa = integration.scaled_dot_product_attention
checkpoint = importlib.import_module("torch.utils.checkpoint").checkpoint
original = torch.nn.functional.scaled_dot_product_attention
make_call = integration.make_call
operator = torch.ops.selfattn.sdpa.default
backward_operator = torch.ops.selfattn.sdpa_backward.default
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# torch.compile's own code, and what it imports, warn.
compiling = pytest.mark.filterwarnings("ignore")


def randn(*shape: int, dtype: Any = torch.float32) -> Any:
    return torch.randn(*shape).to(dtype)


def exact(q: Any, k: Any, v: Any, mask: Any = None, **options: Any) -> Any:
    """PyTorch's result from the same numbers in float64."""
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.double()
    return original(q.double(), k.double(), v.double(), mask, **options)


def assert_same(found: Any, expected: Any) -> None:
    assert type(found) is torch.Tensor
    assert found.shape == expected.shape
    # Half an ulp of results around 1 and below, with room for sums in float32.
    tolerance = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 2e-2, torch.float16: 2e-3}[found.dtype]
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=0)


def skip_without_inductor() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:  # of a class that is not public
        pytest.skip(f"inductor has no C++ compiler: {error}")


def qkv(dtype: Any = torch.float32, q_len: int = 9, kv_len: int = 7, heads: int = 4, groups: int = 4) -> Any:
    return randn(2, heads, q_len, 16, dtype=dtype), *(randn(2, groups, kv_len, 16, dtype=dtype) for _ in "kv")


def gradients(function: Any, *tensors: Any) -> list[Any]:
    """Return the gradients of a sum in which each element of the result has a weight of its own."""
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in tensors]
    out = function(*leaves)
    weights = torch.linspace(-1, 1, out.numel()).bfloat16().to(out.dtype).view(out.shape)  # the same in all dtypes
    return list(torch.autograd.grad(out, [x for x in leaves if x.requires_grad], weights))
