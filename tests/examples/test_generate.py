"""The example that generates text: caches change its speed, not its tokens; PyTorch's GPT-2 gives the same."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import partial
from typing import Any

import numpy as np
import pytest
from places import EXAMPLES

SMALL = ("--layers", "2", "--width", "64", "--heads", "4")


@pytest.fixture(scope="module")
def example(load_example: Any) -> Any:
    return load_example("generate")


@pytest.fixture(scope="module")
def prompt(example: Any) -> Any:
    return example.encode(example.PROMPT)


@pytest.fixture(scope="module", params=[4, 2, 1], ids=lambda n: f"{n}-kv-heads")
def model(request: pytest.FixtureRequest, example: Any) -> Any:
    config = example.Config(layers=2, width=64, heads=4, kv_heads=request.param)
    return example.Decoder(config, example.random_weights(config))


def written(example: Any, model: Any, prompt: Any, tokens: int, chunk: int = 256, temperature: float = 1.0) -> Any:
    caches = example.new_caches(model.config, len(prompt) + tokens)
    read = partial(example.read_prompt, chunk=chunk)
    return list(example.generate(model, caches, prompt, tokens, example.Chooser(temperature), read))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_same_tokens_without_a_cache(example: Any, model: Any, prompt: Any, temperature: float) -> None:
    found = written(example, model, prompt, 40, temperature=temperature)
    assert found == list(example.generate_again(model, prompt, 40, example.Chooser(temperature)))
    assert len(set(found)) > (1 if temperature == 0 else 10)


@pytest.mark.parametrize("chunk", [1, 7, 68, 69])
def test_the_same_tokens_of_a_prompt_in_chunks(example: Any, model: Any, prompt: Any, chunk: int) -> None:
    assert written(example, model, prompt, 40, chunk=chunk) == written(example, model, prompt, 40)


def test_the_tokens_depend_on_the_whole_prompt(example: Any, model: Any, prompt: Any) -> None:
    other = prompt.copy()
    other[0] += 1
    assert written(example, model, other, 40) != written(example, model, prompt, 40)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / "generate.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(("dtype", "size"), [("float32", 64 * 4), ("float16", 64 * 2), ("int8", 64 + 4 * 4)])
def test_the_program(dtype: str, size: int) -> None:
    result = run(*SMALL, "--prompt", "Blåbær", "--tokens", "30", "--dtype", dtype, "--check")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""  # no progress unless stderr is a terminal
    text, figures = result.stdout.split("\n\n")
    assert text.startswith("Blåbær")
    assert len(text) == 6 + 30
    assert re.search(r"^prompt: 8 tokens in [\d.]+ s$", figures, flags=re.M)
    assert re.search(r"^then [1-9]\d* tokens per second$", figures, flags=re.M)
    # Two layers, keys and values of 4 heads; 9 to 37 tokens, 23 on average.
    assert f"cache: {dtype}, {2 * 2 * size * 23:,} bytes read per token" in figures
    same = re.search(r"the first (\d+) of 30 tokens are the same", figures)
    assert same is not None
    assert int(same[1]) >= (30 if dtype == "float32" else 3)


def test_progress_is_shown_on_a_terminal_and_wiped_before_the_text() -> None:
    pty = pytest.importorskip("pty")
    terminal, side = pty.openpty()
    command = [sys.executable, str(EXAMPLES / "generate.py"), *SMALL, "--tokens", "5", "--chunk", "40"]
    try:
        subprocess.run(command, stdout=side, stderr=side, stdin=subprocess.DEVNULL, timeout=120, check=True)
        shown = os.read(terminal, 1 << 16).decode()
    finally:
        os.close(side)
        os.close(terminal)
    progress, text = shown.rsplit("\r\033[K", 1)
    assert progress == "\r\033[Kprompt: 40 of 69 tokens"
    assert text.startswith("Attention is all you need")
    assert "tokens per second" in text


def test_a_difference_is_an_error(example: Any, model: Any, prompt: Any) -> None:
    found = written(example, model, prompt, 5)
    assert example.compare(found, model, prompt, example.Chooser(1.0), "float32") == 0
    found[3] ^= 1
    assert example.compare(found, model, prompt, example.Chooser(1.0), "float32") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("--heads", "7"),
        ("--heads", "8", "--kv-heads", "3"),
        ("--prompt", ""),
        ("--tokens", "0"),
        ("--tokens", "2048"),
        ("--chunk", "0"),
        ("--transformers", "--kv-heads", "2"),
    ],
)
def test_impossible_options(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.returncode == 2
    assert "generate.py: error:" in result.stderr


def test_against_transformers(load_example: Any, example: Any, prompt: Any) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    decoder = load_example("decoder")
    config = decoder.Config(layers=3, width=96, heads=4, kv_heads=4)
    peer = decoder.transformers_model(config)
    assert isinstance(peer, transformers.GPT2LMHeadModel)
    model = decoder.Decoder(config, decoder.transformers_weights(peer))
    ids = torch.from_numpy(prompt[None])
    with torch.no_grad():
        wanted = peer(ids).logits.numpy()
    assert np.max(abs(model(prompt[None]) - wanted)) <= 1e-4
    never = [i for i in range(decoder.VOCABULARY) if i not in example.PRINTABLE]
    greedy = peer.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False, suppress_tokens=never
    )
    assert written(example, model, prompt, 32, temperature=0) == greedy[0, len(prompt) :].tolist()
