"""GPT-2's way to write bytes as letters, which vocabularies of byte pairs are kept in."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator


def _bytes() -> dict[str, int]:
    # Bytes that are no printable letter of Latin-1 stand as the letters from 256 on.
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTES = _bytes()


def text_of(words: Iterable[str]) -> Iterator[str]:
    """Yield the text of a vocabulary's words as they come; a letter split between words comes with the last of them."""
    decoder = codecs.getincrementaldecoder("utf8")(errors="replace")
    for word in words:
        yield decoder.decode(bytes(BYTES[letter] for letter in word))
    yield decoder.decode(b"", final=True)
