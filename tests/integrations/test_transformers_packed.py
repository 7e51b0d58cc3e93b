"""Sequences packed without padding (`cu_seq_lens_q`, `cu_seq_lens_k`) attend as they would alone."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("ml_dtypes")

import transformers_models as models  # noqa: E402
from transformers_models import layer, normal  # noqa: E402

from selfattn.integrations._hf_attention import attention_forward  # noqa: E402
from selfattn.integrations._hf_mask import make_mask  # noqa: E402
from selfattn.integrations.transformers import register  # noqa: E402

LENGTHS = [7, 1, 12, 4]
BOUNDS = torch.tensor([0, 7, 8, 20, 24], dtype=torch.int32)
PACKED = {"cu_seq_lens_q": BOUNDS, "cu_seq_lens_k": BOUNDS, "max_length_q": 12, "max_length_k": 12}


@pytest.fixture(autouse=True, scope="module")
def _registered() -> None:
    register()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert", "llama", "mistral"])
def test_models_without_padding(name: str, dtype: Any) -> None:
    model = models.build(name, dtype=dtype)
    if hasattr(model, "model"):
        model = model.model
    ids = models.inputs(name)["input_ids"][:1]
    start = 2 if name == "roberta" else 0  # its positions begin after the padding's index
    positions = torch.cat([torch.arange(n) + start for n in LENGTHS])[None]
    with torch.no_grad():
        packed = model(input_ids=ids, position_ids=positions, **PACKED).last_hidden_state
        alone = [
            model(input_ids=part, position_ids=torch.arange(part.shape[1])[None] + start).last_hidden_state
            for part in ids.split(LENGTHS, dim=1)
        ]
    wanted = torch.cat(alone, dim=1)
    assert (packed - wanted).abs().max() < (1e-5 if dtype is torch.float32 else 0.05) * wanted.abs().max()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_options_and_gradients(masked: bool, causal: bool) -> None:
    q, k, v = normal(1, 4, 24, 8), normal(1, 2, 24, 8, seed=1), normal(1, 2, 24, 8, seed=2)
    bias, sinks = normal(1, 4, 24, 24, seed=3), normal(4, seed=4)
    mask = None
    if masked:
        mask = make_mask(batch_size=1, q_length=24, kv_length=24, **({} if causal else {"mask_function": everything()}))
    plain = {"module": layer(is_causal=causal), "attention_mask": mask, "softcap": 3.0, "scaling": 0.4, "sinks": sinks}
    together, _ = attention_forward(query=q, key=k, value=v, **plain, **PACKED)
    operands = [x.clone().requires_grad_() for x in (q, k, v)]
    options = {**plain, "position_bias": bias, "output_attentions": True}
    result, weights = attention_forward(
        **dict(zip(("query", "key", "value"), operands, strict=True)), **options, **PACKED
    )
    result.square().sum().backward()
    ends = BOUNDS.tolist()
    for start, end in pairwise(ends):
        own = [x[:, :, start:end].clone().requires_grad_() for x in (q, k, v)]
        alone = {**options, "position_bias": bias[:, :, start:end, start:end], "attention_mask": None}
        wanted, own_weights = attention_forward(**dict(zip(("query", "key", "value"), own, strict=True)), **alone)
        wanted.square().sum().backward()
        assert torch.equal(result[:, start:end], wanted)
        assert torch.equal(weights[:, :, start:end, start:end], own_weights)
        for whole, part in zip(operands, own, strict=True):
            assert torch.equal(whole.grad[:, :, start:end], part.grad)
        alone = {**plain, "attention_mask": None}
        parts = (x[:, :, start:end] for x in (q, k, v))
        assert torch.equal(together[:, start:end], attention_forward(alone.pop("module"), *parts, **alone)[0])
    assert weights.sum(dim=(0, 1, 2)).shape == (24,)
    assert (weights[0, :, 7, :7] == 0).all()


def everything() -> Any:
    from transformers import masking_utils

    return masking_utils.bidirectional_mask_function


def test_sequences_drop_weights_independently() -> None:
    x = normal(1, 1, 24, 8)
    bounds = {"cu_seq_lens_q": torch.tensor([0, 12, 24])}
    same = torch.cat([x[:, :, :12]] * 2, dim=2)
    dropped, _ = attention_forward(layer(), same, same, same, None, dropout=0.5, **bounds)
    assert not torch.equal(dropped[:, :12], dropped[:, 12:])


def test_a_mask_of_booleans_need_not_separate() -> None:
    """Compiled models pass one that hides nothing."""
    q = normal(1, 2, 24, 8)
    separating = torch.block_diag(*[torch.ones((n, n)) for n in LENGTHS]).bool()[None, None]
    wanted = attention_forward(layer(), q, q, q, None, **PACKED)[0]
    for mask in (separating, torch.ones_like(separating), torch.ones((1, 1, 1, 24), dtype=torch.bool)):
        torch.testing.assert_close(attention_forward(layer(), q, q, q, mask, **PACKED)[0], wanted)
    hidden = separating.clone()
    hidden[..., 2] = False
    torch.testing.assert_close(
        attention_forward(layer(), q, q, q, hidden, **PACKED)[0], attention_forward(layer(), q, q, q, hidden)[0]
    )
