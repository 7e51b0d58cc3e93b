"""The form in which transformers' masks reach selfattn, and what the attention function refuses."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("ml_dtypes")

import transformers_models as models  # noqa: E402
from transformers import masking_utils  # noqa: E402
from transformers_models import layer, normal  # noqa: E402

from selfattn.integrations._hf_attention import attention_forward  # noqa: E402
from selfattn.integrations._hf_mask import VisibleKeys, make_mask  # noqa: E402
from selfattn.integrations.transformers import register  # noqa: E402

PATTERNS = {
    "causal": masking_utils.causal_mask_function,
    "window": masking_utils.sliding_window_causal_mask_function(4),
    "bidirectional": masking_utils.bidirectional_mask_function,
    "two-sided": masking_utils.sliding_window_bidirectional_mask_function(3),
    "chunks": masking_utils.chunked_causal_mask_function(4, torch.zeros(3, dtype=torch.long)),
    "shifted chunks": masking_utils.chunked_causal_mask_function(4, torch.tensor([2, 0, 5])),
}
# q_length, kv_length, q_offset, kv_offset: a prompt, steps, a chunk, static tails, windows that have moved on,
# a first key that just falls out of the window, and queries after the last key.
PLACES = [
    (9, 9, 0, 0), (1, 9, 8, 0), (4, 9, 5, 0), (6, 20, 3, 0), (9, 20, 0, 0), (1, 20, 7, 0), (3, 6, 12, 9),
    (1, 4, 20, 17), (5, 8, 11, 8), (1, 4, 2, 0), (2, 3, 0, 0),
    (5, 5, 0, 0), (1, 5, 4, 0), (1, 5, 0, 0), (4, 4, 2, 0),
]  # fmt: skip
PADDINGS = ("none", "all real", "left", "right", "holes", "shorter")

# Versions before 5.24 have no other name for it.
pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    register()
    with torch.no_grad():
        yield


def real_tokens(padding: str, length: int) -> Any:
    if padding == "none":
        return None
    mask = torch.ones((3, length), dtype=torch.bool)
    if padding == "left":
        mask[0, : length // 2] = False
        mask[2, :1] = False
    elif padding == "right":
        mask[0, length // 2 :] = False
        mask[2] = False
    elif padding == "holes":
        mask[1, length // 3 : length // 2] = False
    elif padding == "shorter":
        mask = mask[:, : length - 1]
    return mask


def expected(q: Any, k: Any, v: Any, mask: Any, bias: Any = 0.0) -> Any:
    """Softmax over the visible keys, in double precision; zeros if there are none."""
    q, k, v = q.double(), k.double(), v.double()
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.mT / q.shape[-1] ** 0.5 + bias).masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1).nan_to_num(0.0) @ v).transpose(1, 2)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_described_mask_is_the_dense_one(pattern: str, padding: str) -> None:
    kinds = set()
    for (q_len, kv_len, q_offset, kv_offset), skip in itertools.product(PLACES, (True, False)):
        two_sided = pattern in ("bidirectional", "two-sided")
        call: dict[str, Any] = {
            "batch_size": 3, "q_length": q_len, "kv_length": kv_len, "q_offset": torch.tensor(q_offset),
            "kv_offset": kv_offset, "mask_function": PATTERNS[pattern],
            "attention_mask": real_tokens(padding, kv_len + kv_offset), "allow_is_causal_skip": skip and not two_sided,
        }  # fmt: skip
        dense = masking_utils.sdpa_mask(**{**call, "allow_is_causal_skip": False})
        mask = make_mask(**call, allow_is_bidirectional_skip=skip and two_sided)
        kinds.add(type(mask))
        q, k, v = normal(3, 4, q_len, 8), normal(3, 2, kv_len, 8, seed=1), normal(3, 2, kv_len, 6, seed=2)
        bias = normal(1, 4, q_len, kv_len, seed=3)
        asked = layer(is_causal=two_sided)  # a mask takes precedence over the module's own attribute
        out, weights = attention_forward(asked, q, k, v, mask, scaling=None, position_bias=bias, output_attentions=True)
        wanted = expected(q, k, v, dense, bias)
        assert out.shape == (3, q_len, 4, 6)
        assert (out - wanted).abs().max() < 1e-6
        fused, nothing = attention_forward(asked, q, k, v, mask, position_bias=bias)
        assert nothing is None
        assert torch.equal(fused, out)
        assert weights.shape == (3, 4, q_len, kv_len)
        repeated = v.repeat_interleave(2, dim=1)
        assert ((weights @ repeated).transpose(1, 2) - wanted).abs().max() < 1e-6
        assert mask.shape == dense.shape
        assert mask.dtype == dense.dtype
        assert torch.equal(mask & True, dense)
    # Several chunks that start at different keys need a dense mask.
    assert kinds == ({VisibleKeys, torch.Tensor} if pattern == "shifted chunks" else {VisibleKeys})


def test_masks_are_as_small_as_they_can_be() -> None:
    common = {"batch_size": 3, "q_length": 6, "kv_length": 6}
    assert make_mask(**common).options == {"causal": True}
    assert make_mask(**common, attention_mask=real_tokens("all real", 6)).options == {"causal": True}
    everything = make_mask(**common, mask_function=PATTERNS["bidirectional"], allow_is_bidirectional_skip=True)
    assert (everything.options, everything.made) == ({}, None)
    right = make_mask(**common, attention_mask=real_tokens("right", 6))
    assert set(right.options) == {"causal", "kv_lens", "q_offset"}
    left = make_mask(**common, attention_mask=real_tokens("left", 6))
    assert set(left.options) == {"causal", "kv_starts"}
    gaps = make_mask(**common, attention_mask=torch.tensor([[1, 0, 1, 1, 1, 1]]).bool().expand(3, 6))
    assert set(gaps.options) == {"causal", "mask"}
    assert gaps.options["mask"].shape == (3, 1, 1, 6)
    wide = masking_utils.sliding_window_causal_mask_function(6)
    assert make_mask(**common, mask_function=wide).options == {"causal": True}
    narrow = make_mask(**common, mask_function=PATTERNS["window"])
    assert narrow.options == {"causal": True, "window": (3, None)}
    assert make_mask(**common, mask_function=PATTERNS["chunks"]).options == {"causal": True, "chunk": 4}
    one_chunk = {"batch_size": 3, "q_length": 2, "kv_length": 6, "q_offset": 4, "mask_function": PATTERNS["chunks"]}
    mask = make_mask(**one_chunk)
    assert (set(mask.options), mask.options["kv_starts"].tolist()) == ({"causal", "kv_starts"}, [4, 4, 4])
    two_chunks = {"batch_size": 3, "q_length": 6, "kv_length": 9, "q_offset": 12, "mask_function": PATTERNS["chunks"]}
    assert make_mask(**two_chunks, kv_offset=8).options["chunk"] == 4
    assert type(make_mask(**two_chunks, kv_offset=9)) is torch.Tensor  # chunks of the kept keys start elsewhere
    step = make_mask(batch_size=1, q_length=1, kv_length=4096, q_offset=torch.tensor(99), allow_is_causal_skip=False)
    assert (step.options, step.end) == ({}, 100)
    assert step.made is None


def test_changes_to_a_described_mask_count() -> None:
    q, k, v = normal(1, 2, 5, 8), normal(1, 2, 5, 8, seed=1), normal(1, 2, 5, 8, seed=2)
    mask = make_mask(batch_size=1, q_length=5, kv_length=5, allow_is_causal_skip=False)
    assert type(mask) is VisibleKeys
    assert mask.contiguous() is mask
    before, _ = attention_forward(layer(), q, k, v, mask)
    mask[..., 1] = False
    after, _ = attention_forward(layer(), q, k, v, mask)
    assert not torch.allclose(before, after)
    assert (after - expected(q, k, v, mask & True)).abs().max() < 1e-6
    # For other sizes the dense mask is used, as in eager attention: here it does not fit.
    with pytest.raises(ValueError, match="mask"):
        attention_forward(layer(), q, k[:, :, :3], v[:, :, :3], mask)
    one = make_mask(batch_size=1, q_length=5, kv_length=5, allow_is_causal_skip=False)
    q2, k2, v2 = (torch.cat([x, x]) for x in (q, k, v))
    assert torch.equal(attention_forward(layer(), q2, k2, v2, one)[0], torch.cat([before, before]))


def test_a_mask_that_is_added_to_scores_is_made_of_numbers() -> None:
    mask = make_mask(batch_size=2, q_length=3, kv_length=3, attention_mask=torch.tensor([[1, 1, 0], [1, 1, 1]]).bool())
    assert type(mask) is VisibleKeys
    scores = normal(2, 4, 3, 3)
    hidden = ~(mask & True)
    assert hidden.any()
    for found in (scores + mask, mask + scores, torch.add(scores, mask), scores.add(mask), scores.clone().add_(mask)):
        assert torch.equal(found.softmax(-1), scores.masked_fill(hidden, -torch.inf).softmax(-1))
    for add in (lambda: torch.add(scores, mask, out=torch.empty_like(scores)), lambda: scores.add(other=mask)):
        assert torch.equal(add(), scores + mask)
    (found,), changed = torch._foreach_add([scores], [mask]), [scores.clone()]
    torch._foreach_add_(changed, [mask])
    assert torch.equal(found, scores + mask)
    assert torch.equal(changed[0], scores + mask)
    assert (scores.bfloat16() + mask).dtype is torch.bfloat16


VIEWS = {
    "slice": lambda x: x[:, :, :, :2], "slices": lambda x: x[:1][..., 1:, 1:], "narrow": lambda x: x.narrow(-1, 0, 2),
    "expand": lambda x: x.expand(2, 4, 3, 3), "none": lambda x: x[:, 0][:, None], "unsqueeze": lambda x: x.unsqueeze(0),
    "transpose": lambda x: x.mT.transpose(2, 3), "unbind": lambda x: x.unbind()[0], "rows": lambda x: x[:, :, -1:],
    "copy": lambda x: x[..., :2].contiguous(), "reshape": lambda x: x[..., :2].reshape(2, 3, 2),
    "alias": lambda x: x.detach(),
}  # fmt: skip


@pytest.mark.parametrize("how", VIEWS)
def test_views_of_a_mask_are_masks(how: str) -> None:
    real = torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
    mask = make_mask(batch_size=2, q_length=3, kv_length=3, attention_mask=real)
    seen = VIEWS[how](mask & True)
    view = VIEWS[how](mask)
    scores = normal(*torch.broadcast_shapes((1, 1), seen.shape))
    wanted = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    for found in (scores + view, view + scores, torch.add(scores, view, out=torch.empty_like(scores))):
        assert torch.equal(found.softmax(-1), wanted)
    # They are booleans for everything else, and changes to them count.
    assert (view.dtype, view.shape, view.stride()) == (torch.bool, seen.shape, seen.stride())
    assert torch.equal(view | False, seen)
    assert torch.equal(torch.from_numpy(view.numpy()), seen)
    assert torch.equal(scores.masked_fill(~view, 0.0), scores.masked_fill(~seen, 0.0))
    if how not in ("expand", "copy", "reshape"):
        changed = mask & True
        for part in (view, VIEWS[how](changed)):
            part[..., 0] = False
        assert torch.equal(mask & True, changed)


def test_a_view_of_a_mask_for_attention() -> None:
    q, k, v = normal(2, 4, 5, 8), normal(2, 2, 5, 8, seed=1), normal(2, 2, 5, 8, seed=2)
    mask = make_mask(batch_size=2, q_length=5, kv_length=9, q_offset=0)
    assert type(mask) is VisibleKeys
    part = mask[:, :, :, :5]
    wanted = expected(q, k, v, torch.ones(5, 5, dtype=torch.bool).tril())
    assert (attention_forward(layer(), q, k, v, part)[0] - wanted).abs().max() < 1e-6
    sdpa = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=part, enable_gqa=True)
    assert (sdpa.transpose(1, 2) - wanted).abs().max() < 1e-6
    assert torch.equal(torch.from_dlpack(part), part & True)


def test_without_a_mask_the_module_decides() -> None:
    q, k, v = normal(1, 2, 3, 8), normal(1, 2, 7, 8, seed=1), normal(1, 2, 7, 8, seed=2)
    everything = torch.ones((3, 7), dtype=torch.bool)
    last_aligned = everything.tril(4)
    for asked, given, mask in (
        (layer(is_causal=True), {}, last_aligned),
        (layer(is_causal=False), {}, everything),
        (layer(is_causal=False), {"is_causal": True}, last_aligned),
        (layer(is_causal=True), {"is_causal": False}, everything),
        (layer(), {}, everything),
        (layer(is_causal=True), {"sliding_window": 2}, last_aligned & everything.triu(3)),
        (layer(is_causal=True), {"sliding_window": 7}, last_aligned),
    ):
        assert (attention_forward(asked, q, k, v, None, **given)[0] - expected(q, k, v, mask)).abs().max() < 1e-6
    step, _ = attention_forward(layer(is_causal=True), q[:, :, 2:], k, v, None, sliding_window=2)
    assert (step - expected(q[:, :, 2:], k, v, everything[:1].triu(5))).abs().max() < 1e-6


def test_additive_masks_sinks_and_softcap() -> None:
    q, k, v = normal(2, 4, 5, 8), normal(2, 2, 5, 8, seed=1), normal(2, 2, 5, 8, seed=2)
    bias, more = normal(2, 1, 5, 5, seed=3), normal(1, 4, 5, 9, seed=4)
    everything = torch.ones((5, 5), dtype=torch.bool)
    for dtype in (torch.float32, torch.float64):
        added, _ = attention_forward(layer(), q, k, v, bias.to(dtype), position_bias=more.to(dtype))
        assert (added - expected(q, k, v, everything, bias + more[..., :5])).abs().max() < 1e-6
    sinks = torch.nn.Parameter(normal(4, seed=5))
    scores = (q.double() @ k.repeat_interleave(2, 1).double().mT) * 0.5
    scores = 1.5 * (scores / 1.5).tanh()
    weights = torch.cat([scores, sinks.double()[None, :, None, None].expand(2, 4, 5, 1)], -1).softmax(-1)[..., :-1]
    wanted = (weights @ v.repeat_interleave(2, 1).double()).transpose(1, 2)
    for asked, given in ((layer(), {"s_aux": sinks}), (layer(sinks=sinks), {})):
        given |= {"is_causal": False, "scaling": torch.tensor(0.5), "softcap": 1.5}
        out, found = attention_forward(asked, q, k, v, None, output_attentions=True, **given)
        assert (out - wanted).abs().max() < 1e-6
        assert (found - weights).abs().max() < 1e-6


def test_one_query_batch_for_many_keys() -> None:
    q, k, v = normal(1, 2, 5, 8), normal(3, 2, 7, 8, seed=1), normal(3, 2, 7, 8, seed=2)
    out, _ = attention_forward(layer(is_causal=False), q, k, v, None)
    assert (out - expected(q, k, v, torch.ones((5, 7), dtype=torch.bool))).abs().max() < 1e-6


def test_custom_masks_of_a_model() -> None:
    eager, model = models.build("llama", "eager"), models.build("llama")
    fed = models.inputs("llama")
    ids = fed["input_ids"]
    packed = torch.cat([torch.arange(10), torch.arange(14)]).expand(2, -1)
    wanted = eager(ids, position_ids=packed, use_cache=False).logits
    found = model(ids, position_ids=packed, use_cache=False).logits
    assert (found - wanted).abs().max() < 2e-5 * wanted.abs().max()
    assert (eager(ids, use_cache=False).logits - wanted).abs().max() > 1e-2
    groups = torch.full((2, 24), -1)
    groups[:, 5:9] = 0
    call = {"inputs_embeds": torch.empty(2, 24, 0), "attention_mask": None, "past_key_values": None}
    masks = [
        masking_utils.create_causal_mask(config=x.config, block_sequence_ids=groups, **call) for x in (eager, model)
    ]
    assert torch.equal(masks[1], masks[0] == 0)
    assert masks[1][0, 0, 5, 8]
    wanted = eager(ids, attention_mask=masks[0]).logits
    for mask in masks:
        assert (model(ids, attention_mask=mask).logits - wanted).abs().max() < 2e-5 * wanted.abs().max()


def test_autocast_decides_where_types_differ() -> None:
    q, k, v = normal(1, 2, 5, 8), normal(1, 2, 5, 8, seed=1), normal(1, 2, 5, 8, seed=2).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = attention_forward(layer(is_causal=False), q, k, v, None)
    assert out.dtype is torch.bfloat16
    assert (out - expected(q, k, v, torch.ones((5, 5), dtype=torch.bool))).abs().max() < 0.05
    with pytest.raises(TypeError, match="v"):
        attention_forward(layer(), q, k, v, None)
