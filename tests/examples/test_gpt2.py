"""The decoder of the examples is GPT-2: transformers' GPT2LMHeadModel gives the same logits and tokens."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from places import EXAMPLES

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CONFIGS: dict[str, dict[str, Any]] = {
    "2-heads-of-17": {"n_embd": 34, "n_head": 2, "n_layer": 1, "vocab_size": 101},
    "4-heads": {"n_embd": 96, "n_head": 4, "n_layer": 3, "vocab_size": 1000},
    "12-heads-of-5": {"n_embd": 60, "n_head": 12, "n_layer": 2, "vocab_size": 777, "n_positions": 131},
    "12-heads-of-64": {"n_embd": 768, "n_head": 12, "n_layer": 2, "vocab_size": 5003},
    "inner": {"n_embd": 48, "n_head": 3, "n_inner": 77, "vocab_size": 300, "layer_norm_epsilon": 1e-3},
    "untied": {"n_embd": 32, "n_head": 4, "vocab_size": 50, "tie_word_embeddings": False},
    "unscaled": {"n_embd": 32, "n_head": 4, "vocab_size": 50, "scale_attn_weights": False},
    "by-layer": {"n_embd": 32, "n_head": 2, "n_layer": 4, "vocab_size": 50, "scale_attn_by_inverse_layer_idx": True},
    **{
        name: {"n_embd": 32, "n_head": 2, "n_layer": 2, "vocab_size": 50, "activation_function": name}
        for name in ("gelu", "relu", "silu")
    },
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Keep the pools of three libraries from waiting for one another's threads."""
    with pytest.importorskip("threadpoolctl").threadpool_limits(1):
        yield


def build(values: dict[str, Any]) -> Any:
    """Return a GPT2LMHeadModel all of whose weights are random: biases and norms too, which start as 0 and 1."""
    torch.manual_seed(2)
    sizes = {"n_layer": 2, "n_positions": 200, "bos_token_id": 0, "eos_token_id": None, **values}
    config = transformers.GPT2Config(**sizes, attn_implementation="eager")
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(std=0.3 if weight.ndim == 1 else 1.5 / config.n_embd**0.5)
            if "ln_" in name and name.endswith("weight"):
                weight.add_(1)
    return model


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request: pytest.FixtureRequest, load_example: Any) -> tuple[Any, Any]:
    peer = build(CONFIGS[request.param])
    return load_example("gpt2").from_transformers(peer), peer


@pytest.fixture(scope="module")
def gpt2(load_example: Any) -> Any:
    return load_example("gpt2")


def draw(model: Any, *shape: int) -> Any:
    return np.random.default_rng(5).integers(0, model.config.vocabulary, shape)


def logits_of(peer: Any, ids: Any) -> Any:
    with torch.no_grad():
        return peer(torch.from_numpy(ids)).logits.numpy()


def greedy(peer: Any, prompt: Any, tokens: int) -> list[int]:
    ids = torch.from_numpy(prompt[None])
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    result = peer.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, **options)
    best = torch.stack(result.scores).topk(2).values
    assert (best[..., 0] - best[..., 1]).min() > 3e-4, "rounding may decide between two tokens: take another seed"
    return result.sequences[0, len(prompt) :].tolist()


def test_logits(pair: tuple[Any, Any]) -> None:
    model, peer = pair
    ids = draw(model, 3, 50)
    found, wanted = model(ids), logits_of(peer, ids)
    assert found.dtype == np.float32
    assert np.max(abs(found - wanted)) <= 1e-4
    assert np.std(wanted) > 0.5


def test_64_tokens(pair: tuple[Any, Any], gpt2: Any, load_example: Any) -> None:
    model, peer = pair
    prompt = draw(model, 20)
    choose = gpt2.Chooser(allowed=np.arange(model.config.vocabulary))
    read = partial(load_example("generate").read_prompt, chunk=7)
    found = list(gpt2.generate(model, gpt2.new_caches(model.config, 84), prompt, 64, choose, read))
    assert found == greedy(peer, prompt, 64)


def test_steps_through_a_cache_compute_what_one_call_does(pair: tuple[Any, Any], gpt2: Any) -> None:
    model, _ = pair
    ids = draw(model, 2, 40)
    caches = gpt2.new_caches(model.config, 40, batch=2)
    ends = [0, 25, 26, 27, 33, *range(34, 41)]
    steps = [model(ids[:, a:b], a, caches) for a, b in pairwise(ends)]
    assert np.max(abs(np.concatenate(steps, axis=1) - model(ids))) <= 3e-5


def test_a_batch_of_prompts_of_different_lengths(pair: tuple[Any, Any], gpt2: Any) -> None:
    model, peer = pair
    prompts = [draw(model, length) for length in (9, 30, 1, 17)]
    found = gpt2.continue_batch(model, prompts, 24)
    assert found.tolist() == [greedy(peer, prompt, 24) for prompt in prompts]


def test_the_last_position(gpt2: Any) -> None:
    peer = build(CONFIGS["12-heads-of-5"])
    model = gpt2.from_transformers(peer)
    ids = draw(model, 1, 131)
    assert np.max(abs(model(ids) - logits_of(peer, ids))) <= 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as transformers saves it, with a tokenizer of byte pairs."""
    pytest.importorskip("safetensors")
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    texts = [
        (Path(__file__).with_name(f"sentences_{language}.txt")).read_text(encoding="utf8") for language in ("en", "pt")
    ]
    tokenizer.train_from_iterator(texts, vocab_size=700, special_tokens=["<|endoftext|>"], show_progress=False)
    path = tmp_path_factory.mktemp("model")
    tokenizer.save(str(path / "tokenizer.json"))
    build({"n_embd": 64, "n_head": 4, "vocab_size": tokenizer.get_vocab_size()}).save_pretrained(path)
    return path


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / "gpt2.py"), *arguments]
    return subprocess.run(command, capture_output=True, encoding="utf8", timeout=120, check=False)


def test_the_program(folder: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    peer = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    text = "She wrote: blåbær"
    prompt = np.array(tokenizer.encode(text).ids)
    tokens = greedy(peer, prompt, 40)
    result = run(str(folder), text, "--tokens", "40")
    assert result.returncode == 0, result.stderr
    assert 0 not in tokens
    assert result.stdout == text + tokenizer.decode(tokens) + "\n"
    drawn = [run(str(folder), text, "--tokens", "40", "--temperature", "1", "--seed", seed).stdout for seed in "112"]
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_end_of_the_text_ends_it(
    folder: Path, gpt2: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpt2, "generate", lambda *_: iter([40, 41, 0, 42]))
    assert gpt2.main([str(folder), "Hi"]) == 0
    assert capsys.readouterr().out == "HiHI\n"


def test_what_is_wrong_is_named(folder: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    shutil.copytree(folder, half, ignore=shutil.ignore_patterns("tokenizer.json"))
    for arguments, message in {
        (str(tmp_path),): "config.json is missing",
        (str(half),): "tokenizer.json is missing",
        (str(folder), ""): "the prompt has 0 tokens",
        (str(folder), "Hi", "--tokens", "200"): "and the model 200 positions",
    }.items():
        result = run(*arguments)
        assert result.returncode == 1
        assert result.stderr.startswith(f"gpt2.py: {arguments[0]}: ")
        assert message in result.stderr
    assert run(str(folder), "--tokens", "0").returncode == 2


def test_other_models_are_refused(gpt2: Any, folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text(encoding="utf8"))
    assert gpt2.config_from(values).width == 64
    for other in ({"model_type": "llama"}, {"add_cross_attention": True}):
        with pytest.raises(ValueError, match="no GPT-2 without cross-attention"):
            gpt2.config_from(values | other)
    with pytest.raises(ValueError, match="activation 'swish' is none of gelu_new, gelu, relu, silu"):
        gpt2.config_from(values | {"activation_function": "swish"})
