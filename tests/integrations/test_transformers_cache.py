"""`selfattn.integrations.transformers.Cache` gives the tokens of transformers' own caches, and appends in place."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
hf = pytest.importorskip("transformers")
pytest.importorskip("ml_dtypes")

import transformers_models as models  # noqa: E402
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer  # noqa: E402
from transformers_models import normal  # noqa: E402

import selfattn  # noqa: E402
from selfattn.integrations import _hf_cache  # noqa: E402
from selfattn.integrations.transformers import Cache, register  # noqa: E402

# Versions before 5.24 have no other name for it.
pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")

STEPS = 22
TOLERANCE = 2e-5  # of the largest logit, in float32
TOLERANCE_INT8 = 0.1  # the models' weights are large, and so are the errors of codes


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make the caches grow often, and record no gradients."""
    register()
    monkeypatch.setattr(_hf_cache, "_SLACK", 3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


def generate(model: Any, fed: dict[str, Any], **options: Any) -> Any:
    """Return the tokens of a search without chance."""
    fed = {name: x for name, x in fed.items() if name != "decoder_input_ids"}
    steps = {"min_new_tokens": STEPS, "max_new_tokens": STEPS}
    return model.generate(**fed, do_sample=False, no_repeat_ngram_size=1, **steps, **options)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gemma3", "qwen3", "gpt_oss", "bloom", "falcon"])
def test_tokens_are_those_of_other_caches(name: str, beams: int) -> None:
    fed = models.inputs(name, "left")
    eager = models.build(name, "eager")
    wanted = generate(eager, fed, num_beams=beams)
    assert len({tuple(row) for row in wanted[:, -STEPS:].tolist()}) == models.BATCH
    for model in (models.build(name), eager):
        assert torch.equal(generate(model, fed, num_beams=beams, past_key_values=Cache(model.config)), wanted)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_tokens_are_those_of_sdpa(name: str) -> None:
    fed = models.inputs(name, "left")
    sdpa, own = models.build(name, "sdpa"), models.build(name)
    for options in ({}, {"cache_implementation": "static"}):
        assert torch.equal(
            generate(own, fed, past_key_values=Cache(own.config)), generate(sdpa, fed, **options, disable_compile=True)
        )


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_assisted_decoding(name: str) -> None:
    fed = {key: x[1:] for key, x in models.inputs(name).items()}
    model = models.build(name)
    wanted = generate(model, fed)
    drafter = models.build(name)
    for parameter in drafter.lm_head.parameters():  # so that some drafts are rejected
        parameter.add_(0.05 * normal(*parameter.shape))
    assert torch.equal(generate(model, fed, past_key_values=Cache(model.config), prompt_lookup_num_tokens=3), wanted)
    # In older versions, the cache that transformers makes for the drafter fails with sliding windows.
    if name == "llama" or tuple(map(int, hf.__version__.split(".")[:2])) >= (5, 24):
        assert torch.equal(generate(model, fed, past_key_values=Cache(model.config), assistant_model=drafter), wanted)


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_encoder_decoder_caches(name: str) -> None:
    fed = models.inputs(name, models.paddings(name)[-1])
    model = models.build(name)
    cache = hf.EncoderDecoderCache(Cache(), Cache())
    assert torch.equal(generate(model, fed, past_key_values=cache), generate(model, fed))
    for part in (cache.self_attention_cache, cache.cross_attention_cache):
        assert {type(layer) for layer in part.layers} == {_hf_cache.Layer}


def logits(model: Any, fed: dict[str, Any], cache: Any) -> Any:
    """Return the logits after the first 10 tokens, computed in chunks."""
    ids, mask = fed["input_ids"], fed["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    parts = []
    for start, stop in ((0, 12), (12, 17), (17, 18), (18, 19), (19, 20), (20, 24)):
        part = model(
            ids[:, start:stop], attention_mask=mask[:, :stop], position_ids=positions[:, start:stop],
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
        parts.append(part.logits)
    return torch.cat(parts, dim=1)[:, 10:]


def error(got: Any, wanted: Any) -> float:
    return float((got.double() - wanted.double()).abs().max() / wanted.double().abs().max())


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gemma3"])
def test_chunks_and_storage_types(name: str, padding: str) -> None:
    fed = models.inputs(name, padding)
    model, eager = models.build(name), models.build(name, "eager")
    wanted = logits(eager, fed, hf.DynamicCache(config=eager.config))
    assert error(logits(model, fed, Cache(model.config)), wanted) < TOLERANCE
    for dtype in ("int8", torch.bfloat16):
        found = logits(model, fed, Cache(model.config, dtype=dtype))
        assert TOLERANCE < error(found, wanted) < TOLERANCE_INT8
        # Attention that knows nothing of it gets the same numbers, converted.
        assert error(logits(eager, fed, Cache(model.config, dtype=dtype)), found) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype: Any) -> None:
    fed, model = models.inputs("mistral", "left"), models.build("mistral", dtype=dtype)
    assert torch.equal(
        logits(model, fed, Cache(model.config)), logits(model, fed, hf.DynamicCache(config=model.config))
    )


def test_weights_of_stored_tokens() -> None:
    fed, model = models.inputs("mistral", "left"), models.build("mistral")
    cache, twin = Cache(model.config, dtype="int8"), Cache(model.config, dtype="int8")
    options = {"output_attentions": True, "use_cache": True}
    eager = models.build("mistral", "eager")
    ids, mask = fed["input_ids"], fed["attention_mask"]
    for start, stop in ((0, 20), (20, 21), (21, 24)):
        step = {"input_ids": ids[:, start:stop], "attention_mask": mask[:, :stop]}
        found = model(**step, past_key_values=cache, **options)
        wanted = eager(**step, past_key_values=twin, **options)
    for own, peer in zip(found.attentions, wanted.attentions, strict=True):
        assert own.shape == peer.shape
        assert (own - peer).abs().max() < 1e-5


def test_tokens_are_appended_and_read_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_hf_cache, "_SLACK", 64)
    model, fed = models.build("llama", dtype=torch.bfloat16), models.inputs("llama")
    cache = Cache(model.config)
    model(**fed, past_key_values=cache, use_cache=True)
    places = [layer.keys.data_ptr() for layer in cache.layers]
    read = []
    attention = selfattn._core.attention

    def spy(q: Any, k: Any, *others: Any) -> Any:
        read.append(k.__array_interface__["data"][0])
        return attention(q, k, *others)

    monkeypatch.setattr(selfattn._core, "attention", spy)
    for _ in range(60):
        model(fed["input_ids"][:, :1], past_key_values=cache, use_cache=True)
    assert read == 60 * places
    assert cache.layers[0].keys.shape[2] == models.TOKENS + 60


def test_a_cache_serves_several_turns() -> None:
    fed, model = models.inputs("mistral"), models.build("mistral")
    ids = fed["input_ids"]
    own, other = Cache(model.config), hf.DynamicCache(config=model.config)
    for _ in range(3):
        grown = [
            generate(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, past_key_values=cache)
            for cache in (own, other)
        ]
        assert torch.equal(*grown)
        ids = torch.cat([grown[0], fed["input_ids"][:, :5]], dim=1)
    copies = [copy.deepcopy(own), pickle.loads(pickle.dumps(own))]
    step = {"input_ids": ids[:, -1:], "use_cache": True}
    wanted = model(**step, past_key_values=other).logits
    for cache in (*copies, own):
        assert torch.equal(model(**step, past_key_values=cache).logits, wanted)
    own.reset()
    assert own.get_seq_length() == 0
    assert torch.equal(generate(model, fed, past_key_values=own), generate(model, fed))


def test_compiled_models_can_use_it() -> None:
    fed, model = models.inputs("llama"), models.build("llama")
    wanted = logits(model, fed, Cache(model.config))
    model.forward = torch.compile(model.forward, backend="eager")
    assert error(logits(model, fed, Cache(model.config)), wanted) < TOLERANCE


def test_refuses_what_it_cannot_do() -> None:
    model, fed = models.build("llama"), models.inputs("llama")
    with pytest.raises(ValueError, match="selfattn: offloading is True"):
        Cache(model.config, offloading=True)
    with pytest.raises(TypeError, match="Cache: dtype is int2"):
        Cache(model.config, dtype="int2")
    with torch.enable_grad(), pytest.raises(RuntimeError, match=r"selfattn: a Cache has no gradients: .*DynamicCache"):
        model(**fed, past_key_values=Cache(model.config), use_cache=True)
    layer = _hf_cache.Layer()
    layer.update(normal(2, 1, 3, 8), normal(2, 1, 3, 8))
    for other in (normal(1, 1, 3, 8), normal(2, 1, 3, 8).double()):
        with pytest.raises(
            ValueError, match=r"selfattn: keys are torch.float\d\d of \d sequences, but the cache holds"
        ):
            layer.update(other, other)
    for use in (layer.offload, layer.prefetch):
        with pytest.raises(NotImplementedError, match="cannot be offloaded"):
            use()
    with pytest.raises(ValueError, match="selfattn: tokens_to_remove is 1"):
        layer.crop(1)
    with pytest.raises(ValueError, match="selfattn: key is on device meta"):
        _hf_cache.Layer().update(*[torch.zeros((1, 1, 2, 8), device="meta")] * 2)
    sliding = _hf_cache.Layer(sliding_window=4)
    sliding.update(normal(2, 1, 6, 8), normal(2, 1, 6, 8))
    with pytest.raises(RuntimeError, match="no longer held: call activate_past_recording"):
        sliding.crop(-1)
    sliding.activate_past_recording()
    sliding.update(normal(2, 1, 2, 8), normal(2, 1, 2, 8))
    sliding.crop(-2)
    assert sliding.get_seq_length() == 6


class Pair:
    """A layer of ours and one of transformers, which get the same calls."""

    def __init__(self, chance: random.Random) -> None:
        self.chance, self.window = chance, chance.choice([None, None, 2, 5, 9])
        self.own = _hf_cache.Layer(chance.choice([None, "float32", "int8", "bfloat16"]), self.window)
        self.peer = DynamicLayer() if self.window is None else DynamicSlidingWindowLayer(sliding_window=self.window)
        self.exact = self.own.storage in (None, "float32")
        self.records = self.window is not None and chance.random() < 0.5
        if self.records:
            self.own.activate_past_recording()
            self.peer.activate_past_recording()
        self.batch, self.removable = 2, 0

    def call(self, method: str, *arguments: Any) -> None:
        getattr(self.own, method)(*arguments)
        getattr(self.peer, method)(*arguments)

    def append(self) -> None:
        tokens = self.chance.choice([1, 1, 1, 2, 4, 11])
        seed = self.chance.randrange(1 << 30)
        new = normal(self.batch, 2, tokens, 8, seed=seed), normal(self.batch, 2, tokens, 4, seed=seed + 1)
        visible, _ = self.own.get_mask_sizes(tokens)
        assert self.own.get_mask_sizes(tokens) == self.peer.get_mask_sizes(tokens)
        for found, wanted in zip(self.own.update(*new), self.peer.update(*new), strict=True):
            wanted = wanted[:, :, -visible:]  # older versions of transformers return more while they record
            assert found.shape == wanted.shape
            assert torch.equal(found, wanted) if self.exact else (found - wanted).abs().max() < 0.05
        self.removable += tokens

    def crop(self) -> None:
        if self.window is None or self.records or self.peer.get_seq_length() < self.window:
            self.call("crop", -self.chance.randint(0, min(3, self.removable)))
            self.removable = 0

    def reorder(self) -> None:
        self.call("reorder_cache", torch.tensor([self.chance.randrange(self.batch) for _ in range(self.batch)]))

    def repeat(self) -> None:
        if self.batch < 5 and self.peer.get_seq_length():
            self.call("batch_repeat_interleave", 2)
            self.batch *= 2

    def select(self) -> None:
        if self.peer.get_seq_length():
            kept = [self.batch - 1, 0][: self.chance.randint(1, 2)]
            self.call("batch_select_indices", torch.tensor(kept))
            self.batch = len(kept)

    def copy(self) -> None:
        self.own = copy.deepcopy(self.own)


@pytest.mark.parametrize("seed", range(60))
def test_layers_do_what_those_of_transformers_do(seed: int) -> None:
    pair = Pair(random.Random(seed))
    pair.append()
    for _ in range(30):
        step = pair.chance.choice([pair.append] * 5 + [pair.crop, pair.reorder, pair.repeat, pair.select, pair.copy])
        step()
        assert pair.own.get_seq_length() == pair.peer.get_seq_length()
