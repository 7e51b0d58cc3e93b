"""Pictures of attention weights."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

from selfattn import viz

WEIGHTS = np.array([[1.0, 0.0, 0.0], [0.25, 0.75, 0.0], [0.5, 0.25, 0.25]])
TOKENS = ["he", "went", "north"]


@pytest.fixture
def figure() -> Any:
    return pytest.importorskip("matplotlib.figure").Figure()


def test_rows_are_queries_from_the_top(figure: Any) -> None:
    ax = figure.add_subplot()
    assert viz.heatmap(WEIGHTS, TOKENS, ax=ax) is ax
    assert np.array_equal(ax.images[0].get_array(), WEIGHTS)
    bottom, top = ax.get_ylim()
    assert bottom > top
    assert [label.get_text() for label in ax.get_yticklabels()] == TOKENS
    assert [label.get_text() for label in ax.get_xticklabels()] == TOKENS
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("key", "query")
    assert ax.images[0].norm.vmin == 0


def test_keys_may_have_their_own_names(figure: Any) -> None:
    ax = viz.heatmap(WEIGHTS[:2], TOKENS[:2], key_tokens=["a", "b", "c"], ax=figure.add_subplot(), title="mine")
    assert [label.get_text() for label in ax.get_xticklabels()] == ["a", "b", "c"]
    assert ax.get_title() == "mine"


def test_hidden_cells_differ_from_zero(figure: Any) -> None:
    mask = np.tril(np.ones((3, 3), bool))
    ax = viz.heatmap(WEIGHTS, TOKENS, ax=figure.add_subplot(), mask=mask)
    assert np.array_equal(np.ma.getmaskarray(ax.images[0].get_array()), ~mask)
    assert len(ax.patches) == 3
    assert all(patch.get_hatch() for patch in ax.patches)


def test_heads(figure: Any) -> None:
    heads = np.stack([WEIGHTS, WEIGHTS[:, ::-1]])
    ax = viz.heatmap(heads, ax=figure.add_subplot(), head="mean")
    assert np.allclose(ax.images[0].get_array(), heads.mean(axis=0))
    assert "mean" in ax.get_title()
    assert np.array_equal(viz.heatmap(heads, ax=figure.add_subplot(), head=1).images[0].get_array(), heads[1])
    for bad in (None, 2, "all"):
        with pytest.raises(ValueError, match=r"heatmap: (head is 2|weights has 2 heads)"):
            viz.heatmap(heads, ax=figure.add_subplot(), head=bad)


def test_long_sequences_show_the_largest_of_each_group(figure: Any) -> None:
    weights = np.zeros((1100, 700))
    weights[1099, 699] = 0.5
    ax = viz.heatmap(weights, ax=figure.add_subplot())
    shown = ax.images[0].get_array()
    assert shown.shape == (367, 350)
    assert shown[366, 349] == 0.5
    assert "3 × 2" in ax.get_title()


def test_makes_its_own_figure_and_leaves_pyplot_alone() -> None:
    pytest.importorskip("matplotlib")
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    ax = viz.heatmap(WEIGHTS, log=True)
    assert ax.figure is not None
    assert dict(mpl.rcParams) == before
    if "matplotlib.pyplot" in sys.modules:
        assert sys.modules["matplotlib.pyplot"].get_fignums() == []


@pytest.mark.parametrize(
    ("arguments", "exception", "message"),
    [
        ({"weights": np.zeros(3)}, ValueError, r"weights has shape \(3,\)"),
        ({"tokens": ["a"]}, ValueError, "tokens has 1 entries, but weights has 3"),
        ({"key_tokens": ["a"]}, ValueError, "key_tokens has 1 entries"),
        ({"mask": np.zeros((3, 3))}, TypeError, "mask has dtype float64"),
        ({"mask": np.zeros((2, 3), bool)}, ValueError, r"mask has shape \(2, 3\)"),
    ],
)
def test_errors(figure: Any, arguments: Any, exception: Any, message: str) -> None:
    with pytest.raises(exception, match="heatmap: " + message):
        viz.heatmap(**{"weights": WEIGHTS, "ax": figure.add_subplot(), **arguments})


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "selfattn\[viz\]"'):
        viz.heatmap(WEIGHTS)


def test_text() -> None:
    lines = viz.text(WEIGHTS, TOKENS).splitlines()
    assert lines[0] == "attention weights 3 × 3, float64; first token 58 %, row sums within 0.0e+00 of 1"
    assert lines[1] == "   he │█  │  0.0 bit"
    assert lines[2].startswith(" went │░▓ │  0.8 bit")
    assert lines[3] == "north │▒░░│  1.5 bit"
    assert "head mean" in viz.text(WEIGHTS[None].repeat(2, 0), head="mean")
    wide = viz.text(np.full((2, 1000), 1e-3), width=60).splitlines()
    assert max(map(len, wide[1:])) <= 60
    assert "largest of" in wide[0]
    assert viz.text(np.zeros((0, 4))).count("\n") == 0
