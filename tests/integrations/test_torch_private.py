"""Private names of PyTorch may be missing: calls then take PyTorch's own way."""

from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from torch_operands import assert_same, gradients, original, qkv, sdpa, torch

from selfattn.integrations import _tensors, _torch_autograd
from selfattn.integrations import torch as integration

forward_ad = importlib.import_module("torch.autograd.forward_ad")
NAMES = ("_functorch", "_len_torch_dispatch_stack", "_get_tracing_state", "_is_fwd_grad_enabled")
DECIDE = ("is_plain", "is_transformed", "wants_gradient", "has_tangent", "no_tangents")


def loaded(monkeypatch: pytest.MonkeyPatch, missing: dict[str, Any]) -> Any:
    """Import the module again while names of torch._C are replaced; None removes a name."""
    spec = importlib.util.spec_from_file_location("selfattn.integrations._again", _tensors.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with monkeypatch.context() as patch:
        for name, value in missing.items():
            if value is None:
                patch.delattr(torch._C, name)
            else:
                patch.setattr(torch._C, name, value)
        spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("missing", [dict.fromkeys(NAMES), {"_functorch": SimpleNamespace()}], ids=["names", "members"])
def test_calls_do_not_need_private_names(monkeypatch: pytest.MonkeyPatch, missing: dict[str, Any]) -> None:
    module = loaded(monkeypatch, missing)
    module.forward_ad = SimpleNamespace(unpack_dual=forward_ad.unpack_dual)
    x = torch.ones(2)
    assert not module.is_plain(x)
    assert not module.is_transformed()
    assert not module.wants_gradient(x, None)
    assert module.wants_gradient(x, x.clone().requires_grad_())
    assert not module.has_tangent(None)
    for name in DECIDE:
        for user in (integration, _torch_autograd):
            if hasattr(user, name):
                monkeypatch.setattr(user, name, getattr(module, name))
    torch.manual_seed(7)
    tensors = qkv()
    assert_same(sdpa(*tensors), original(*(x.double() for x in tensors)))
    for found, expected in zip(gradients(sdpa, *tensors), gradients(original, *tensors), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:.*jit.script")  # of PyTorch's own code for dual tensors
def test_tangents_are_found_without_private_names(monkeypatch: pytest.MonkeyPatch) -> None:
    module = loaded(monkeypatch, dict.fromkeys(NAMES))
    module.forward_ad = SimpleNamespace(unpack_dual=forward_ad.unpack_dual)
    with forward_ad.dual_level():
        x = forward_ad.make_dual(torch.ones(2), torch.ones(2))
        assert module.has_tangent(x)
        assert module.wants_gradient(x)
        with pytest.raises(NotImplementedError, match="f: x has a tangent"):
            module.no_tangents("f", x=x)


def test_names_of_this_version_are_used() -> None:
    assert _tensors._level is torch._C._functorch.maybe_current_level
    assert _tensors.is_plain(torch.ones(2))
    assert "selfattn.integrations._again" not in sys.modules
