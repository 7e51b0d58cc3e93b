"""The example of an encoder-decoder Transformer, against the models of transformers that its weights come from."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from places import EXAMPLES

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

PROGRAM = EXAMPLES / "transformer.py"
LENGTHS = (9, 1, 23, 4)
TOKENS = 30


@pytest.fixture(scope="module")
def example(load_example: Callable[[str], ModuleType]) -> Any:
    return load_example("transformer")


@pytest.fixture(scope="module", params=["marian-relu", "marian-gelu", "bart-gelu"])
def config(request: pytest.FixtureRequest, example: Any) -> Any:
    kind, activation = request.param.split("-")
    return example.Config(kind, layers=2, width=64, heads=4, activation=activation)


@pytest.fixture(scope="module")
def peer(example: Any, config: Any) -> Any:
    return example.transformers_model(config, seed=3)


@pytest.fixture(scope="module")
def model(example: Any, config: Any, peer: Any) -> Any:
    return example.Transformer(config, example.transformers_weights(peer))


@pytest.fixture(scope="module")
def sources(example: Any) -> list[list[int]]:
    rng = np.random.default_rng(11)
    return [rng.integers(3, example.VOCABULARY, length).tolist() for length in LENGTHS]


def tensors(example: Any, sources: list[list[int]]) -> dict[str, Any]:
    ids, lengths = example.padded(sources)
    real = np.arange(ids.shape[1]) < lengths[:, None]
    return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(real).long()}


@pytest.fixture(scope="module")
def targets(example: Any) -> Any:
    return np.random.default_rng(12).integers(3, example.VOCABULARY, (len(LENGTHS), TOKENS))


@pytest.fixture(scope="module")
def wanted(example: Any, peer: Any, sources: Any, targets: Any) -> Any:
    """The result of transformers for a batch of padded sources, with eager attention."""
    assert peer.config._attn_implementation == "eager"
    with torch.no_grad():
        return peer(**tensors(example, sources), decoder_input_ids=torch.from_numpy(targets))


def test_the_encoder(example: Any, model: Any, sources: Any, wanted: Any) -> None:
    ids, lengths = example.padded(sources)
    found, expected = model.encode(ids, lengths), wanted.encoder_last_hidden_state.numpy()
    for row, other, length in zip(found, expected, lengths, strict=True):
        assert np.max(abs(row[:length] - other[:length])) <= 1e-5


@pytest.mark.parametrize("chunk", [None, TOKENS, 7, 1], ids=lambda n: "no-cache" if n is None else f"chunks-of-{n}")
def test_the_logits(example: Any, model: Any, sources: Any, targets: Any, wanted: Any, chunk: int | None) -> None:
    ids, lengths = example.padded(sources)
    state = model.start(model.encode(ids, lengths), lengths, None if chunk is None else TOKENS)
    parts = [model.decode(targets[:, i : i + (chunk or TOKENS)], state) for i in range(0, TOKENS, chunk or TOKENS)]
    expected = wanted.logits.numpy()
    assert np.std(expected) > 0.5
    assert np.max(abs(np.concatenate(parts, axis=1) - expected)) <= 1e-4


def test_padding_changes_nothing(example: Any, model: Any, sources: Any, targets: Any) -> None:
    ids, lengths = example.padded(sources)
    together = model.decode(targets, model.start(model.encode(ids, lengths), lengths, TOKENS))
    for source, target, logits in zip(sources, targets, together, strict=True):
        one, length = example.padded([source])
        alone = model.decode(target[None], model.start(model.encode(one, length), length, TOKENS))
        assert np.max(abs(alone[0] - logits)) <= 1e-5


def test_the_same_tokens_as_transformers_and_without_caches(example: Any, model: Any, peer: Any, sources: Any) -> None:
    def generated(end: int) -> list[list[int]]:
        options = {"max_new_tokens": TOKENS, "do_sample": False, "num_beams": 1, "no_repeat_ngram_size": 1}
        rows = peer.generate(**tensors(example, sources), **options, eos_token_id=end)[:, 1:].tolist()
        return [example.until(end, row) for row in rows]

    expected = generated(example.END)
    assert example.generate(model, sources, TOKENS) == expected
    assert example.generate(model, sources, TOKENS, cached=False) == expected
    assert len({tuple(row) for row in expected}) == len(sources)
    # If the end token comes at different steps, rows end at different steps.
    end = next(token for token in expected[0][3:] if sum(token in row for row in expected) > 1)
    shorter = generated(end)
    assert len({len(row) for row in shorter}) > 1
    assert example.generate(model, sources, TOKENS, end) == shorter
    assert example.generate(model, sources, TOKENS, end, cached=False) == shorter


def test_the_last_end_ends_all(example: Any, model: Any, sources: Any, monkeypatch: Any) -> None:
    (row,) = example.generate(model, sources[:1], TOKENS)
    steps, decode = [], model.decode
    monkeypatch.setattr(model, "decode", lambda ids, state: steps.append(ids.shape) or decode(ids, state))
    assert example.generate(model, sources[:1], TOKENS, end=row[4]) == [row[:5]]
    assert steps == [(1, 1)] * 5


def test_the_tokens_depend_on_the_source(example: Any, model: Any, sources: Any) -> None:
    other = [[*source[:-1], source[-1] % 400 + 50] for source in sources]
    for one, two in zip(example.generate(model, sources, TOKENS), example.generate(model, other, TOKENS), strict=True):
        assert one != two


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PROGRAM), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_program() -> None:
    result = run("--check", "--layers", "1", "--width", "32", "--heads", "2", "--sources", "3", "--tokens", "10")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert [line.split(":")[0] for line in lines[::3]] == ["marian", "bart"]
    for line in lines[1::3]:
        assert 0 < float(line.split()[-1]) <= 1e-4
    assert lines[2::3] == ["  3 of 3 results the same as transformers', with and without caches"] * 2


def test_the_program_writes_tokens(example: Any, capsys: Any) -> None:
    assert example.main(["--layers", "1", "--width", "32", "--sources", "2", "--tokens", "5", "--kind", "bart"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("bart: [") and line.count("]") == 2 for line in lines)


def test_a_difference_is_an_error(example: Any, capsys: Any, monkeypatch: Any) -> None:
    small = ["--check", "--layers", "1", "--width", "32", "--sources", "2", "--tokens", "5", "--kind", "marian"]
    monkeypatch.setattr(sys.modules["transformer_layers"], "NORM_EPSILON", 1e-2)
    assert example.main(small) == 1
    assert "largest difference from transformers" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [("--layers", "0"), ("--width", "30"), ("--tokens", "512")])
def test_impossible_options(example: Any, capsys: Any, arguments: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit, match="2"):
        example.main(arguments)
    assert "error:" in capsys.readouterr().err


def test_a_missing_package_is_named(example: Any, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert example.main(["--check"]) == 1
    assert "transformers is missing: pip install torch transformers" in capsys.readouterr().err
