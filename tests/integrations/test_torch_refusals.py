"""What the operator for PyTorch refuses, and with which message."""

from __future__ import annotations

from typing import Any

import pytest
from torch_operands import (
    qkv,
    sdpa,
    torch,
)

BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "both": (lambda q, k, v: sdpa(q, k, v, torch.ones(9, 7) > 0, is_causal=True), ValueError, "together with is_caus"),
    "array": (lambda q, k, v: sdpa(q, k.numpy(), v), TypeError, "key is a ndarray"),
    "integers": (lambda q, k, v: sdpa(q.int(), k.int(), v.int()), TypeError, "query has dtype torch.int32"),
    "complex": (lambda q, k, v: sdpa(q + 0j, k, v), TypeError, "query has dtype torch.complex64"),
    "mixed": (lambda q, k, v: sdpa(q, k.half(), v.half()), TypeError, "must have one dtype"),
    "sparse": (lambda q, k, v: sdpa(q, k, v.to_sparse()), TypeError, "value is a tensor of layout torch.sparse_coo"),
    "nested": (
        lambda q, k, v: sdpa(torch._nested_tensor_from_tensor_list(list(q)), k, v), TypeError, "of layout nested"),
    "quantised": (
        lambda q, k, v: sdpa(torch.quantize_per_tensor(q, 0.1, 0, torch.qint8), k, v), TypeError, "torch.qint8"),
    "integer mask": (lambda q, k, v: sdpa(q, k, v, torch.ones(9, 7).int()), TypeError, "attn_mask has dtype torch.int"),
    "narrow mask": (lambda q, k, v: sdpa(q, k, v, torch.ones(9, 7).half()), TypeError, "or query's torch.float32"),
    "short mask": (lambda q, k, v: sdpa(q, k, v, torch.ones(7) > 0), ValueError, "attn_mask has shape"),
    "wide mask": (lambda q, k, v: sdpa(q, k, v, torch.ones(3, 4, 9, 7) > 0), ValueError, "mask"),
    "one dimension": (lambda q, k, v: sdpa(q[0, 0, 0], k, v), ValueError, "query has shape"),
    "head size": (lambda q, k, v: sdpa(q[..., :8], k, v), ValueError, "key has head_dim 16 but query has 8"),
    "positions": (lambda q, k, v: sdpa(q, k, v[:, :, :3]), ValueError, "value has 3 positions but key has 7"),
    "batch": (lambda q, k, v: sdpa(q, torch.cat([k, k[:1]]), v), ValueError, "do not broadcast"),
    "groups": (
        lambda q, k, v: sdpa(q, k[:, :3], v[:, :3], enable_gqa=True), ValueError, "which do not divide query's 4"),
    "uneven": (lambda q, k, v: sdpa(q, k[:, :2], v[:, :1], enable_gqa=True), ValueError, "value has 1 heads but key h"),
    "no heads": (lambda q, k, v: sdpa(q[0, 0], k, v, enable_gqa=True), ValueError, "needs a dimension of heads"),
    "flag": (lambda q, k, v: sdpa(q, k, v, is_causal=1), TypeError, "is_causal is 1"),
    "dropout": (lambda q, k, v: sdpa(q, k, v, dropout_p="x"), TypeError, "_attention: dropout_p is 'x', but a real"),
    "dropout flag": (lambda q, k, v: sdpa(q, k, v, dropout_p=False), TypeError, "_attention: dropout_p is False"),
    **{
        f"recorded scale {scale!r}": (
            lambda q, k, v, scale=scale: sdpa(q.requires_grad_(), k, v, scale=scale), TypeError,
            "^scaled_dot_product_attention: scale is .*, but a real number is needed",
        )
        for scale in ("x", True, torch.tensor([0.5, 1.0]))
    },
    "scale": (lambda q, k, v: sdpa(q, k, v, scale=float("nan")), ValueError, "scale is nan"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
@pytest.mark.filterwarnings("ignore:.*prototype stage", "ignore:.*quantize", "ignore:.*deprecated")
def test_errors(name: str) -> None:
    call, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        call(*qkv())


def test_other_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhere(torch.Tensor):
        is_cpu = False
        device = torch.device("cuda:1")

    q, k, v = qkv()
    with pytest.raises(TypeError, match="key is on device cuda:1, but only CPU"):
        sdpa(q, k.as_subclass(Elsewhere), v)


def test_masks_without_elements_are_refused() -> None:
    bias = pytest.importorskip("torch.nn.attention.bias")
    with pytest.raises(TypeError, match=r"is a CausalBias: pass is_causal=True"):
        sdpa(*qkv(), bias.causal_lower_right(7, 9))
