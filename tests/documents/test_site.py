"""The site: it builds without warnings, all its links lead somewhere, and its pages fetch nothing."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from pages import DOCS

NEEDED = ("sphinx", "myst_parser", "furo", "numpydoc", "torch", "transformers", "jax", "mpi4py", "matplotlib")


class Page(HTMLParser):
    """What a page loads, where it leads to, and which places it has."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.loads: set[str] = set()
        self.links: set[str] = set()
        self.places = {""}
        self.feed(file.read_text(encoding="utf8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.places |= {found[name] for name in ("id", "name") if name in found}
        if tag == "a":
            self.links |= {found["href"]} if "href" in found else set()
        elif tag == "link" and found.get("rel") not in ("index", "search", "next", "prev", "canonical"):
            self.loads.add(found["href"])
        elif "src" in found:
            self.loads.add(found["src"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for name in NEEDED:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    out = tmp_path_factory.mktemp("site")
    options = ["-W", "-n", "--keep-going", "-q", "-b", "html", "-d", str(out / "trees")]
    command = [sys.executable, "-m", "sphinx", *options, str(DOCS), str(out / "html")]
    # In another folder: in the root of the checkout Python would import the sources.
    done = subprocess.run(command, cwd=out, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out / "html"


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {file: Page(file) for file in sorted(site.rglob("*.html"))}


def test_every_source_becomes_a_page(site: Path) -> None:
    sources = [file for suffix in ("md", "rst", "ipynb") for file in DOCS.rglob(f"*.{suffix}")]
    expected = {file.relative_to(DOCS).with_suffix(".html") for file in sources}
    assert {file for file in expected if not (site / file).exists()} == set()


def test_links_lead_somewhere(site: Path, pages: dict[Path, Page]) -> None:
    broken = []
    for file, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme:
                assert parts.scheme == "https", f"{file.name}: {link}"
                assert re.fullmatch(r"[a-z0-9-]+(\.[a-z0-9-]+)+", parts.netloc), f"{file.name}: {link}"
                assert not re.search(r"\s", link), f"{file.name}: {link}"
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            target = target / "index.html" if target.is_dir() else target
            known = target in pages and unquote(parts.fragment) in pages[target].places
            if not known and not (target.exists() and not parts.fragment):
                broken.append((file.relative_to(site).as_posix(), link))
    assert broken == []


def test_nothing_is_fetched(site: Path, pages: dict[Path, Page]) -> None:
    loaded = {link for page in pages.values() for link in page.loads}
    assert loaded
    assert {link for link in loaded if re.match(r"(\w+:)?//", link)} == set()
    for style in site.rglob("*.css"):
        text = style.read_text(encoding="utf8")
        assert re.findall(r"(?:url\(|@import)\s*[\"']?(?:\w+:)?//[^)]*", text) == [], style
    for script in site.rglob("*.js"):
        text = script.read_text(encoding="utf8")
        assert re.findall(r"(?:fetch|import|importScripts)\(\s*[\"'`]https?:", text) == [], script
