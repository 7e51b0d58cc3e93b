"""Cuts text files into passages: at headings, else between paragraphs, else between sentences, with some overlap."""

from __future__ import annotations

import os
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

SUFFIXES = {".md", ".markdown", ".rst", ".txt", ".text", ".adoc", ".org"}  # suffixes of the files to read in a folder
MAX_BYTES = 20_000_000  # in a file
MAX_TOKENS = 200  # in a passage, [CLS] and [SEP] included
MIN_TOKENS = 100  # a passage of at least this length ends where a paragraph ends
OVERLAP = 40  # at most this many tokens at the end of a passage are repeated in the next one
MAX_PIECE = 120  # tokens; a longer sentence is halved
TOKEN_CHARS = 20  # characters that count as at least one token: a very long word is one token, [UNK]
MAX_HEADING = 100  # characters
SHORT = 60  # a passage of fewer tokens is embedded with its heading; in a longer one the heading would only dilute it

HEADING = re.compile(r"#{1,6}\s+(.*?)\s*#*$")
UNDERLINE = re.compile(r"(={3,}|-{3,}|~{3,})$")
FENCE = re.compile(r"\s*(```|~~~)")
BOUNDARY = re.compile(
    r"(?P<paragraph>\n[ \t]*\n)"
    r"|\n(?=[ \t]*([-*+•|]|\d+[.)])\s)"  # before an item of a list or a row of a table
    r"|(?<=[.!?])[\"')\]*_`]*(?:[ \t]+|\n(?![ \t]*\n))(?=[^\sa-z])"  # between sentences
)

Count = Callable[[list[str]], list[int]]  # returns how many tokens each text has


class Unusable(Exception):
    """A file or folder that cannot be read as text; says why."""


@dataclass(frozen=True)
class Passage:
    """A part of a file, small enough to be one vector."""

    file: str
    line: int  # number of the line where it starts, from 1
    heading: str
    body: str
    tokens: int  # tokens of the body, [CLS] and [SEP] included

    @property
    def text(self) -> str:
        """What is embedded."""
        return f"{self.heading}\n{self.body}" if self.heading and self.tokens < SHORT else self.body


@dataclass(frozen=True)
class Piece:
    """A sentence, a line of code or of a table, or a part of one that is very long."""

    start: int
    stop: int
    ends_paragraph: bool
    tokens: int = 0


def find_files(paths: Sequence[Path]) -> list[Path]:
    """Return the given files, and the text files in the given folders except hidden ones."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            for folder, folders, names in os.walk(path):
                folders[:] = sorted(name for name in folders if not name.startswith("."))
                files = (Path(folder, name) for name in sorted(names) if not name.startswith("."))
                found += [file for file in files if file.suffix.lower() in SUFFIXES]
        elif path.exists():
            found.append(path)
        else:
            raise Unusable(f"{path}: there is no such file or folder")
    return list(dict.fromkeys(found))


def read_bytes(path: Path) -> bytes:
    """Return a file's bytes, which are sure to be text in UTF-8."""
    try:
        if not path.is_file():
            raise Unusable(f"{path}: is no regular file")
        if path.stat().st_size > MAX_BYTES:
            raise Unusable(f"{path}: has {path.stat().st_size:,} bytes, more than {MAX_BYTES:,}; split it")
        data = path.read_bytes()
    except OSError as error:
        raise Unusable(f"{path}: cannot be read ({error.strerror})") from error
    try:
        if b"\0" in data:
            raise ValueError
        data.decode("utf8")
    except ValueError:
        raise Unusable(f"{path}: is no text in UTF-8") from None
    return data


def cut(file: str, data: bytes, count: Count) -> list[Passage]:
    """Return the passages of a file in their order; `count` tells how many tokens texts have."""
    text = data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    newlines = [match.start() for match in re.finditer("\n", text)]
    passages = []
    for heading, start, stop in _sections(text):
        for group in _groups(_counted(text, list(_pieces(text, start, stop)), count)):
            begin, end = group[0].start, group[-1].stop
            line = bisect_left(newlines, begin) + 1
            passages.append(Passage(file, line, heading, text[begin:end], 2 + sum(piece.tokens for piece in group)))
    return passages


def _sections(text: str) -> Iterator[tuple[str, int, int]]:
    """Yield each heading, and where the text below it starts and stops."""
    heading, begin = "", 0
    fence, start, above = "", 0, 0
    for line in text.splitlines(keepends=True):
        stop, bare, found, end = start + len(line), line.rstrip(), "", start
        if mark := FENCE.match(bare):
            fence = "" if fence == mark[1] else fence or mark[1]
        elif not fence and (match := HEADING.match(bare)):
            found = match[1]
        elif not fence and UNDERLINE.match(bare) and above >= begin:
            found, end = text[above:start].strip(), above
        if found:
            yield heading, begin, end
            heading, begin = found[:MAX_HEADING], stop
        start, above = stop, start
    yield heading, begin, len(text)


def _pieces(text: str, start: int, stop: int) -> Iterator[Piece]:
    """Yield a section's sentences, list items, rows of tables and blocks of code."""
    ends = [(match.end(), match["paragraph"] is not None) for match in BOUNDARY.finditer(text, start, stop)]
    for end, ends_paragraph in [*ends, (stop, True)]:
        body = text[start:end]
        if body.strip():
            # Code keeps the indentation of its first line.
            begin = start + len(body) - len(body.lstrip("\n"))
            yield from _short(text, Piece(begin, start + len(body.rstrip()), ends_paragraph))
        start = end


def _short(text: str, piece: Piece) -> Iterator[Piece]:
    if piece.stop - piece.start <= MAX_PIECE * TOKEN_CHARS:  # a tokenizer's result for a whole file would be huge
        yield piece
    else:
        for half in _halves(text, piece):
            yield from _short(text, half)


def _counted(text: str, pieces: list[Piece], count: Count) -> list[Piece]:
    """Return the pieces with their numbers of tokens, halved where there are too many."""
    counted = []
    for piece, tokens in zip(pieces, count([text[piece.start : piece.stop] for piece in pieces]), strict=True):
        tokens = max(tokens, (piece.stop - piece.start) // TOKEN_CHARS)
        if tokens <= MAX_PIECE:
            counted.append(replace(piece, tokens=tokens))
        else:
            counted += _counted(text, _halves(text, piece), count)
    return counted


def _halves(text: str, piece: Piece) -> list[Piece]:
    """Split a piece near its middle: at the end of a line, else between words, else within a word."""
    middle, quarter = (piece.start + piece.stop) // 2, (piece.stop - piece.start) // 4
    for mark in ("\n", " "):
        at = text.find(mark, middle, middle + quarter)
        at = at if at >= 0 else text.rfind(mark, middle - quarter, middle)
        if at > piece.start:
            return [Piece(piece.start, at, False), replace(piece, start=at + 1)]
    return [Piece(piece.start, middle, False), replace(piece, start=middle)]


def _groups(pieces: list[Piece]) -> Iterator[list[Piece]]:
    """Yield the pieces of each passage. Full passages end with a paragraph if they can, and overlap."""
    first = 0
    while first < len(pieces):
        stop, total, paragraph = first, 0, 0
        while stop < len(pieces) and total + pieces[stop].tokens <= MAX_TOKENS - 2:
            total += pieces[stop].tokens
            stop += 1
            if pieces[stop - 1].ends_paragraph and total >= MIN_TOKENS:
                paragraph = stop
        if stop < len(pieces):
            stop = paragraph or stop
        yield pieces[first:stop]
        if stop == len(pieces):
            return
        # OVERLAP + MAX_PIECE fit in a passage: the next one ends later than this one.
        overlap, back = 0, stop
        while back > first + 1 and overlap + pieces[back - 1].tokens <= OVERLAP:
            back -= 1
            overlap += pieces[back].tokens
        first = back
