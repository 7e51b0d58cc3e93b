"""GPT-2's mapping of bytes to letters. Byte-pair vocabularies are stored in these letters."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator


def _bytes() -> dict[str, int]:
    # Bytes that are not printable in Latin-1 are written as the letters from 256 on.
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTES = _bytes()


def text_of(words: Iterable[str]) -> Iterator[str]:
    """Yield the text of a vocabulary's words one by one; a letter split between words comes with the last one."""
    decoder = codecs.getincrementaldecoder("utf8")(errors="replace")
    for word in words:
        yield decoder.decode(bytes(BYTES[letter] for letter in word))
    yield decoder.decode(b"", final=True)
