"""Pictures of attention weights."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from pathlib import Path
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


@pytest.mark.parametrize(
    ("arguments", "exception", "message"),
    [
        ({"weights": np.zeros((3, 3), "U1")}, TypeError, "weights has dtype <U1, but real numbers are needed"),
        ({"tokens": 3}, TypeError, "tokens is 3, but a sequence of strings is needed"),
        ({"head": 1}, ValueError, r"head is 1, but weights has shape \(3, 3\), without heads"),
        ({"weights": WEIGHTS[None].repeat(2, 0), "head": True}, ValueError, "weights has 2 heads, but head is True"),
        ({"title": 7}, TypeError, "title is 7, but a string is needed"),
        ({"log": 1}, TypeError, "log is 1, but True or False is needed"),
        ({"vmax": "1"}, TypeError, "vmax is '1', but a real number is needed"),
        ({"vmax": 0.0}, ValueError, "vmax is 0.0, but it must be greater than 0"),
        ({"power": -1}, ValueError, "power is -1.0, but it must be greater than 0"),
        ({"power": 0.5, "log": True}, ValueError, "power is 0.5, but log is True: choose one scale"),
        ({"mask": np.zeros((2, 3), bool)}, ValueError, r"mask has shape \(2, 3\)"),
        ({"skip": "he"}, TypeError, "skip is 'he', but a sequence of strings is needed"),
        ({"skip": ["he"]}, ValueError, "skip has 'he', which is none of the tokens"),
        ({"tokens": TOKENS, "skip": TOKENS}, ValueError, r"skip is \[.*\], which leaves no query or no key to draw"),
    ],
)
def test_all_refuse_the_same(arguments: Any, exception: Any, message: str) -> None:
    pytest.importorskip("matplotlib")
    lines = [] if {"log", "vmax", "power"} & {*arguments} else [viz.head_view]
    for draw in (viz.heatmap, viz.text, *lines):
        with pytest.raises(exception, match=f"{draw.__name__}: {message}"):
            draw(**{"weights": WEIGHTS, **arguments})
    with pytest.raises(ValueError, match="text: width is 0, but it must be at least 1"):
        viz.text(WEIGHTS, width=0)


STRANGE = ["$$", "US$1 and US$2", "\x1b[2J\n\t\0\x9b", "\u202egnorw\u200b\ufeff\ud800\u2028"]
SHORT = ["$$", "US$1 and US$2", r"\x1b[2J\n\t\x00\x9b", r"\u202egnorw\u200b\u…"]  # 20 columns at most


def test_tokens_are_shown_literally(figure: Any, tmp_path: Path) -> None:
    ax = viz.heatmap(np.eye(4), STRANGE, ax=figure.add_subplot(), title="$$ \x1b\nof $x$")
    figure.savefig(tmp_path / "picture.png")
    assert ax.get_title() == "$$ \\x1b\nof $x$"
    for labels in (ax.get_xticklabels(), ax.get_yticklabels()):
        assert [label.get_text() for label in labels] == SHORT
        assert not any(label.get_parse_math() or label.get_usetex() for label in labels)
    assert not ax.title.get_parse_math()


def test_text_has_no_control_characters() -> None:
    lines = viz.text(np.eye(4), STRANGE, title="\x1b]0;\a\n").split("\n")
    assert lines[0].startswith(r"\x1b]0;\x07\n 4 × 4")
    assert all(line.isprintable() for line in lines)
    assert [line.split(" │")[0].strip() for line in lines[1:]] == SHORT


def test_text_aligns_by_width() -> None:
    tokens = ["去年挪威去年挪威去年挪威", "e\u0301te\u0301", "ｗ", "a" * 30]
    lines = viz.text(np.eye(4), tokens).splitlines()[1:]
    assert [line.split(" │")[0] for line in lines] == [
        " 去年挪威去年挪威去…",
        " " * 17 + "e\u0301te\u0301",
        " " * 18 + "ｗ",
        "a" * 19 + "…",
    ]


def test_long_tokens_leave_room_for_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for long in ("a" * 300, "W" * 300):
        ax = viz.heatmap(np.eye(2), [long, "b"])
        ax.figure.savefig(tmp_path / "picture.png")  # warns where there is no room
        assert ax.get_window_extent().height > 100


@pytest.mark.parametrize("largest", [1e308, 1.7e308, 1e-310, -1.7e308])
def test_weights_of_any_size(figure: Any, largest: float) -> None:
    heads = np.full((3, 2, 2), largest)
    for scale in ({}, {"log": True}, {"power": 0.3}, {"vmax": 1e-320}, {"vmax": 1e308}):
        with np.errstate(all="raise"):
            assert viz.text(heads, head="mean", **scale).count("\n") == 2
            viz.heatmap(heads, head="mean", ax=figure.add_subplot(), **scale)
    for options in ({}, {"head": "mean"}, {"skip": ["a"]}, {"least": 1e-300}):
        with np.errstate(all="raise"):
            ET.fromstring(viz.head_view(heads, ["a", "b"], **options).svg)


def test_weights_of_other_libraries(figure: Any) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    expected = viz.text(WEIGHTS, TOKENS).splitlines()[1:]
    for name, weights in {
        "float16": WEIGHTS.astype(np.float16),
        "bfloat16": WEIGHTS.astype(ml_dtypes.bfloat16),
    }.items():
        lines = viz.text(weights, TOKENS).splitlines()
        assert f", {name}; " in lines[0]
        assert lines[1:] == expected
        assert np.array_equal(viz.heatmap(weights, ax=figure.add_subplot()).images[0].get_array(), WEIGHTS)
    torch = pytest.importorskip("torch")
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        tensor = torch.tensor(WEIGHTS, dtype=dtype)
        assert viz.text(tensor, TOKENS, mask=torch.ones(3, dtype=torch.bool)).splitlines()[1:] == expected
        assert np.array_equal(viz.heatmap(tensor, ax=figure.add_subplot()).images[0].get_array(), WEIGHTS)


def test_nan_is_seen(figure: Any) -> None:
    weights = WEIGHTS.copy()
    weights[1] = np.nan
    weights[2, 0] = np.inf
    mask = np.array([[True, False, False], [True, True, False], [True, True, True]])
    lines = viz.text(weights, TOKENS, mask=mask).splitlines()
    assert [line.split("│")[1] for line in lines[1:]] == ["█··", "!!·", "!░░"]
    assert lines[0].endswith("; · is hidden; ! is NaN or infinite (3 weights)")
    assert "nan %" not in lines[0]
    ax = viz.heatmap(weights, TOKENS, mask=mask, ax=figure.add_subplot())
    assert ax.get_title().endswith("red: NaN or infinite")
    strange = ~np.ma.getmaskarray(ax.images[1].get_array())
    assert np.array_equal(strange, ~np.isfinite(weights) & mask)
    red, grey = ax.images[1].cmap(0.5), ax.images[0].cmap.get_bad()
    assert not np.array_equal(red, grey)
    assert ax.images[0].norm.vmax == 1
    assert len(viz.heatmap(WEIGHTS, ax=figure.add_subplot()).images) == 1


def test_text_takes_the_scale_of_heatmap() -> None:
    def shades(**options: Any) -> list[str]:
        return [
            line.split("│")[1] for line in viz.text([[1.0, 0.1, 1e-2, 1e-3, 1e-4, 0.0]], **options).splitlines()[1:]
        ]

    assert shades() == ["█░░░░ "]
    assert shades(log=True) == ["█▓▒░  "]
    assert shades(vmax=4.0) == ["░░░░░ "]
    assert viz.text(WEIGHTS, title="layer 3").startswith("layer 3 3 × 3, float64; first")


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


def test_tokens_can_be_left_out(figure: Any) -> None:
    tokens = ["[CLS]", "went", "north"]
    ax = viz.heatmap(WEIGHTS, tokens, ax=figure.add_subplot(), skip=["[CLS]"], mask=np.tri(3, dtype=bool))
    assert np.array_equal(ax.images[0].get_array().filled(-1), [[0.75, -1], [0.25, 0.25]])
    assert ax.images[0].norm.vmax == 0.75  # not 1, the weight of [CLS]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["went", "north"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["went", "north"]
    assert ax.get_title() == "attention weights\nwithout [CLS] (38 % of the weight)"
    lines = viz.text(WEIGHTS, tokens, skip=["[CLS]"]).splitlines()
    assert lines[0].endswith("first token 38 %, row sums within 0.0e+00 of 1; without [CLS] (38 % of the weight)")
    assert lines[1:] == [" went │█ │  0.8 bit", "north │▒▒│  1.5 bit"]  # the entropies of complete rows
    crossed = viz.heatmap(WEIGHTS, TOKENS, key_tokens=["a", "b", "a"], ax=figure.add_subplot(), skip=["a"])
    assert np.array_equal(crossed.images[0].get_array(), WEIGHTS[:, 1:2])


def test_power_lifts_small_weights(figure: Any) -> None:
    ax = viz.heatmap(WEIGHTS, ax=figure.add_subplot(), power=0.5)
    assert np.allclose(ax.images[0].norm(WEIGHTS), WEIGHTS**0.5)
    labels = [label.get_text() for label in ax.figure.axes[1].get_yticklabels()]
    assert labels == ["0", "0.04", "0.16", "0.36", "0.64", "1"]
    assert viz.text([[1.0, 0.3, 0.05]], power=0.5).splitlines()[1].split("│")[1] == "█▓░"
    assert viz.text([[1.0, 0.3, 0.05]]).splitlines()[1].split("│")[1] == "█▒░"


def test_values_can_be_read(figure: Any) -> None:
    ax = viz.heatmap(WEIGHTS, ax=figure.add_subplot(), values=True, mask=np.tri(3, dtype=bool))
    written = {text.get_position(): text for text in ax.texts}  # (key, query)
    assert {place: text.get_text() for place, text in written.items()} == {
        (0, 0): "1", (0, 1): ".25", (1, 1): ".75", (0, 2): ".50", (1, 2): ".25", (2, 2): ".25"
    }  # fmt: skip
    assert (written[0, 0].get_color(), written[0, 1].get_color()) == ("black", "white")
    assert len(viz.heatmap(WEIGHTS, ax=figure.add_subplot()).texts) == 0
    large = viz.heatmap(np.full((50, 64), 0.25), values=True)
    large.figure.draw_without_rendering()
    cell = large.get_window_extent().width / 64
    assert max(text.get_window_extent().width for text in large.texts) < cell
    assert min(text.get_fontsize() for text in large.texts) >= 6
    with pytest.raises(ValueError, match="heatmap: values is True, but there are 1 × 65 weights to draw: at most 64"):
        viz.heatmap(np.zeros((1, 65)), values=True)
    strange = viz.heatmap([[np.nan, -0.5, 12.0]], ax=figure.add_subplot(), values=True)
    assert [text.get_text() for text in strange.texts] == ["nan", "-0.5", "1e+01"]
