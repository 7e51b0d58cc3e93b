"""PyTorch's attention function, computed by selfattn: the same numbers, no copies, and support for the compiler."""

from __future__ import annotations

import doctest
import inspect
import sys
import threading
from typing import Any

import numpy as np
import pytest
from torch_operands import (
    FLOATS,
    assert_same,
    exact,
    integration,
    original,
    qkv,
    randn,
    sdpa,
    torch,
)

import selfattn as sa
from selfattn import reference
from selfattn._rounding import rounding


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(7)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("lengths", [(1, 1), (9, 7), (7, 9), (70, 130)], ids=str)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_plain_and_causal(dtype: Any, lengths: Any, is_causal: bool) -> None:
    q, k, v = qkv(dtype, *lengths)
    found = sdpa(q, k, v, is_causal=is_causal)
    assert found.dtype == dtype
    assert_same(found, exact(q, k, v, is_causal=is_causal))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", ["bool", "float", "single"])
@pytest.mark.parametrize("shape", [(9, 7), (9, 1), (1, 7), (4, 9, 7), (4, 1, 7), (2, 1, 1, 7), (2, 4, 9, 7)], ids=str)
def test_masks(dtype: Any, kind: str, shape: Any) -> None:
    q, k, v = qkv(dtype)
    mask = torch.rand(shape) < 0.6 if kind == "bool" else torch.randn(shape)
    mask = mask.to(dtype) if kind == "float" else mask
    assert_same(sdpa(q, k, v, mask), exact(q, k, v, mask))
    hidden = torch.where(mask, 0.0, -torch.inf).to(dtype) if kind == "bool" else mask
    assert_same(sdpa(q, k, v, attn_mask=hidden), exact(q, k, v, mask))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_grouped_heads_and_scale(dtype: Any) -> None:
    q, k, v = qkv(dtype, heads=6, groups=2)
    mask = torch.rand(2, 6, 9, 7) < 0.7
    assert_same(sdpa(q, k, v, enable_gqa=True), exact(q, k, v, enable_gqa=True))
    assert_same(sdpa(q, k, v, mask, enable_gqa=True, scale=-0.3), exact(q, k, v, mask, enable_gqa=True, scale=-0.3))
    assert_same(sdpa(q, k[:1], v[:1], enable_gqa=True), exact(q, k[:1], v[:1], enable_gqa=True))
    with pytest.raises(ValueError, match="enable_gqa=True"):
        sdpa(q, k, v)


@pytest.mark.parametrize(
    ("q", "k", "v"),
    [
        ((9, 8), (7, 8), (7, 5)),
        ((3, 9, 8), (3, 7, 8), (3, 7, 8)),
        ((2, 3, 4, 9, 8), (2, 3, 4, 7, 8), (2, 3, 4, 7, 5)),
        ((2, 1, 9, 8), (2, 4, 7, 8), (2, 4, 7, 8)),
        ((2, 4, 9, 8), (2, 1, 7, 8), (2, 1, 7, 8)),
        ((2, 4, 9, 8), (2, 4, 7, 8), (2, 1, 7, 8)),
        ((1, 4, 9, 8), (3, 4, 7, 8), (1, 4, 7, 8)),
        ((9, 8), (3, 7, 8), (3, 7, 8)),
        ((3, 9, 8), (7, 8), (7, 8)),
        ((1, 9, 8), (2, 4, 7, 8), (4, 7, 8)),
    ],
    ids=str,
)
def test_dimensions_broadcast(q: Any, k: Any, v: Any) -> None:
    tensors = [torch.randn(shape) for shape in (q, k, v)]
    for is_causal in (False, True):
        assert_same(sdpa(*tensors, is_causal=is_causal), exact(*tensors, is_causal=is_causal))


@pytest.mark.parametrize("sizes", [(0, 4, 5, 6, 8), (2, 0, 5, 6, 8), (2, 4, 0, 6, 8), (2, 4, 5, 0, 8), (2, 4, 5, 6, 0)])
def test_empty_dimensions(sizes: Any) -> None:
    batch, heads, q_len, kv_len, width = sizes
    tensors = randn(batch, heads, q_len, 8), randn(batch, heads, kv_len, 8), randn(batch, heads, kv_len, width)
    found = sdpa(*tensors)
    assert torch.equal(found, original(*tensors))
    assert found.shape == (batch, heads, q_len, width)


def test_rows_without_keys_are_zero() -> None:
    q, k, v = qkv()
    mask = torch.ones(9, 7, dtype=torch.bool)
    mask[3] = False
    for hidden in (mask, torch.where(mask, 0.0, -torch.inf)):
        found = sdpa(q, k, v, hidden)
        assert torch.equal(found[:, :, 3], torch.zeros(2, 4, 16))
        seen = torch.arange(9) != 3
        assert_same(found[:, :, seen], exact(q[:, :, seen], k, v, mask[seen]))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_any_strides(dtype: Any) -> None:
    q, k, v = qkv(dtype, q_len=7)
    expected = sdpa(q, k, v, is_causal=True)
    views = {
        "tokens first": [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)],
        "sizes first": [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (q, k, v)],
        "cut out": [torch.zeros(2, 4, 9, 40, dtype=dtype)[:, :, 1:8, 2:34:2].copy_(x) for x in (q, k, v)],
        "odd offset": [torch.zeros(1 + x.numel(), dtype=dtype)[1:].view(x.shape).copy_(x) for x in (q, k, v)],
    }
    for name, tensors in views.items():
        found = sdpa(*tensors, is_causal=True)
        assert torch.equal(found, expected), name
    assert sdpa(*views["tokens first"]).stride() == views["tokens first"][0].stride()
    one = [x[:1, :1].expand(2, 4, -1, -1) for x in (q, k, v)]
    assert torch.equal(sdpa(*one), sdpa(*(x.contiguous() for x in one)))
    assert sdpa(*one).is_contiguous()


def test_signs_that_are_still_to_be_applied() -> None:
    lazy = torch.randn(2, 4, 9, 8, dtype=torch.complex64).conj().imag
    assert lazy.is_neg()
    resolved = lazy.resolve_neg().clone()
    assert torch.equal(sdpa(lazy, lazy, lazy), sdpa(resolved, resolved, resolved))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nothing_is_copied(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    compat = inspect.getmodule(integration.attend)

    def spy(q: Any, k: Any, v: Any, *, out: Any, **options: Any) -> Any:
        seen.extend([q, k, v, options["bias"], out])
        return sa.attention(q, k, v, out=out, **options)

    monkeypatch.setattr(compat, "attention", spy)
    q, k, v = (x.transpose(1, 2) for x in (randn(2, 9, 4, 16, dtype=dtype), *randn(2, 2, 9, 4, 16, dtype=dtype)))
    mask = randn(9, 9, dtype=dtype)
    out = sdpa(q, k, v, mask)
    for array, tensor in zip(seen, (q, k, v, mask, out), strict=True):
        assert array.ctypes.data == tensor.data_ptr()
        assert array.strides == tuple(n * tensor.element_size() for n in tensor.stride())
        assert array.dtype.name == str(dtype).removeprefix("torch.")


def test_subclasses_and_parameters() -> None:
    class Sub(torch.Tensor):
        pass

    q, k, v = qkv()
    expected = sdpa(q, k, v)
    found = sdpa(q.as_subclass(Sub), k, v)
    assert type(found) is type(original(q.as_subclass(Sub), k, v)) is Sub
    assert torch.equal(found.as_subclass(torch.Tensor), expected)
    with torch.no_grad():
        assert torch.equal(sdpa(torch.nn.Parameter(q), k, v.requires_grad_()), expected)


@pytest.mark.parametrize("place", range(4))
def test_subclasses_without_memory(place: int) -> None:
    class Described(torch.Tensor):  # type: ignore[misc, unused-ignore]
        __torch_function__ = torch._C._disabled_torch_function_impl

        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*(x.made if isinstance(x, cls) else x for x in args), **(kwargs or {}))

    call = [*qkv(), torch.ones(9, 7, dtype=torch.bool).tril()]
    expected = sdpa(*call)
    described = torch.Tensor._make_wrapper_subclass(Described, call[place].shape, dtype=call[place].dtype)
    described.made = call[place]
    call[place] = described
    assert torch.equal(sdpa(*call), expected)


def test_nothing_is_recorded_without_gradients() -> None:
    q, k, v = qkv()
    mask = torch.randn(9, 7, requires_grad=True)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            found = sdpa(q.clone().requires_grad_(), k, v, mask)
        assert not found.requires_grad
        assert found.is_inference() is (context is torch.inference_mode)
        assert torch.equal(found, sdpa(q, k, v, mask.detach()))


def test_autocast_as_the_original() -> None:
    q, k, v = qkv()
    mask = torch.randn(9, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, theirs = sdpa(q, k.half(), v, mask), original(q, k.half(), v, mask)
        assert found.dtype == theirs.dtype == torch.bfloat16
        assert sdpa(q.double(), k.double(), v.double()).dtype == torch.float64
    narrow = [x.bfloat16() for x in (q, k.half(), v, mask)]
    assert torch.equal(found, sdpa(*narrow))
    torch.testing.assert_close(found.float(), theirs.float(), atol=2e-2, rtol=0)


def test_meta_tensors_have_shapes_only() -> None:
    q, k, v = (x.to("meta") for x in qkv())
    found = sdpa(q, k, v[..., :5])
    assert found.is_meta
    assert found.shape == (2, 4, 9, 5)


def test_threads() -> None:
    inputs = [qkv(q_len=40 + i, kv_len=50) for i in range(4)]
    expected = [sdpa(*tensors, is_causal=True) for tensors in inputs]
    start, wrong = threading.Barrier(4), []

    def work(i: int) -> None:
        start.wait()
        for _ in range(30):
            if not torch.equal(sdpa(*inputs[i], is_causal=True), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_docstring_example() -> None:
    result = doctest.testmod(integration)
    assert result.attempted > 0
    assert result.failed == 0


def test_signature_is_the_original() -> None:
    parameters = inspect.signature(sdpa).parameters
    # The original is a builtin, whose first documented line is its signature.
    documented = original.__doc__.split("->")[0].split("(")[1]
    positions = [documented.index(name) for name in parameters]
    assert positions == sorted(positions)
    assert parameters["scale"].kind is inspect.Parameter.KEYWORD_ONLY
    defaults = [p.default for p in list(parameters.values())[3:]]
    assert defaults == [None, 0.0, False, None, False]


def test_replaces_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own module calls it as it calls its function."""
    layer = torch.nn.MultiheadAttention(32, 4, batch_first=True).eval()
    x = randn(2, 9, 32)
    calls = []
    with torch.no_grad():
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            expected, _ = layer(x, x, x, need_weights=False)
            replaced = lambda *a, **k: (calls.append(k), sdpa(*a, **k))[1]  # noqa: E731
            monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", replaced)
            found, _ = layer(x, x, x, need_weights=False)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
    assert len(calls) == 1
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_errors_are_bounded(assert_accurate: Any, dtype: Any) -> None:
    """The bound of selfattn's own function, for which other tests have too few numbers."""
    tensors = qkv(dtype, 70, 150)
    arrays = [integration.to_array(x) for x in tensors]
    found = integration.to_array(sdpa(*tensors, is_causal=True))
    exact = reference.attention(*arrays, causal=True, q_offset=0, dtype=np.longdouble)
    assert_accurate(found, exact, rounded=rounding(*arrays, causal=True, q_offset=0))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the libraries have other names")
def test_threads_are_those_of_pytorch(run_python: Any) -> None:
    code = """
        import torch
        from selfattn import _core
        backend = _core.parallel_backend()
        import selfattn.integrations.torch
        import numpy as np, os, selfattn as sa
        torch.set_num_threads(2)
        torch.ones(1 << 20).exp()
        before = len(os.listdir("/proc/self/task"))
        x = np.ones((8, 400, 64), np.float32)
        sa.attention(x, x, x, num_threads=2)
        print(backend, _core.parallel_backend(), len(os.listdir("/proc/self/task")) - before, sep=",")
    """
    backend, shared, more = run_python(code, OMP_NUM_THREADS="2").strip().split(",")
    if backend != "openmp":
        pytest.skip("this build does not use OpenMP")
    assert (shared, more) == ("shared openmp", "0")
