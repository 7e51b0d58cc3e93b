"""The example that trains the Transformer of 2017: number words, gradients, checkpoints, and what it learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

TINY = ("--layers", "1", "--width", "16", "--heads", "2", "--batch", "4", "--test", "20", "--show", "2")
SOURCES = [[5, 6, 7, 0], [8, 0], [9, 10, 11, 12, 5, 0]]  # of different lengths, so that there is padding
TARGETS = [[6, 0], [7, 8, 9, 10, 0], [11, 12, 0]]
VOCABULARY = 14

KNOWN = {
    0: ("zero", "zero"),
    1: ("one", "um"),
    14: ("fourteen", "catorze"),
    17: ("seventeen", "dezessete"),
    21: ("twenty-one", "vinte e um"),
    80: ("eighty", "oitenta"),
    100: ("one hundred", "cem"),
    101: ("one hundred and one", "cento e um"),
    342: ("three hundred and forty-two", "trezentos e quarenta e dois"),
    1000: ("one thousand", "mil"),
    1001: ("one thousand and one", "mil e um"),
    1100: ("one thousand one hundred", "mil e cem"),
    1892: ("one thousand eight hundred and ninety-two", "mil oitocentos e noventa e dois"),
    2500: ("two thousand five hundred", "dois mil e quinhentos"),
    11_000: ("eleven thousand", "onze mil"),
    100_100: ("one hundred thousand one hundred", "cem mil e cem"),
    293_572: (
        "two hundred and ninety-three thousand five hundred and seventy-two",
        "duzentos e noventa e três mil quinhentos e setenta e dois",
    ),
    1_000_000: ("one million", "um milhão"),
    1_000_016: ("one million and sixteen", "um milhão e dezesseis"),
    1_001_000: ("one million one thousand", "um milhão e mil"),
    2_200_000: ("two million two hundred thousand", "dois milhões e duzentos mil"),
    2_200_001: ("two million two hundred thousand and one", "dois milhões duzentos mil e um"),
    31_015_900: ("thirty-one million fifteen thousand nine hundred", "trinta e um milhões quinze mil e novecentos"),
    999_999_999: (
        "nine hundred and ninety-nine million nine hundred and ninety-nine thousand nine hundred and ninety-nine",
        "novecentos e noventa e nove milhões novecentos e noventa e nove mil novecentos e noventa e nove",
    ),
}


@pytest.fixture(scope="module")
def example(load_example: Any) -> Any:
    return load_example("train_translation")


@pytest.fixture(scope="module")
def training(load_example: Any) -> Any:
    return load_example("transformer_training")


@pytest.mark.parametrize("number", KNOWN)
def test_known_numbers_in_words(load_example: Any, number: int) -> None:
    number_words = load_example("number_words")
    assert (number_words.english(number), number_words.portuguese(number)) == KNOWN[number]


def test_no_two_numbers_have_the_same_words(example: Any) -> None:
    drawn = {*example.numbers(np.random.default_rng(0), 5000), *range(3000)}
    for language in (example.english, example.portuguese):
        assert len({language(n) for n in drawn}) == len(drawn)
        assert max(len(example.tokens(language, n)) for n in drawn) <= example.LONGEST
    for n in (-1, 10**9):
        with pytest.raises(ValueError, match=f"{n} is not within 0 to 999999999"):
            example.english(n)


def small_model(training: Any) -> tuple[Any, dict[str, Any]]:
    config = training.Config("marian", layers=2, width=16, heads=2)
    weights = training.random_weights(config, VOCABULARY)
    rng = np.random.default_rng(1)  # norms of ones and biases of zeros would hide mistakes
    return config, {name: x + 0.1 * rng.standard_normal(x.shape) * (x.ndim == 1) for name, x in weights.items()}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_gradients_are_slopes_of_the_loss(training: Any, smoothing: float) -> None:
    config, weights = small_model(training)
    _, gradients = training.loss_and_gradients(config, weights, SOURCES, TARGETS, smoothing)
    assert gradients.keys() == weights.keys()
    rng, step = np.random.default_rng(2), 1e-5
    for name, weight in weights.items():
        place = (5, 3) if name == "model.shared.weight" else tuple(rng.integers(0, n) for n in weight.shape)
        found = []
        for sign in (1, -1):
            changed = weight.copy()
            changed[place] += sign * step
            changed = weights | {name: changed}
            found.append(training.loss_and_gradients(config, changed, SOURCES, TARGETS, smoothing)[0])
        assert gradients[name][place] == pytest.approx((found[0] - found[1]) / (2 * step), abs=1e-8), name


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_and_gradients_are_those_of_transformers_in_pytorch(
    training: Any, load_example: Any, smoothing: float
) -> None:
    torch = pytest.importorskip("torch", reason="needs torch")
    pytest.importorskip("transformers", reason="needs transformers")
    transformer = load_example("transformer")
    config, weights = small_model(training)
    loss, gradients = training.loss_and_gradients(config, weights, SOURCES, TARGETS, smoothing)
    peer = transformer.transformers_model(config).double()
    peer.resize_token_embeddings(VOCABULARY, mean_resizing=False)
    tensors = {name: torch.from_numpy(x) for name, x in weights.items()}
    named = dict(peer.named_parameters())
    assert named.keys() - weights.keys() == {name for name in named if "embed_positions" in name}
    with torch.no_grad():
        peer.final_logits_bias.zero_()
        for name, x in tensors.items():
            named[name].copy_(x)
    ids, lengths = transformer.padded(SOURCES)
    wanted, counts = transformer.padded(TARGETS)
    given = np.pad(wanted[:, :-1], ((0, 0), (1, 0)), constant_values=transformer.START)
    seen, real = (np.arange(x.shape[1]) < n[:, None] for x, n in ((ids, lengths), (wanted, counts)))
    source = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(seen).long()}
    logits = peer(**source, decoder_input_ids=torch.from_numpy(given)).logits[torch.from_numpy(real)]
    other = torch.nn.functional.cross_entropy(logits, torch.from_numpy(wanted[real]), label_smoothing=smoothing)
    other.backward()
    assert loss == pytest.approx(other.item(), abs=1e-7)  # transformers' positions are float32
    for name, gradient in gradients.items():
        assert np.max(abs(gradient - named[name].grad.numpy())) <= 1e-6, name


def test_a_resumed_run_equals_one_without_a_pause(example: Any, tmp_path: Path, capsys: Any) -> None:
    whole, halves = tmp_path / "whole.npz", tmp_path / "halves.npz"
    common = [*TINY, "--picture", str(tmp_path / "loss.png")]
    assert example.main([*common, "--steps", "6", "--checkpoint", str(whole)]) == 0
    # The schedule does not depend on the number of steps, so that a shorter run is the beginning of a longer one.
    assert example.main([*common, "--steps", "3", "--checkpoint", str(halves)]) == 0
    assert example.main([*common, "--steps", "6", "--checkpoint", str(halves), "--resume"]) == 0
    with np.load(whole) as one, np.load(halves) as other:
        assert one.files == other.files
        assert all(np.array_equal(one[name], other[name]) for name in one.files)
        assert len(one["losses"]) == 6
    assert "step 6 of 6" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="is of a run with --width 16, not 32"):
        example.main([*common, "--width", "32", "--checkpoint", str(halves), "--resume"])


def test_it_learns(example: Any, tmp_path: Path, capsys: Any) -> None:
    kept = tmp_path / "kept.npz"
    command = [*TINY, "--width", "32", "--steps", "120", "--warm-up", "60", "--smoothing", "0.1"]
    assert example.main([*command, "--picture", str(tmp_path / "loss.png"), "--checkpoint", str(kept)]) == 0
    with np.load(kept) as file:
        losses = file["losses"]
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:10])
    lines = capsys.readouterr().out.splitlines()
    assert "of 20 numbers that it never saw translated exactly" in lines[-1]
    assert sum(" -> " in line for line in lines) == 2


def test_the_training_leaves_out_the_numbers_of_the_test(example: Any, monkeypatch: Any) -> None:
    args = example.parse([*TINY, "--batch", "50"])
    kept = example.held_out(args.seed, 2000)
    assert len(set(kept)) == 2000
    assert min(kept) >= 100
    shown: list[list[int]] = []
    monkeypatch.setattr(example, "loss_and_gradients", lambda _, __, sources, *___: shown.append(sources) or (0.0, {}))
    step = example.step_on(None, kept, args)
    for number in range(40):
        step({}, number)
    known = {tuple(example.tokens(example.english, n)) for n in kept}
    seen = {tuple(source) for sources in shown for source in sources}
    assert {len(sources) for sources in shown} == {50}
    assert len(seen) > 1000
    assert not seen & known
    drawn = (example.numbers(np.random.default_rng([args.seed, number]), 50) for number in range(40))
    assert {n for numbers in drawn for n in numbers} & set(kept), "without leaving them out, some would be seen"


def test_decoding_with_caches_equals_decoding_without(example: Any, training: Any, load_example: Any) -> None:
    transformer = load_example("transformer")
    config = training.Config("marian", layers=2, width=32, heads=2)
    weights = training.random_weights(config, len(example.WORDS), seed=4)
    model = transformer.Transformer(config, {**weights, "final_logits_bias": np.zeros(1, np.float32)})
    sources = [example.tokens(example.english, n) for n in (7, 1234, 987654321)]
    rows = transformer.generate(model, sources, 10, cached=False, repeats=True)
    words = [" ".join(example.WORDS[i] for i in row if i != transformer.END) for row in rows]
    assert any(len(set(row)) < len(row) for row in rows)
    translated = example.translate(config, weights, [7, 1234, 987654321])
    assert [text.split()[:10] for text in translated] == [text.split() for text in words]


@pytest.mark.parametrize("options", ["--smoothing 1", "--width 30", "--width 9 --heads 3", "--steps 0", "--resume"])
def test_impossible_options(example: Any, capsys: Any, options: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        example.main(options.split())
    assert "error:" in capsys.readouterr().err
