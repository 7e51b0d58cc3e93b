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


def build(folder: Path) -> Path:
    for name in NEEDED:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    options = ["-W", "-n", "--keep-going", "-q", "-b", "html", "-d", str(folder / "trees")]
    command = [sys.executable, "-m", "sphinx", *options, str(DOCS), str(folder / "html")]
    # In another folder: in the root of the checkout Python would import the sources.
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "html"


def missing_pages(site: Path) -> list[str]:
    sources = [file.relative_to(DOCS) for suffix in ("md", "rst", "ipynb") for file in DOCS.rglob(f"*.{suffix}")]
    return [str(file) for file in sources if not (site / file.with_suffix(".html")).exists()]


def broken_links(pages: dict[Path, Page]) -> list[tuple[str, str]]:
    """Return pages and their links to places that do not exist, or of a form that no server understands."""
    broken = []
    for file, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme:
                named = re.fullmatch(r"[a-z0-9-]+(\.[a-z0-9-]+)+", parts.netloc)
                good = parts.scheme == "https" and named and not re.search(r"\s", link)
            else:
                target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
                target = target / "index.html" if target.is_dir() else target
                places = pages[target].places if target in pages else {""} if target.exists() else set()
                good = unquote(parts.fragment) in places
            if not good:
                broken.append((file.name, link))
    return broken


def fetched(site: Path, pages: dict[Path, Page]) -> list[str]:
    """Return the addresses of other servers from which pages, styles and scripts load something."""
    found = [link for page in pages.values() for link in page.loads if re.match(r"(\w+:)?//", link)]
    for style in site.rglob("*.css"):
        found += re.findall(r"(?:url\(|@import)\s*[\"']?((?:\w+:)?//[^)]*)", style.read_text(encoding="utf8"))
    for script in site.rglob("*.js"):
        text = script.read_text(encoding="utf8")
        found += re.findall(r"(?:fetch|import|importScripts)\(\s*[\"'`](https?:[^\"'`]*)", text)
    return found


def test_builds_without_warnings_and_links_lead_somewhere_and_nothing_is_fetched(tmp_path: Path) -> None:
    """One test, since building takes longest."""
    site = build(tmp_path)
    pages = {file: Page(file) for file in sorted(site.rglob("*.html"))}
    assert missing_pages(site) == []
    assert any(page.loads for page in pages.values())
    assert broken_links(pages) == []
    assert fetched(site, pages) == []


def test_what_is_wrong_is_found(tmp_path: Path) -> None:
    text = (
        '<link rel="stylesheet" href="//cdn.example.org/a.css"><script src="own.js"></script><p id="here"></p>'
        '<a href="#here">1</a><a href="#there">2</a><a href="other.html">3</a><a href="https://example.org/">4</a>'
        '<a href="http://example.org/">5</a>'
    )
    (tmp_path / "page.html").write_text(text, encoding="utf8")
    (tmp_path / "own.js").write_text('fetch("https://example.org/data")', encoding="utf8")
    (tmp_path / "own.css").write_text("@import url(https://fonts.example.org/font)", encoding="utf8")
    pages = {tmp_path / "page.html": Page(tmp_path / "page.html")}
    assert {link for _, link in broken_links(pages)} == {"#there", "other.html", "http://example.org/"}
    assert len(fetched(tmp_path, pages)) == 3
