"""Attention reads stored tokens in place as it would read them converted, whatever hides keys."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("ml_dtypes")

import numpy as np  # noqa: E402
from transformers import masking_utils  # noqa: E402
from transformers_models import layer, normal  # noqa: E402

import selfattn  # noqa: E402
from selfattn.integrations._hf_attention import attention_forward  # noqa: E402
from selfattn.integrations._hf_cache import Layer  # noqa: E402
from selfattn.integrations._hf_mask import make_mask  # noqa: E402
from selfattn.integrations._hf_stored import StoredTokens  # noqa: E402

BATCH, HELD = 2, 13  # the layer holds 13 tokens, of which a window of 6 leaves fewer


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Record the calls that read a cache."""
    seen: list[Any] = []
    attend = selfattn.attention_with_kvcache
    monkeypatch.setattr(
        selfattn, "attention_with_kvcache", lambda *x, **options: seen.append(options) or attend(*x, **options)
    )
    return seen


def stored(dtype: str, window: int | None, tokens: int) -> tuple[Any, Any]:
    """Return the keys and values of a layer after `tokens` more have been appended."""
    held = Layer(dtype, window)
    for seed, count in enumerate((4, HELD - 4, tokens)):
        found = held.update(normal(BATCH, 2, count, 8, seed=seed), normal(BATCH, 2, count, 4, seed=seed + 9))
    assert type(found[0]) is StoredTokens
    return found


def masks(q_len: int, kv_len: int) -> dict[str, Any]:
    """Return masks of every kind, described and not."""
    sizes = {"batch_size": BATCH, "q_length": q_len, "kv_length": kv_len, "q_offset": kv_len - q_len}
    real = torch.ones((BATCH, kv_len), dtype=torch.bool)
    left, right, gaps = real.clone(), real.clone(), real.clone()
    left[0, :3], right[0, -2:], gaps[1, 2] = False, False, False
    some = torch.rand((BATCH, 1, q_len, kv_len), generator=torch.Generator().manual_seed(5)) < 0.7
    return {
        "none": None,
        "causal": make_mask(**sizes),
        "left": make_mask(**sizes, attention_mask=left),
        "right": make_mask(**sizes, attention_mask=right),
        "gaps": make_mask(**sizes, attention_mask=gaps),
        "earlier": make_mask(**{**sizes, "q_offset": kv_len - q_len - 1}),
        "window": make_mask(**sizes, mask_function=masking_utils.sliding_window_causal_mask_function(4)),
        "booleans": some,
        "numbers": torch.zeros(some.shape).masked_fill(~some, -torch.inf),
    }


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("dtype", ["int8", "int4", "bfloat16"])
@pytest.mark.parametrize("q_len", [1, 3])
def test_what_hides_keys(q_len: int, dtype: str, window: int | None, reads: list[Any]) -> None:
    q = normal(BATCH, 4, q_len, 8, seed=7)
    kv_len = (HELD if window is None else window - 1) + q_len
    extras: dict[str, Any] = {"sinks": normal(4), "softcap": 2.0, "scaling": 0.3}
    for name, mask in masks(q_len, kv_len).items():
        for options in ({}, extras, {"output_attentions": True, "position_bias": normal(1, 4, q_len, kv_len)}):
            k, v = stored(dtype, window, q_len)
            assert k.shape[2] == kv_len
            reads.clear()
            found = attention_forward(layer(is_causal=True), q, k, v, mask, **options)
            assert len(reads) == (name != "earlier"), name
            wanted = attention_forward(layer(is_causal=True), q, k.dense(), v.dense(), mask, **options)
            for own, peer in zip(found, wanted, strict=True):
                assert (own is None) == (peer is None)
                assert own is None or (own.shape == peer.shape and (own - peer).abs().max() < 2e-6), name


def test_tokens_that_are_no_longer_the_newest_are_converted(reads: list[Any]) -> None:
    held, new = Layer("int8"), normal(1, 2, 5, 8)
    held.update(new, new)
    k, v = held.update(new, new)
    held.update(new, new)
    q = normal(1, 2, 1, 8)
    assert torch.equal(attention_forward(layer(), q, k, v, None)[0], attention_forward(layer(), q, +k, +v, None)[0])
    assert not reads
    assert np.array_equal(k.numpy(), k.dense().numpy())


def test_gradients_of_queries_on_converted_tokens() -> None:
    k, v = stored("int8", None, 1)
    q = normal(BATCH, 2, 1, 8).requires_grad_()
    attention_forward(layer(), q, k, v, None)[0].sum().backward()
    own, q.grad = q.grad, None
    attention_forward(layer(), q, k.dense(), v.dense(), None)[0].sum().backward()
    assert torch.equal(own, q.grad)
    assert own.abs().max() > 0


@pytest.mark.parametrize("storage", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_storage_may_be_wider_than_the_model(dtype: Any, storage: str) -> None:
    held = Layer(storage)
    for seed, count in enumerate((4, 1)):
        k, v = held.update(*(normal(BATCH, 2, count, 8, seed=seed + 9 * i).to(dtype) for i in (0, 1)))
    q = normal(BATCH, 2, 1, 8, seed=3).to(dtype)
    result, _ = attention_forward(layer(), q, k, v, None)
    wanted, _ = attention_forward(layer(), q, k[:, :, :].clone(), v[:, :, :].clone(), None)
    torch.testing.assert_close(result, wanted)
