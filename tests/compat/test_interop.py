"""Arrays of other libraries: CPU memory is used without a copy, other memory is refused by name."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import selfattn as sa
from selfattn._arguments import as_array


class WithArray:
    def __init__(self, array: Any) -> None:
        self.array = array

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return self.array


class OnlyDLPack:
    def __init__(self, array: Any, device: tuple[int, int] = (1, 0)) -> None:
        self.array, self.device = array, device

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device


@pytest.fixture
def x(normal: Any) -> Any:
    return normal(2, 3, 40, 8)


@pytest.mark.one_isa
@pytest.mark.parametrize("wrap", [WithArray, OnlyDLPack, list, np.matrix, memoryview], ids=lambda w: w.__name__)
@pytest.mark.filterwarnings("ignore:the matrix subclass")
def test_wrapped_arrays(x: Any, wrap: Any) -> None:
    if wrap in (np.matrix, list):
        x = x[0, 0].astype(np.float64)
    wrapped = x.tolist() if wrap is list else wrap(x)
    out = sa.attention(wrapped, wrapped, wrapped)
    assert type(out) is np.ndarray
    assert np.array_equal(out, sa.attention(x, x, x))


@pytest.mark.one_isa
def test_subclasses_and_memmap(x: Any, tmp_path: Path) -> None:
    mapped = np.memmap(tmp_path / "x", np.float32, "w+", shape=x.shape)
    mapped[...] = x
    read_only = np.memmap(tmp_path / "x", np.float32, "r", shape=x.shape)
    for other in (mapped, read_only, x.view(type("Sub", (np.ndarray,), {}))):
        out = sa.attention(other, other, other, causal=True)
        assert type(out) is np.ndarray
        assert np.array_equal(out, sa.attention(x, x, x, causal=True))


@pytest.mark.one_isa
@pytest.mark.parametrize("device", [(2, 0), (8, 1), (13, 0)])
def test_other_devices_are_refused(x: Any, device: Any) -> None:
    with pytest.raises(
        TypeError, match=rf"attention: k is on device \({device[0]}, {device[1]}\) \(DLPack\), but only CPU"
    ):
        sa.attention(x, OnlyDLPack(x, device), x)


@pytest.mark.one_isa
def test_torch_tensors(x: Any) -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.from_numpy(x)
    expected = sa.attention(x, x, x, mask=x[0, 0, :, :1] > 0)
    found = sa.attention(tensor, tensor, tensor, mask=torch.from_numpy(x[0, 0, :, :1] > 0))
    assert type(found) is np.ndarray
    assert np.array_equal(found, expected)
    swapped = tensor.transpose(1, 2)  # not contiguous
    assert np.array_equal(sa.attention(swapped, swapped, swapped, layout="bshd"), sa.attention(x, x, x).swapaxes(1, 2))
    with pytest.raises(RuntimeError, match="requires grad"):
        sa.attention(tensor.clone().requires_grad_(), tensor, tensor)
    with pytest.raises(TypeError):
        sa.attention(tensor.to(torch.bfloat16), tensor, tensor)
    with pytest.raises(TypeError, match="float16"):
        sa.attention(tensor.half(), tensor, tensor)
    layer = sa.SelfAttention(*[torch.eye(8)] * 3, num_heads=2)
    assert np.array_equal(layer(tensor), layer(x))


@pytest.mark.parametrize("case", ["plain", "causal", "mask", "scale", "gqa"])
def test_agrees_with_torch(isa: str, normal: Any, rng: Any, case: str) -> None:
    torch = pytest.importorskip("torch")
    sdpa = torch.nn.functional.scaled_dot_product_attention
    q, k, v = normal(2, 4, 70, 16), normal(2, 4, 70, 16), normal(2, 4, 70, 16)
    mask = rng.random((70, 70)) < 0.7
    mine: dict[str, Any] = {
        "causal": {"causal": True}, "mask": {"mask": mask}, "scale": {"scale": 0.5}}.get(case, {})  # fmt: skip
    theirs: dict[str, Any] = {
        "causal": {"is_causal": True}, "mask": {"attn_mask": torch.from_numpy(mask)}, "scale": {"scale": 0.5},
        "gqa": {"enable_gqa": True}}.get(case, {})  # fmt: skip
    if case == "gqa":
        k, v = k[:, :2], v[:, :2]
    expected = sdpa(*(torch.from_numpy(x.copy()) for x in (q, k, v)), **theirs).numpy()
    assert np.allclose(sa.attention(q, k, v, **mine), expected, atol=2e-6)


def jax_array(x: Any) -> Any:
    return pytest.importorskip("jax").numpy.asarray(x)


def jax_bfloat16(x: Any) -> Any:
    return jax_array(x).astype("bfloat16")


def torch_tensor(x: Any) -> Any:
    return pytest.importorskip("torch").from_numpy(x)


def torch_float16(x: Any) -> Any:
    return torch_tensor(x).half()


def read_only(x: Any) -> Any:
    if np.lib.NumpyVersion(np.__version__) < "2.1.0":
        pytest.skip("NumPy exports no read-only memory before 2.1")
    x.flags.writeable = False
    return OnlyDLPack(x)


def jax_dlpack(x: Any) -> Any:
    array = jax_array(x)
    return OnlyDLPack(array, tuple(map(int, array.__dlpack_device__())))


FOREIGN = [jax_array, jax_bfloat16, jax_dlpack, torch_tensor, torch_float16, read_only, WithArray]
NARROW = {jax_bfloat16: jax_array, torch_float16: torch_tensor}
# A call of each public function on q, k and v, (2, 3, 40, 8).
FUNCTIONS: dict[str, Any] = {
    "attention": lambda q, k, v, lens: sa.attention(q, k, v, bias=q, kv_lens=lens, return_lse=True),
    "explain": lambda q, k, v, lens: sa.explain(q, k, v, kv_lens=lens)["flops"],
    "varlen": lambda q, k, v, lens: sa.attention_varlen(q, k, v, lens, return_lse=True),
    "varlen lists": lambda q, k, v, lens: sa.attention_varlen([q, q], [k, q], [v, q]),
    "kvcache": lambda q, k, v, lens: sa.attention_with_kvcache(q, cache_of(k, v), k, v),
    "self_attention": lambda q, k, v, lens: sa.self_attention(q, k, v, k, num_heads=2),
    "SelfAttention": lambda q, k, v, lens: sa.SelfAttention(k, v, k, num_heads=2)(q, context=q),
    "apply_rope": lambda q, k, v, lens: sa.apply_rope(q, lens),
    "merge_states": lambda q, k, v, lens: sa.merge_states([q, k], lens),
    "t5_bias": lambda q, k, v, lens: sa.t5_bias(q, 5, 7),
}
SHAPES: dict[str, Any] = {  # of q, k and v, and what the last argument is: lengths, or numbers of such a shape
    "attention": [(2, 3, 8, 8)] * 3 + [[5, 8]],
    "explain": [(2, 3, 8, 8)] * 3 + [[5, 8]],
    "varlen": [(9, 3, 8)] * 3 + [[0, 4, 9]],
    "varlen lists": [(9, 3, 8)] * 3 + [[0]],
    "kvcache": [(2, 3, 8, 8)] * 3 + [[0]],
    "self_attention": [(2, 5, 8), (8, 8), (8, 8), [0]],
    "SelfAttention": [(2, 5, 8), (8, 8), (8, 8), [0]],
    "apply_rope": [(2, 3, 8, 8)] * 3 + [list(range(3, 11))],
    "merge_states": [(2, 3, 8, 8)] * 3 + [(2, 2, 3, 8)],
    "t5_bias": [(8, 3), (1,), (1,), [0]],
}


def cache_of(k: Any, v: Any) -> Any:
    cache = sa.KVCache(2, 3, 8, capacity=16, dtype="int8")
    cache.append(k, v)
    return cache


def flat(result: Any) -> list[Any]:
    if isinstance(result, (tuple, list)):
        return [x for part in result for x in flat(part)]
    return [result]


@pytest.mark.one_isa
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("make", FOREIGN, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_takes_them(normal: Any, make: Any, name: str) -> None:
    *shapes, last = SHAPES[name]
    arrays = [normal(*shape) for shape in shapes]
    foreign = [make(x.copy()) for x in arrays]
    if make in NARROW:
        arrays = [as_array("f", "x", x) for x in foreign]
    # Log-sum-exps of 16-bit parts are float32.
    lens = normal(*last) if isinstance(last, tuple) else np.array(last, np.int32)
    other = NARROW.get(make, make)(lens.copy())
    found, expected = FUNCTIONS[name](*foreign, other), FUNCTIONS[name](*arrays, lens)
    for mine, theirs in zip(flat(found), flat(expected), strict=True):
        assert type(mine) is type(theirs)
        assert np.array_equal(mine, theirs)


@pytest.mark.one_isa
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("make", FOREIGN, ids=lambda f: f.__name__)
def test_views_of_their_memory(x: Any, make: Any) -> None:
    foreign = make(x)
    first, second = (as_array("f", "x", foreign) for _ in range(2))
    assert first.ctypes.data == second.ctypes.data
    assert first.dtype.name == {"jax_bfloat16": "bfloat16", "torch_float16": "float16"}.get(make.__name__, "float32")


@pytest.mark.one_isa
@pytest.mark.filterwarnings("ignore")
def test_traced_arrays_are_refused(x: Any) -> None:
    jax = pytest.importorskip("jax")
    with pytest.raises(TypeError, match="traced array"):
        jax.jit(lambda y: sa.attention(y, y, y))(x)


@pytest.mark.one_isa
def test_torch_bfloat16_is_read_in_place(x: Any) -> None:
    torch = pytest.importorskip("torch")
    ml_dtypes = pytest.importorskip("ml_dtypes")
    tensor = torch.from_numpy(x).bfloat16().transpose(1, 2)
    array = as_array("f", "x", tensor)
    assert array.dtype == ml_dtypes.bfloat16
    assert array.ctypes.data == tensor.data_ptr()
    assert np.array_equal(array.astype(np.float32), tensor.float().numpy())
    same = x.astype(ml_dtypes.bfloat16).swapaxes(1, 2)
    assert np.array_equal(sa.attention(tensor, tensor, tensor), sa.attention(same, same, same))
    with pytest.raises(RuntimeError, match="requires grad"):
        sa.attention(tensor.clone().requires_grad_(), tensor, tensor)


class LikeTorchBfloat16:
    """A stand-in for a bfloat16 tensor, for use without PyTorch."""

    dtype, requires_grad = "torch.bfloat16", False

    def __init__(self, bits: Any) -> None:
        self.bits = bits

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        raise AssertionError("PyTorch refuses this conversion")

    def view(self, dtype: Any) -> Any:
        return self.bits.view(dtype)


@pytest.mark.one_isa
def test_torch_bfloat16_needs_ml_dtypes(x: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    array = x.astype(ml_dtypes.bfloat16)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(uint16=np.uint16))
    tensor = LikeTorchBfloat16(array)
    assert np.array_equal(sa.attention(tensor, tensor, tensor), sa.attention(array, array, array))
    monkeypatch.delitem(sys.modules, "ml_dtypes")
    with pytest.raises(TypeError, match="attention: q is a tensor of bfloat16, which NumPy lacks: import ml_dtypes"):
        sa.attention(tensor, tensor, tensor)


@pytest.mark.one_isa
@pytest.mark.filterwarnings("ignore")
def test_dlpack_of_jax_bfloat16(x: Any) -> None:
    narrow = OnlyDLPack(jax_bfloat16(x))
    with pytest.raises(TypeError, match=r"attention: k of type OnlyDLPack is not for NumPy to read .*float16, bfloat"):
        sa.attention(x, narrow, x)
