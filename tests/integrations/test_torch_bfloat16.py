"""Tensors of bfloat16 where ml_dtypes is not installed: the same bits."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from torch_operands import gradients, integration, qkv, torch

from selfattn._foreign import BITS, converted
from selfattn.integrations import _tensors


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Return a function after which ml_dtypes is not found."""

    def remove() -> None:
        monkeypatch.setitem(sys.modules, "ml_dtypes", None)
        _tensors.bfloat16.cache_clear()
        assert _tensors.bfloat16() == BITS

    yield remove
    _tensors.bfloat16.cache_clear()


def test_conversions() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    rng = np.random.default_rng(3)
    numbers = rng.integers(0, 1 << 32, 20_000, dtype=np.uint32).view(np.float32)
    numbers[:6] = np.inf, -np.inf, np.nan, 0.0, -0.0, 3.4e38
    with np.errstate(all="ignore"):
        expected = numbers.astype(ml_dtypes.bfloat16)
    found = converted(numbers.reshape(100, 200), BITS).reshape(-1)
    real = ~np.isnan(numbers)
    assert np.array_equal(found.view(np.uint16)[real], expected.view(np.uint16)[real])
    wide = converted(found, np.dtype(np.float64))
    assert np.array_equal(wide, expected.astype(np.float64), equal_nan=True)


@pytest.mark.parametrize("options", [{}, {"causal": True, "window": (3, None)}, {"dropout": 0.5, "seed": 3}], ids=str)
def test_results_and_gradients(bare: Any, options: Any) -> None:
    torch.manual_seed(7)
    q, k, v = qkv(torch.bfloat16, groups=2)
    bias, sinks, slopes = torch.randn(9, 7).bfloat16(), torch.randn(4).bfloat16(), torch.rand(4).bfloat16()

    def call(*tensors: Any) -> Any:
        q, k, v, bias, sinks, slopes = tensors
        return integration.attention(q, k, v, bias=bias, sinks=sinks, alibi_slopes=slopes, **options)

    tensors = q, k, v, bias, sinks, slopes
    expected = [call(*tensors), *gradients(call, *tensors)]
    bare()
    found = [call(*tensors), *gradients(call, *tensors)]
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_gradients_of_what_was_broadcast(bare: Any) -> None:
    torch.manual_seed(7)
    q, k, v = qkv(torch.bfloat16)
    tensors = q, k[:1], v[:1], torch.randn(1, 7).bfloat16()

    def call(q: Any, k: Any, v: Any, bias: Any) -> Any:
        return integration.attention(q, k, v, bias=bias)

    expected = gradients(call, *tensors)
    bare()
    assert all(torch.equal(x, y) for x, y in zip(gradients(call, *tensors), expected, strict=True))


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")
@pytest.mark.parametrize("storage", ["bfloat16", "int8", "float16"])
def test_transformers(bare: Any, storage: str) -> None:
    """Generated tokens, with a cache."""
    hf = pytest.importorskip("transformers")
    own = pytest.importorskip("selfattn.integrations.transformers")
    own.register()
    torch.manual_seed(3)
    config = hf.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, attn_implementation="selfattn", dtype="bfloat16",
    )  # fmt: skip
    model = hf.LlamaForCausalLM(config).bfloat16().eval()
    ids = torch.randint(3, 50, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0

    def generate() -> Any:
        cache = own.Cache(dtype=storage)
        return model.generate(
            ids, attention_mask=mask, max_new_tokens=6, do_sample=False, past_key_values=cache, pad_token_id=0
        )

    expected = generate()
    bare()
    assert torch.equal(generate(), expected)
