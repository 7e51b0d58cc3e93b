"""Lines between tokens: what is drawn, and that no token becomes markup."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from selfattn import viz

WEIGHTS = np.array([[1.0, 0.0, 0.0], [0.25, 0.75, 0.0], [0.5, 0.25, 0.25]])
TOKENS = ["he", "went", "north"]
SVG = "{http://www.w3.org/2000/svg}"
MARKUP = ["<b>x</b>", "</svg><b>", "&lt;&amp;", "\"'><i a='", "]]>-->", "\0\x1b\ud800\ufffe"]
SHOWN = [*MARKUP[:5], r"\x00\x1b\ud800\ufffe"]
TITLE = "</title></style><script>document.body.id = 'ran'</script>"


def tree(view: viz.HeadView) -> ET.Element:
    return ET.fromstring(view.svg)


def tips(root: ET.Element) -> list[str]:
    return [line.findtext(SVG + "title") or "" for group in queries(root) for line in group.iter(SVG + "line")]


def queries(root: ET.Element) -> list[ET.Element]:
    return [group for group in root.iter(SVG + "g") if group.get("class") == "query"]


def texts(root: ET.Element) -> list[str]:
    return [text.text or "" for text in root.iter(SVG + "text")]


def test_lines_join_the_tokens_that_the_weights_are_of() -> None:
    root = tree(viz.head_view(WEIGHTS, TOKENS))
    assert sorted(tips(root)) == [
        "he → he: 1", "north → he: 0.5", "north → north: 0.25", "north → went: 0.25", "went → he: 0.25",
        "went → went: 0.75",
    ]  # fmt: skip
    places: dict[str, list[float]] = {}
    for text in root.iter(SVG + "text"):
        places.setdefault(text.text or "", []).append(float(text.get("y", "nan")))
    for group in queries(root):
        for line in group.iter(SVG + "line"):
            query, key = re.match(r"(\w+) → (\w+)", line.findtext(SVG + "title") or "").groups()  # type: ignore[union-attr]
            assert abs(float(line.get("y1", "nan")) - places[query][0]) < 9
            assert abs(float(line.get("y2", "nan")) - places[key][0]) < 9


def test_larger_weights_are_wider_and_darker() -> None:
    lines = {line.findtext(SVG + "title"): line for line in tree(viz.head_view(WEIGHTS, TOKENS)).iter(SVG + "line")}
    small, large = lines["went → he: 0.25"], lines["went → went: 0.75"]
    for how in ("stroke-width", "stroke-opacity"):
        assert float(small.get(how, "nan")) < float(large.get(how, "nan"))


def test_small_and_hidden_weights_have_no_line() -> None:
    mask = np.array([True, False, True])
    root = tree(viz.head_view(WEIGHTS, TOKENS, mask=mask, least=0.5))
    assert sorted(tips(root)) == ["he → he: 1", "north → he: 0.5"]
    assert "weights below 0.5 have no line" in texts(root)


def test_every_head_has_a_panel_and_all_have_one_scale() -> None:
    heads = np.stack([WEIGHTS, WEIGHTS / 2, WEIGHTS[::-1], WEIGHTS])
    view = viz.head_view(heads, TOKENS, skip=["he"])
    assert repr(view) == "<HeadView: 4 heads, 2 queries, 2 keys>"
    root = tree(view)
    assert [text for text in texts(root) if text.startswith("head ")] == [f"head {i}" for i in range(4)]
    assert "without he" in texts(root)
    panels = [group for group in root.iter(SVG + "g") if group.get("class") == "panel"]
    assert len({panel.get("transform") for panel in panels}) == 4
    widths = [max(float(line.get("stroke-width", "nan")) for line in panel.iter(SVG + "line")) for panel in panels[:2]]
    assert widths[0] > widths[1]
    one = viz.head_view(heads, TOKENS, head=1)
    assert repr(one) == "<HeadView: 1 head, 3 queries, 3 keys>"
    assert "head 1" in texts(tree(one))
    assert "head mean" in texts(tree(viz.head_view(heads, head="mean")))


def test_nan_is_seen() -> None:
    weights = WEIGHTS.copy()
    weights[1, 2] = np.nan
    root = tree(viz.head_view(weights, TOKENS))
    assert [line.findtext(SVG + "title") for line in root.iter(SVG + "line") if line.get("stroke-dasharray")] == [
        "went → north: nan"
    ]
    assert "dashed: NaN or infinite weights (1)" in texts(root)
    assert viz.head_view(np.full((2, 2), np.nan)).svg
    assert viz.head_view(np.zeros((2, 2))).svg


def test_everything_is_inside_the_picture() -> None:
    root = tree(viz.head_view(np.full((5, 7, 7), 0.2), ["W" * 30] * 7, title="a long title " * 20))
    width, height = (float(root.get(name, "nan")) for name in ("width", "height"))
    for panel in root.iter(SVG + "g"):
        if panel.get("class") == "panel":
            x, y = map(float, re.findall(r"[\d.]+", panel.get("transform", "")))
            for text in panel.iter(SVG + "text"):
                end = text.get("style") == "text-anchor:end"
                left = x + float(text.get("x", "nan")) - 7.23 * len(text.text or "") * end
                assert left >= 0
                assert left + 7.23 * len(text.text or "") <= width
                assert y + float(text.get("y", "nan")) <= height
    assert 7.23 * len("a long title " * 20) <= width


@pytest.mark.parametrize(
    ("arguments", "exception", "message"),
    [
        ({"weights": np.zeros((33, 2, 2))}, ValueError, "weights has 33 heads, but at most 32 are drawn"),
        ({"weights": np.zeros((2, 129))}, ValueError, "weights has 2 queries and 129 keys to draw, but at most 128"),
        ({"least": 0}, ValueError, "least is 0.0, but it must be greater than 0"),
        ({"least": "0"}, TypeError, "least is '0', but a real number is needed"),
    ],
)
def test_errors(arguments: Any, exception: Any, message: str) -> None:
    with pytest.raises(exception, match="head_view: " + message):
        viz.head_view(**{"weights": WEIGHTS, **arguments})


class Page(HTMLParser):
    """The elements of a page and its texts, without those of styles."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.elements.append(tag)
        assert not [name for name, _ in attrs if name.startswith("on") or name in ("href", "src")]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


ELEMENTS = {"html", "head", "meta", "title", "body", "svg", "style", "rect", "g", "text", "line"}


def saved(folder: Path, name: str) -> Path:
    viz.head_view(np.eye(6), MARKUP, title=TITLE).save(folder / name)
    return folder / name


def test_no_token_becomes_markup(tmp_path: Path) -> None:
    root = ET.fromstring(saved(tmp_path, "view.svg").read_text(encoding="utf8"))
    assert {element.tag.removeprefix(SVG) for element in root.iter()} <= ELEMENTS
    assert [name for name in texts(root) if name in SHOWN] == SHOWN + SHOWN
    assert texts(root)[0] == root.findtext(SVG + "title") == TITLE
    page = Page()
    page.feed(saved(tmp_path, "view.html").read_text(encoding="utf8"))
    assert set(page.elements) == ELEMENTS
    assert page.texts.count(TITLE) == 3


def test_lines_are_seen_without_rules_of_style() -> None:
    root = tree(viz.head_view(np.full((2, 2), np.nan) + np.diag([1, 0]), TOKENS[:2]))
    assert all(line.get("stroke") for line in root.iter(SVG + "line"))
    assert re.fullmatch(r"\S+ \S+:has\(\S+\) \S+:not\(:hover\)\{opacity:[.\d]+\}", root.findtext(SVG + "style") or "")


def test_nothing_is_loaded() -> None:
    svg = viz.head_view(WEIGHTS, TOKENS).svg
    assert not re.search(r"url\(|@import|https?:", svg.replace("http://www.w3.org/2000/svg", ""))
    assert viz.head_view(WEIGHTS, TOKENS)._repr_html_() == svg


def test_other_suffixes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"save: path is '.*view\.png', but it must end in \.svg or \.html"):
        saved(tmp_path, "view.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["view.html", "view.svg"])
def test_a_browser_shows_it_and_runs_nothing(name: str, tmp_path: Path) -> None:
    browsers = [shutil.which(browser) for browser in ("chromium-headless-shell", "chromium", "google-chrome")]
    browser = next(filter(None, browsers), None)
    if browser is None:
        pytest.skip("needs Chromium")
    options = ["--headless", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    options += ["--no-sandbox"] if os.getuid() == 0 else []
    command = [browser, *options, "--dump-dom", saved(tmp_path, name).as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    page = Page()
    page.feed(shown)
    assert set(page.elements) <= ELEMENTS
    assert "parsererror" not in shown
    assert [text for text in page.texts if text in SHOWN] == SHOWN + SHOWN
    assert page.texts.count(TITLE) == (3 if name == "view.html" else 2)
