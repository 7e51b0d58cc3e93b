"""Models of transformers attend through selfattn as through their own eager attention."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
hf = pytest.importorskip("transformers")
pytest.importorskip("ml_dtypes")

import transformers_models as models  # noqa: E402

import selfattn  # noqa: E402
from selfattn.integrations.transformers import register  # noqa: E402

# Versions before 5.24 have no other name for it.
pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")

TOLERANCE = 2e-5  # of the largest number, in float32
STEPS = 22


@pytest.fixture(autouse=True, scope="module")
def _registered() -> Iterator[None]:
    register()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Record the arguments and results of every call of the core, heads first."""
    seen: list[dict[str, Any]] = []
    attention = selfattn._core.attention
    fields = ("kv_starts", "kv_lens", "mask", "return_weights", "num_threads")

    def spy(q: Any, k: Any, v: Any, out: Any, options: Any) -> Any:
        result = attention(q, k, v, out, options)
        operands = {"q": q, "k": k, "v": v, "out": result[0] if isinstance(result, tuple) else result}
        if options.layout == selfattn._core.LAYOUTS["bshd"]:
            operands = {name: x.swapaxes(1, 2) for name, x in operands.items()}
        given = {name: getattr(options, name) for name in fields}
        seen.append(operands | {name: x for name, x in given.items() if x is not None and x is not False})
        return result

    monkeypatch.setattr(selfattn._core, "attention", spy)
    return seen


def error(got: Any, wanted: Any) -> float:
    """Return the largest difference relative to the largest number."""
    wanted = wanted.double()
    return float((got.double() - wanted).abs().max() / wanted.abs().max())


def assert_same(got: Any, wanted: Any, mask: Any) -> None:
    found = dict(models.states(got, mask))
    expected = dict(models.states(wanted, mask))
    assert found.keys() == expected.keys()
    assert expected
    for name, state in expected.items():
        assert found[name].dtype == state.dtype
        assert error(found[name], state) < TOLERANCE, name


CASES = [(name, padding) for name in models.CASES for padding in models.paddings(name)]


@pytest.mark.parametrize(("name", "padding"), CASES)
def test_states_are_those_of_eager_attention(name: str, padding: str, calls: list[dict[str, Any]]) -> None:
    fed = models.inputs(name, padding)
    wanted = models.build(name, "eager")(**fed, output_hidden_states=True, output_attentions=True)
    assert not calls
    model = models.build(name)
    with_weights = model(**fed, output_hidden_states=True, output_attentions=True)
    attended = len(calls)
    assert attended >= 2
    assert any(key.endswith("attentions") for key, x in wanted.items()) or name == "clip"
    assert_same(with_weights, wanted, fed.get("attention_mask"))
    fused = model(**fed, output_hidden_states=True)
    assert len(calls) == 2 * attended
    assert not any("return_weights" in call for call in calls[attended:])
    states = dict(models.states(fused, fed.get("attention_mask")))
    for key, state in models.states(wanted, fed.get("attention_mask")):
        if "attentions" not in key:
            assert error(states[key], state) < TOLERANCE, key


@pytest.mark.parametrize(("name", "padding"), [(name, models.paddings(name)[-1]) for name in models.CASES])
def test_bfloat16_is_no_worse_than_eager(name: str, padding: str) -> None:
    fed, narrow = models.inputs(name, padding), models.inputs(name, padding, torch.bfloat16)
    mask = fed.get("attention_mask")
    exact = dict(models.states(models.build(name, "eager")(**fed, output_hidden_states=True), mask))
    rms = {}
    for implementation in ("eager", "selfattn"):
        out = models.build(name, implementation, torch.bfloat16)(**narrow, output_hidden_states=True)
        states = dict(models.states(out, mask))
        assert states.keys() == exact.keys()
        errors = torch.cat([(states[key].double() - x.double()).flatten() for key, x in exact.items()])
        rms[implementation] = float(errors.square().mean().sqrt())
    assert 0 < rms["selfattn"] < 1.25 * rms["eager"]


def generate(model: Any, fed: dict[str, Any], **options: Any) -> tuple[Any, Any]:
    """Return the tokens and, for greedy search, the logits of all steps."""
    prompt = {name: x for name, x in fed.items() if name != "decoder_input_ids"}
    greedy = options.get("num_beams", 1) == 1
    out = model.generate(
        **prompt, do_sample=False, min_new_tokens=STEPS, max_new_tokens=STEPS, return_dict_in_generate=True,
        output_logits=greedy, no_repeat_ngram_size=1, **options,
    )  # fmt: skip
    return out.sequences, torch.stack(out.logits) if greedy else None


def padding_of_prompt(name: str) -> str:
    return "left" if name in models.DECODERS else models.paddings(name)[-1]


@pytest.mark.parametrize("name", models.WRITERS)
def test_generates_the_same_tokens(name: str, calls: list[dict[str, Any]]) -> None:
    fed = models.inputs(name, padding_of_prompt(name))
    tokens, logits = generate(models.build(name, "eager"), fed)
    assert not calls
    found, found_logits = generate(models.build(name), fed)
    assert len(calls) >= 2 * STEPS
    assert torch.equal(found, tokens)
    assert error(found_logits, logits) < TOLERANCE


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gemma3", "gpt_oss", "t5", "bart", "bloom", "falcon"])
def test_static_caches(name: str, calls: list[dict[str, Any]]) -> None:
    fed = models.inputs(name, padding_of_prompt(name))
    tokens, logits = generate(models.build(name, "eager"), fed)
    found, found_logits = generate(models.build(name), fed, cache_implementation="static")
    assert torch.equal(found, tokens)
    assert error(found_logits, logits) < TOLERANCE
    if name == "llama":  # the unfilled tail never reaches selfattn
        lengths = {call["k"].shape[2] for call in calls}
        assert lengths == set(range(models.TOKENS, models.TOKENS + STEPS))


@pytest.mark.parametrize("name", ["llama", "gemma2", "bart"])
def test_beam_search(name: str) -> None:
    fed = models.inputs(name, padding_of_prompt(name))
    tokens, _ = generate(models.build(name, "eager"), fed, num_beams=3)
    assert torch.equal(generate(models.build(name), fed, num_beams=3)[0], tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_chunks_through_a_cache(name: str, cache: str, dtype: Any) -> None:
    fed = models.inputs(name, "left")
    ids, mask = fed["input_ids"], fed["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    whole = models.build(name, "eager")(ids, attention_mask=mask, position_ids=positions).logits

    def in_chunks(implementation: str) -> Any:
        model = models.build(name, implementation, dtype)
        past = hf.DynamicCache(config=model.config)
        if cache == "static":
            past = hf.StaticCache(config=model.config, max_cache_len=40)
        parts = []
        for start, stop in ((0, 10), (10, 15), (15, 16), (16, 17), (17, 24)):
            # A static cache gets all positions, including those of the real tokens.
            part = model(
                ids[:, start:stop], attention_mask=mask[:, :stop], position_ids=positions[:, start:stop],
                past_key_values=past, use_cache=True,
            )  # fmt: skip
            parts.append(part.logits)
        return torch.cat(parts, dim=1)

    real = mask.bool()
    found = error(in_chunks("selfattn")[real], whole[real])
    if dtype == torch.float32:
        assert found < TOLERANCE
    else:
        assert 0 < found < 1.5 * error(in_chunks("eager")[real], whole[real])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_is_copied(dtype: Any, cache: str, calls: list[dict[str, Any]]) -> None:
    model = models.build("llama", dtype=dtype)
    past = hf.DynamicCache(config=model.config)
    if cache == "static":
        past = hf.StaticCache(config=model.config, max_cache_len=40)
    fed = models.inputs("llama", "left")
    hooked: list[Any] = []
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: hooked.append(args[0]))
    model(**fed, past_key_values=past, use_cache=True)
    assert len(calls) == len(hooked) == 2
    for call, layer, projected in zip(calls, past.layers, hooked, strict=True):
        for array, tensor in ((call["k"], layer.keys), (call["v"], layer.values)):
            assert array.__array_interface__["data"][0] == tensor.data_ptr()
            assert array.strides == tuple(step * tensor.element_size() for step in tensor.stride())
        # The result is in the memory order that the output projection reads.
        assert call["out"].__array_interface__["data"][0] == projected.data_ptr()
        assert call["q"].dtype.name == str(dtype).removeprefix("torch.")
        assert call["kv_starts"].tolist() == [models.PADDED, 0]


def test_import_brings_no_framework(tmp_path: Path) -> None:
    code = "import selfattn, sys; print([m for m in ('torch', 'transformers', 'ml_dtypes') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_threads_are_those_that_both_allow(calls: list[dict[str, Any]]) -> None:
    model, fed = models.build("bert"), models.inputs("bert")
    try:
        for torch_threads, own in ((1, 2), (2, 1), (2, 2)):
            torch.set_num_threads(torch_threads)
            selfattn.set_num_threads(own)
            model(**fed)
            assert calls[-1]["num_threads"] == min(torch_threads, own)
    finally:
        torch.set_num_threads(1)
        selfattn.set_num_threads(None)


def test_falcon_with_alibi_is_that_of_sdpa(calls: list[dict[str, Any]]) -> None:
    # Eager attention of transformers 5.23 adds Falcon's ALiBi twice, once with the mask.
    fed = models.inputs("falcon", "left")
    wanted = models.build("falcon", "sdpa", alibi=True)(**fed, output_hidden_states=True)
    assert not calls
    assert_same(models.build("falcon", alibi=True)(**fed, output_hidden_states=True), wanted, fed["attention_mask"])
    assert calls


def test_changes_of_mind(calls: list[dict[str, Any]]) -> None:
    model, fed = models.build("qwen3", "eager"), models.inputs("qwen3", "right")
    wanted = model(**fed, output_hidden_states=True)
    model.set_attn_implementation("selfattn")
    found = model(**fed, output_hidden_states=True)
    assert len(calls) == 2
    assert_same(found, wanted, fed["attention_mask"])
    assert np.array_equal(calls[0]["kv_lens"], fed["attention_mask"].sum(1))


D_MODEL = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
ENCODER = {"encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48}
MISLEADING: dict[str, Any] = {
    # Encoders whose layers do not say that they are not causal ...
    "clap": lambda: hf.ClapTextModel(hf.ClapTextConfig(**{**models.BASE, "initializer_factor": 1.0})),
    "splinter": lambda: hf.SplinterModel(hf.SplinterConfig(**models.BASE)),
    # ... decoders whose layers say that they are not, and an encoder that adds its mask to scores by itself.
    "nllb_moe": lambda: hf.NllbMoeModel(
        hf.NllbMoeConfig(
            **D_MODEL, **ENCODER, vocab_size=99, num_experts=2, encoder_sparse_step=0, decoder_sparse_step=0
        )
    ),
    "bigbird_pegasus": lambda: hf.BigBirdPegasusModel(
        hf.BigBirdPegasusConfig(**D_MODEL, **ENCODER, vocab_size=99, attention_type="original_full")
    ),
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", MISLEADING)
def test_masks_count_and_not_what_layers_say(name: str, padded: bool) -> None:
    torch.manual_seed(0)
    model = MISLEADING[name]().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.3)
    fed = {"input_ids": torch.randint(5, 90, (2, 20))}
    if padded:
        fed["attention_mask"] = (torch.arange(20) < torch.tensor([[12], [20]])).long()
    if model.config.is_encoder_decoder:
        fed["decoder_input_ids"] = torch.randint(5, 90, (2, 7))
    states = {}
    for attention in ("eager", "selfattn"):
        model.set_attn_implementation(attention)
        assert model.config._attn_implementation == attention
        found = model(**fed)
        real = fed["attention_mask"].bool() if padded else slice(None)
        if model.config.is_encoder_decoder:
            states[attention] = [found.last_hidden_state, found.encoder_last_hidden_state[real]]
        else:
            states[attention] = [found.last_hidden_state[real]]
    for own, peer in zip(states["selfattn"], states["eager"], strict=True):
        assert (own - peer).abs().max() < 1e-5
