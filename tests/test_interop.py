"""Arrays of other libraries: taken without a copy where they are CPU memory, refused by name where they are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import selfattn as sa


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


@pytest.mark.parametrize("wrap", [WithArray, OnlyDLPack, list, np.matrix, memoryview], ids=lambda w: w.__name__)
@pytest.mark.filterwarnings("ignore:the matrix subclass")
def test_wrapped_arrays(x: Any, wrap: Any) -> None:
    if wrap in (np.matrix, list):
        x = x[0, 0].astype(np.float64)
    wrapped = x.tolist() if wrap is list else wrap(x)
    out = sa.attention(wrapped, wrapped, wrapped)
    assert type(out) is np.ndarray
    assert np.array_equal(out, sa.attention(x, x, x))


def test_subclasses_and_memmap(x: Any, tmp_path: Path) -> None:
    mapped = np.memmap(tmp_path / "x", np.float32, "w+", shape=x.shape)
    mapped[...] = x
    read_only = np.memmap(tmp_path / "x", np.float32, "r", shape=x.shape)
    for other in (mapped, read_only, x.view(type("Sub", (np.ndarray,), {}))):
        out = sa.attention(other, other, other, causal=True)
        assert type(out) is np.ndarray
        assert np.array_equal(out, sa.attention(x, x, x, causal=True))


@pytest.mark.parametrize("device", [(2, 0), (8, 1), (13, 0)])
def test_other_devices_are_refused(x: Any, device: Any) -> None:
    with pytest.raises(
        TypeError, match=rf"attention: k is on device \({device[0]}, {device[1]}\) \(DLPack\), but only CPU"
    ):
        sa.attention(x, OnlyDLPack(x, device), x)


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
