"""flash-attn's cache, padding and rotary functions on tensors."""

from __future__ import annotations

import re
import sys
from typing import Any

import numpy as np
import pytest
from flash_reference import plain
from torch_operands import FLOATS, integration, randn, torch

from selfattn import compat
from selfattn.integrations import _tensors


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(7)


def tables(count: int = 20, half: int = 3, dtype: Any = torch.float32) -> Any:
    angles = torch.rand(count, half) * 6
    return angles.cos().to(dtype), angles.sin().to(dtype)


def cache_call(dtype: Any, kind: str) -> dict[str, Any]:
    """Arguments of a call: 3 new tokens for two sequences, rotated."""
    cos, sin = tables(dtype=dtype)
    given = {"q": randn(2, 3, 4, 8, dtype=dtype), "k": randn(2, 3, 2, 8, dtype=dtype), "v": randn(2, 3, 2, 8)}
    given |= {"v": given["v"].to(dtype), "rotary_cos": cos, "rotary_sin": sin, "causal": True}
    given |= {"cache_seqlens": torch.tensor([5, 2], dtype=torch.int32), "softcap": 2.0, "window_size": (6, 0)}
    given |= {"alibi_slopes": torch.rand(4)}
    rows = (6, 4) if kind == "pages" else (3, 12)
    given |= {"k_cache": randn(*rows, 2, 8, dtype=dtype), "v_cache": randn(*rows, 2, 8, dtype=dtype)}
    if kind == "pages":
        given["block_table"] = torch.tensor([[4, 1], [3, 0]], dtype=torch.int32)
    else:
        given |= {"cache_batch_idx": torch.tensor([2, 0]), "cache_leftpad": torch.tensor([1, 0])}
    return given


def arrays(given: dict[str, Any]) -> dict[str, Any]:
    return {name: _tensors.to_array(x.clone()) if isinstance(x, torch.Tensor) else x for name, x in given.items()}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", ["rows", "pages"])
def test_as_compat_and_in_place(kind: str, dtype: Any) -> None:
    """The function of `compat`, whose tests have formulas, has the same bits, also in the caches."""
    given = cache_call(dtype, kind)
    copies = arrays(given)
    expected = compat.flash_attn_with_kvcache(**copies, return_softmax_lse=True)
    place, version = given["k_cache"].data_ptr(), given["k_cache"]._version
    found = integration.flash_attn_with_kvcache(**given, return_softmax_lse=True)
    for own, other in zip((*found, given["k_cache"], given["v_cache"]), (*expected, copies["k_cache"],
                          copies["v_cache"]), strict=True):  # fmt: skip
        assert type(own) is torch.Tensor
        assert torch.equal(own, _tensors.to_tensor(other))
    assert found[0].dtype == dtype
    assert (given["k_cache"].data_ptr(), given["k_cache"]._version) == (place, version + 1)
    assert torch.equal(integration.flash_attn_with_kvcache(**given), found[0])


@pytest.mark.parametrize("kind", ["rows", "pages"])
def test_bfloat16_without_ml_dtypes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = cache_call(torch.bfloat16, kind)
    again = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in given.items()}
    expected = integration.flash_attn_with_kvcache(**given)
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    _tensors.bfloat16.cache_clear()
    try:
        assert torch.equal(integration.flash_attn_with_kvcache(**again), expected)
        assert torch.equal(again["k_cache"], given["k_cache"])
        x = torch.ones(4, 2, 8, dtype=torch.bfloat16)
        starts = torch.tensor([0, 4])
        integration.flash_attn_varlen_func(x, x[None], x[None], starts, starts, 4, 4, block_table=torch.tensor([[0]]))
    finally:
        _tensors.bfloat16.cache_clear()


def test_a_step_against_the_formula() -> None:
    k_cache, v_cache = randn(2, 2, 9, 2, 8)
    q, k, v = randn(2, 1, 4, 8), randn(2, 1, 2, 8), randn(2, 1, 2, 8)
    with torch.inference_mode():
        out = integration.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=4, causal=True)
    assert torch.equal(k_cache[:, 4:5], k)
    for b in range(2):
        expected = plain(q[b].numpy(), k_cache[b, :5].numpy(), v_cache[b, :5].numpy())[0]
        assert np.allclose(out[b].numpy(), expected, rtol=0, atol=2e-6)


def test_caches_of_inference_mode() -> None:
    with torch.inference_mode():
        k_cache, v_cache = torch.zeros(2, 1, 9, 2, 8)
        x = torch.ones(1, 1, 2, 8)
        integration.flash_attn_with_kvcache(x, k_cache, v_cache, x, x, cache_seqlens=0)
        assert torch.equal(v_cache[:, :1], x)


CACHE_ERRORS: dict[str, dict[str, Any]] = {
    "k_cache is a ndarray": {"k_cache": np.ones((2, 9, 2, 8), np.float32)},
    "v_cache has dtype torch.float64 but q has torch.float32": {"v_cache": torch.ones(2, 9, 2, 8).double()},
    "q has shape": {"q": torch.ones(1, 2, 8)},
    "k_cache requires grad": {"k_cache": torch.ones(2, 9, 2, 8, requires_grad=True)},
    "alibi_slopes has shape": {"alibi_slopes": torch.ones(3)},
    "num_splits is -1": {"num_splits": -1},
    "k is given without v": {"v": None},
}


@pytest.mark.parametrize("message", CACHE_ERRORS)
def test_errors_of_caches(message: str) -> None:
    x = torch.ones(2, 1, 2, 8)
    caches = torch.zeros(2, 2, 9, 2, 8)
    given = {"q": x, "k_cache": caches[0], "v_cache": caches[1], "k": x, "v": x, "cache_seqlens": 4}
    with pytest.raises((TypeError, ValueError), match=f"^flash_attn_with_kvcache: .*({message})"):
        integration.flash_attn_with_kvcache(**{**given, **CACHE_ERRORS[message]})
    assert not caches.any()


MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0], [0, 0, 0, 0, 0], [1, 0, 1, 0, 1]])


@pytest.mark.parametrize("kind", [torch.bool, torch.int64], ids=str)
def test_padding(kind: Any) -> None:
    x, mask = randn(4, 5, 2, 3).requires_grad_(), MASK.to(kind)
    packed, indices, bounds, longest, used = integration.unpad_input(x, mask)
    assert torch.equal(packed, x[MASK > 0])
    assert (bounds.tolist(), bounds.dtype, longest) == ([0, 3, 7, 7, 10], torch.int32, 4)
    assert (used.tolist(), used.dtype) == ([3, 4, 0, 3], torch.int32)
    whole = integration.pad_input(packed, indices, 4, 5)
    assert torch.equal(whole, x * MASK[..., None, None])
    (gradient,) = torch.autograd.grad(whole.square().sum(), x)
    torch.testing.assert_close(gradient, 2 * x * MASK[..., None, None])


def test_tokens_that_are_kept_but_not_real() -> None:
    unused = torch.zeros_like(MASK)
    unused[0, 0] = unused[2, 3] = unused[1, 0] = 1
    packed, indices, bounds, longest, used = integration.unpad_input(randn(4, 5), MASK, unused)
    assert (bounds.tolist(), longest, used.tolist()) == ([0, 4, 8, 9, 12], 4, [3, 4, 0, 3])
    assert indices.tolist()[:5] == [0, 2, 3, 4, 5]
    assert packed.shape == (12,)


def test_an_empty_batch_has_no_tokens() -> None:
    packed, indices, bounds, longest, used = integration.unpad_input(randn(0, 5, 3), torch.ones(0, 5))
    assert (packed.shape, bounds.tolist(), longest, used.tolist()) == ((0, 3), [0], 0, [])
    assert integration.pad_input(packed, indices, 0, 5).shape == (0, 5, 3)


def test_errors_of_padding() -> None:
    with pytest.raises(ValueError, match=r"unpad_input: attention_mask has shape \(4, 5\), but \(4, 6\) is needed"):
        integration.unpad_input(randn(4, 6), MASK)
    with pytest.raises(ValueError, match=r"pad_input: indices has shape \(3,\), but \(2,\) is needed"):
        integration.pad_input(randn(2, 6), torch.arange(3), 1, 4)


PAD_ERRORS: dict[str, dict[str, Any]] = {
    "indices is a list, but a tensor is needed": {"indices": [0, 1]},
    "indices has dtype torch.float32, but integers are needed": {"indices": torch.zeros(2)},
    "indices holds 8, which is outside 0..7": {"indices": torch.tensor([0, 8])},
    "indices holds -1, which is outside 0..7": {"indices": torch.tensor([-1, 9])},
    "batch is 2.0, but an integer is needed": {"batch": 2.0},
    "batch is -2, but it must be at least 0": {"batch": -2},
    "seqlen is None, but an integer is needed": {"seqlen": None},
    "hidden_states is a list, but a tensor is needed": {"hidden_states": [0, 1]},
}


@pytest.mark.parametrize("message", PAD_ERRORS)
def test_errors_of_pad_input(message: str) -> None:
    given = {"hidden_states": torch.ones(2, 3), "indices": torch.tensor([0, 5]), "batch": 2, "seqlen": 4}
    with pytest.raises((TypeError, ValueError), match=f"^pad_input: {re.escape(message)}$"):
        integration.pad_input(**{**given, **PAD_ERRORS[message]})


def rotated(x: Any, cos: Any, sin: Any, places: Any, interleaved: bool) -> Any:
    """Multiply pairs by complex numbers of length 1, in float64."""
    half = cos.shape[1]
    one, other = (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(half), slice(half, 2 * half))
    result = x.double().clone()
    turn = torch.complex(cos.double(), sin.double())[places][..., None, :]
    z = torch.complex(result[..., one], result[..., other]) * turn
    result[..., one], result[..., other] = z.real, z.imag
    return result


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("offsets", [0, 3, torch.tensor([4, 0, 9], dtype=torch.int32)], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_apply_rotary_emb(packed: bool, offsets: Any, interleaved: bool, dtype: Any) -> None:
    cos, sin = (x.to(dtype) for x in tables())
    bounds = torch.tensor([0, 4, 4, 11], dtype=torch.int32) if packed else None
    x = randn(11, 2, 8, dtype=dtype) if packed else randn(3, 7, 2, 8, dtype=dtype)
    starts = offsets if isinstance(offsets, torch.Tensor) else torch.full((3,), offsets)
    places = starts[:, None] + torch.arange(7)
    if packed:
        places = torch.cat([places[b, :n] for b, n in enumerate((4, 0, 7))])
    options = {"interleaved": interleaved, "seqlen_offsets": offsets, "cu_seqlens": bounds, "max_seqlen": 7}
    found = integration.apply_rotary_emb(x, cos, sin, **options)
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(found.double(), rotated(x, cos, sin, places, interleaved), atol=tolerance, rtol=0)
    assert torch.equal(found[..., 6:], x[..., 6:])
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(integration.apply_rotary_emb(leaf, cos, sin, **options), leaf, found)
    undone = rotated(found, cos, -sin, places, interleaved)  # a rotation's gradient is the rotation back
    torch.testing.assert_close(gradient.double(), undone, atol=tolerance, rtol=0)
    again = x.clone()
    assert integration.apply_rotary_emb(again, cos, sin, inplace=True, **options) is again
    assert torch.equal(again, found)


def in_one(cu_seqlens: Any) -> dict[str, Any]:
    return {"x": torch.ones(5, 2, 8), "cu_seqlens": cu_seqlens, "max_seqlen": 5}


ROTARY_ERRORS: dict[str, dict[str, Any]] = {
    "cos has the positions 0 to 19, but position 20 is needed": {"seqlen_offsets": 16},
    "but position -1 is needed": {"seqlen_offsets": torch.tensor([-1, 0, 2])},
    "seqlen_offsets has shape \\(2,\\)": {"seqlen_offsets": torch.tensor([1, 2])},
    "sin has shape": {"sin": torch.ones(20, 2)},
    "with rotary_dim at most 8": {"cos": torch.ones(20, 5), "sin": torch.ones(20, 5)},
    "cu_seqlens is given without max_seqlen": {"x": torch.ones(5, 2, 8), "cu_seqlens": torch.tensor([0, 5])},
    "cu_seqlens goes from 0 to 4, but x has the rows 0 to 5": in_one(torch.tensor([0, 4])),
    "cu_seqlens goes from 1 to 5, but x has the rows 0 to 5": in_one(torch.tensor([1, 5])),
    "cu_seqlens falls from 4 to 2 \\(sequence 1\\)": in_one(torch.tensor([0, 4, 2, 5])),
    "cu_seqlens has shape \\(0,\\), but \\(N \\+ 1,\\) is needed": in_one(torch.tensor([]).long()),
    "cu_seqlens has shape \\(\\), but \\(N \\+ 1,\\) is needed": in_one(torch.tensor(5)),
    "cu_seqlens has dtype torch.float32, but integers are needed": in_one(torch.tensor([0.0, 5.0])),
    "cu_seqlens is a list, but a tensor is needed": in_one([0, 5]),
    "seqlen_offsets is '1', but an integer is needed": {"seqlen_offsets": "1"},
    "seqlen_offsets is True, but an integer is needed": {"seqlen_offsets": True},
    "seqlen_offsets has dtype torch.bool, but integers are needed": {"seqlen_offsets": torch.ones(3).bool()},
    "x has shape": {"x": torch.ones(5, 2, 8)},
    "x has dtype torch.int64": {"x": torch.ones(3, 5, 2, 8).long()},
    "interleaved is 1": {"interleaved": 1},
}


@pytest.mark.parametrize("message", ROTARY_ERRORS)
def test_errors_of_apply_rotary_emb(message: str) -> None:
    cos, sin = tables()
    given = {"x": torch.ones(3, 5, 2, 8), "cos": cos, "sin": sin, **ROTARY_ERRORS[message]}
    with pytest.raises((TypeError, ValueError), match=f"^apply_rotary_emb: .*{message}"):
        integration.apply_rotary_emb(**given)
