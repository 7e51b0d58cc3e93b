"""The language models of llm.py give the logits and tokens of transformers' models."""

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
from llm_models import (
    CONFIGS,
    GEMMA,
    LONGEST,
    QWEN,
    SIZES,
    build,
    draw,
    greedy,
    load,
    logits_of,
    pair_of,
    torch,
    transformers,
)
from places import EXAMPLES


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Keep the pools of three libraries from waiting for one another's threads."""
    with pytest.importorskip("threadpoolctl").threadpool_limits(1):
        yield


@pytest.fixture(scope="module")
def llm(load_example: Any) -> Any:
    return load_example("llm")


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request: pytest.FixtureRequest, llm: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return pair_of(request.param, llm, tmp_path_factory.mktemp("model"))


def test_logits(pair: tuple[Any, Any]) -> None:
    model, peer = pair
    ids = draw(2, 30)
    found, wanted = model(ids), logits_of(peer, ids)
    assert found.dtype == np.float32
    assert np.max(abs(found - wanted)) <= 1e-4
    assert np.std(wanted) > 0.5


def test_64_tokens(pair: tuple[Any, Any], llm: Any) -> None:
    model, peer = pair
    prompt = draw(30)
    caches = model.new_caches(LONGEST, 7)
    rings = [cache.window is not None for cache in caches]
    assert rings == [model.config.window(layer) is not None for layer in range(model.config.layers)]
    choose, read = llm.Chooser(allowed=np.arange(SIZES["vocab_size"])), partial(llm.read_prompt, chunk=7)
    found = list(llm.generate(model, caches, prompt, 64, choose, read))
    assert found == greedy(peer, prompt, 64)
    assert len(set(found)) > 5


def test_steps_of_a_batch_compute_what_one_call_does(pair: tuple[Any, Any]) -> None:
    model, _ = pair
    ids = draw(2, 40)
    caches = model.new_caches(40, 25, batch=2)
    ends = [0, 25, 26, 27, 33, *range(34, 41)]
    steps = [model(ids[:, a:b], a, caches)[:, 0] for a, b in pairwise(ends)]
    assert np.max(abs(np.stack(steps, axis=1) - model(ids)[:, [end - 1 for end in ends[1:]]])) <= 3e-5


def test_files_in_bfloat16_and_in_parts(llm: Any, tmp_path: Path) -> None:
    build("Llama", {}).bfloat16().save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    peer = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    wide, ids = load(llm, tmp_path), draw(1, 30)
    assert np.max(abs(wide(ids) - logits_of(peer, ids))) <= 1e-4
    pytest.importorskip("ml_dtypes")
    narrow = load(llm, tmp_path, "bfloat16")
    assert narrow.vectors.dtype.itemsize == 2
    assert 0 < np.max(abs(wide(ids) - narrow(ids))) < 0.2


@pytest.mark.parametrize(("dtype", "error"), [("float16", 0.01), ("bfloat16", 0.05), ("int8", 0.1), ("int4", 1.0)])
def test_caches_of_other_types(llm: Any, tmp_path: Path, dtype: str, error: float) -> None:
    build("Llama", {}).save_pretrained(tmp_path)
    model, ids = load(llm, tmp_path), draw(1, 30)
    assert 0 < np.max(abs(model(ids, 0, model.new_caches(30, 30, dtype)) - model(ids)[:, -1:])) < error


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_latent_attention_in_bfloat16(llm: Any, tmp_path: Path, dtype: str) -> None:
    build(*CONFIGS["deepseek-v3"]).bfloat16().save_pretrained(tmp_path)
    wide, narrow, ids = load(llm, tmp_path), load(llm, tmp_path, "bfloat16"), draw(1, 30)
    assert 0 < np.max(abs(narrow(ids, 0, narrow.new_caches(30, 30, dtype)) - wide(ids)[:, -1:])) < 0.5


def test_settings_of_older_files(llm: Any) -> None:
    sizes = SIZES | {"rms_norm_eps": 1e-6, "hidden_act": "silu", "num_hidden_layers": 6}
    gemma = llm.Config(sizes | {"model_type": "gemma3_text", "rope_theta": 1e6, "rope_local_base_freq": 1e4, **GEMMA})
    assert [gemma.window(layer) for layer in range(6)] == [8, 8, 8, 8, 8, None]
    assert gemma.rope(5).inv_freq[1] == pytest.approx(1e6 ** (-1 / 8))
    assert gemma.rope(4).inv_freq[1] == pytest.approx(1e4 ** (-1 / 8))
    gemma2 = llm.Config(sizes | {"model_type": "gemma2", **GEMMA})
    assert [gemma2.window(layer) for layer in range(3)] == [8, None, 8]
    qwen = sizes | {"model_type": "qwen2", **QWEN}
    assert [llm.Config(qwen).window(layer) for layer in range(3)] == [None, 8, 8]
    assert llm.Config(qwen | {"use_sliding_window": False}).window(2) is None
    assert llm.Config(sizes | {"model_type": "mistral", "sliding_window": None}).window(0) is None
    llama4 = sizes | {"model_type": "llama4_text", "attention_chunk_size": 12, "no_rope_layers": [1, 0] * 3}
    assert [llm.Config(llama4).window(layer) for layer in range(2)] == [11, None]
    assert [llm.Config(llama4).rope(layer) is None for layer in range(2)] == [False, True]
    assert llm.Config(sizes | {"model_type": "deepseek_v3"}).rope(0).interleaved


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as transformers saves it, with a tokenizer of byte pairs."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    text = (Path(__file__).with_name("sentences_pt.txt")).read_text(encoding="utf8")
    tokenizer.train_from_iterator([text], vocab_size=400, special_tokens=["<|end|>"], show_progress=False)
    path = tmp_path_factory.mktemp("model")
    tokenizer.save(str(path / "tokenizer.json"))
    build("Gemma3Text", {**GEMMA, "vocab_size": tokenizer.get_vocab_size()}).save_pretrained(path)
    return path


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / "llm.py"), *arguments]
    return subprocess.run(command, capture_output=True, encoding="utf8", timeout=120, check=False)


def test_the_program(folder: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    peer = transformers.Gemma3ForCausalLM.from_pretrained(folder).eval()
    text = "Ela escreveu: maçã"
    prompt = np.array(tokenizer.encode(text).ids)
    tokens = greedy(peer, prompt, 40)
    result = run(str(folder), text, "--tokens", "40", "--chunk", "5")
    assert result.returncode == 0, result.stderr
    assert 0 not in tokens
    assert result.stdout == text + tokenizer.decode(tokens) + "\n"
    options = ["--tokens", "40", "--dtype", "int8", "--temperature", "1", "--seed"]
    drawn = [run(str(folder), text, *options, seed).stdout for seed in "112"]
    assert drawn[0] == drawn[1] != drawn[2]


def test_pieces_of_text_with_letters_in_several_tokens(llm: Any) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abm"]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    steps = tokenizers.decoders
    tokenizer.decoder = steps.Sequence(
        [steps.Replace("▁", " "), steps.ByteFallback(), steps.Fuse(), steps.Strip(" ", 1, 0)]
    )
    ids = tokenizer.encode("ab maçã 日本 bam " * 5).ids
    found = list(llm.pieces(tokenizer, ids[:2], ids[2:]))
    assert "".join(found) == ("ab maçã 日本 bam " * 5)[1:]
    assert "ç" in found
    assert "\ufffd" not in "".join(found)
    assert list(llm.pieces(tokenizer, ids[:2], [vocabulary["<0xE6>"]])) == ["\ufffd"]
    tokenizer.add_special_tokens(["<pad>"])
    skipped = [tokenizer.token_to_id(word) for word in ("<pad>", "▁", "b")]
    assert "".join(llm.pieces(tokenizer, ids[:2], skipped)) == " b"


def test_the_end_of_the_text_ends_it(
    folder: Path, llm: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llm, "generate", lambda *_: iter([40, 41, 7, 42]))
    monkeypatch.setattr(llm, "end_tokens", lambda *_: {7})
    assert llm.main([str(folder), "Hi"]) == 0
    assert capsys.readouterr().out == "HiHI\n"


def test_end_tokens(load_example: Any, tmp_path: Path) -> None:
    ends = load_example("llm_weights").end_tokens
    assert [ends(tmp_path, {"eos_token_id": given}) for given in (None, 3, [3, 5])] == [set(), {3}, {3, 5}]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7]}')
    assert ends(tmp_path, {"eos_token_id": 3}) == {7}


def test_what_is_wrong_is_named(folder: Path, llm: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def copy(without: str = "", **changes: Any) -> str:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        shutil.copytree(folder, path, ignore=shutil.ignore_patterns(without))
        if changes:
            values = json.loads((path / "config.json").read_text(encoding="utf8"))
            (path / "config.json").write_text(json.dumps(values | changes))
        return str(path)

    for arguments, message in {
        (copy("config.json"),): "config.json is missing",
        (copy("tokenizer.json"),): "tokenizer.json is missing",
        (copy("model.safetensors"),): "model.safetensors is missing",
        (copy(model_type="gpt2"),): "model_type 'gpt2' is none of llama, mistral, qwen2, qwen3, ",
        (copy(hidden_activation="swish"),): "activation 'swish' is none of silu, gelu, gelu_pytorch_tanh, relu",
        (copy(layer_types=["mamba"] * 3),): "but 3 of full_attention and sliding_attention are needed",
        (copy(model_type="deepseek_v3"),): "kv_lora_rank is missing in config.json",
        (copy(num_hidden_layers=4),): "but 4 of full_attention and sliding_attention are needed",
        (copy(num_hidden_layers=4, layer_types=None),): "the weight model.layers.3.input_layernorm.weight is missing",
        (str(folder), ""): "the prompt has 0 tokens",
        (str(folder), "Hi", "--tokens", "400"): "and the model 400 positions",
    }.items():
        assert llm.main(arguments) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"llm.py: {arguments[0]}: ")
        assert message in error
    for arguments in (["--tokens", "0"], ["--chunk", "0"], ["--dtype", "int2"], ["--weights", "int8"]):
        with pytest.raises(SystemExit):
            llm.main([str(folder), *arguments])
