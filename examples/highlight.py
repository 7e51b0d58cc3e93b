"""Text for a terminal: wrapped lines, highlighted words, a score written as a sum."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
from attribution import Shares

LISTED = 5  # words of the sum
COLOUR, PLAIN = ("\033[1;33m", "\033[0m"), ("*", "*")
ANEW = re.compile(r"\s|[-*+•|#]|\d+[.)]\s|```|~~~")  # the start of a line that does not continue the sentence before it


def highlighted(text: str, shares: Shares, width: int, colour: bool) -> Iterator[str]:
    """Yield the text's lines with the words that the score comes from in colour, or between asterisks."""
    before, after = COLOUR if colour else PLAIN
    values = np.array([word.share for word in shares.words] or [0.0])
    threshold = max(values.mean() + values.std(), 1e-9)
    marked = {word.start: word for word in shares.words if word.share >= threshold}
    for start, stop in _lines(text, width):
        parts, at = [], start
        for word in (marked[i] for i in range(start, stop) if i in marked):
            parts += [printable(text[at : word.start]), before, printable(text[word.start : word.stop]), after]
            at = word.stop
        yield "".join([*parts, printable(text[at:stop])])


def _lines(text: str, width: int) -> Iterator[tuple[int, int]]:
    """Yield where each line to show starts and stops.

    Lines of the text are kept. A line that is too long is broken between words, and the lines that continue its
    sentence are wrapped together with it.
    """
    start = stop = 0
    flows = False
    for line in re.finditer(r"[^\n]+", text):
        if not flows or ANEW.match(line[0]) or text.endswith("\n\n", 0, line.start()):
            if stop > start:
                yield start, stop
            start, flows = line.start(), False
        flows = flows or len(line[0]) > width
        for word in re.finditer(r"\S+", line[0]):
            end = line.start() + word.end()
            if end - start > width and stop > start:
                yield start, stop
                start = line.start() + word.start()
            stop = end
    if stop > start:
        yield start, stop


def summed(text: str, shares: Shares) -> str:
    """Return the score as a sum: the words with the largest shares, all other words, and the rest."""
    totals: dict[str, list[float]] = {}
    for word in shares.words:
        totals.setdefault(printable(text[word.start : word.stop].lower()), []).append(word.share)
    strongest = sorted(totals, key=lambda name: -max(totals[name]))[:LISTED]
    terms = []
    for name in strongest:
        own = totals.pop(name)
        terms.append(f"{sum(own):.3f} {name}" + (f" (×{len(own)})" if len(own) > 1 else ""))
    if totals:
        terms.append(f"{sum(map(sum, totals.values())):.3f} other words")
    terms.append(f"{shares.rest:.3f} punctuation, [CLS] and [SEP]")
    return f"{shares.score:.3f} = {' + '.join(terms)}".replace("+ -", "- ")


def printable(text: str) -> str:
    """Return the text without control characters."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in text)
