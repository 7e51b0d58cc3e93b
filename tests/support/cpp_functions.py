"""Finds the functions of C++ source, without a parser: relies on the style that clang-format writes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

# Comments, literals and preprocessor lines hold brackets that do not count.
IGNORED = re.compile(
    r"""//[^\n]* | /\*.*?\*/ | "(?:\\.|[^"\\\n])*" | (?<![0-9a-fA-F])'(?:\\.|[^'\\\n])+' | ^\s*\#(?:\\\n|[^\n])*""",
    flags=re.M | re.S | re.X,
)
CLOSING = {"(": ")", "[": "]", "{": "}", "<": ">"}


class Function(NamedTuple):
    """A function that has a body."""

    name: str
    lines: int  # of the body
    parameters: int


def plain(text: str) -> str:
    """Return source in which everything that is not code is blank; lines keep their numbers."""
    return IGNORED.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), text)


def bracketed(code: str, opening: int) -> int:
    """Return the position of the bracket that closes the one at `opening`."""
    pair = code[opening] + CLOSING[code[opening]]
    depth = 0
    for i in range(opening, len(code)):
        depth += (code[i] == pair[0]) - (code[i] == pair[1])
        if depth == 0:
            return i
    raise ValueError(f"no bracket closes {code[opening : opening + 40]!r}")


def without_templates(code: str) -> str:
    """Return code without template parameters and arguments: in formatted code, only these have a < after a word."""
    code = re.sub(r"\boperator(\(\)|[^\w\s(]+)", "operator", code)
    while found := re.search(r"(?:\btemplate |(?<=\w))<(?![<= ])", code):
        code = code[: found.start()] + code[bracketed(code, found.end() - 1) + 1 :]
    return code


def function(header: str, body: str) -> Function:
    """Return the function with this header, which ends before the body. Its first parentheses hold the parameters."""
    opening = header.index("(")
    listed = header[opening + 1 : bracketed(header, opening)]
    while found := re.search(r"[(\[{]", listed):  # commas of default values do not count
        listed = listed[: found.start()] + listed[bracketed(listed, found.start()) + 1 :]
    name = header[:opening].split()[-1]
    return Function(name, max(body.count("\n") - 1, 0), listed.count(",") + 1 if listed.strip() else 0)


def functions(text: str) -> Iterator[Function]:
    """Yield the functions of namespaces and classes. Functions within functions count as lines of these."""
    code = plain(text)
    start = i = 0  # `start`: of the current declaration
    while i < len(code):
        if code[i] in ";}":
            start = i + 1
        elif code[i] in "([":
            i = bracketed(code, i)
        elif code[i] == "{":
            header, close = without_templates(code[start:i]), bracketed(code, i)
            if re.match(r"\s*(?:inline )?(?:namespace|struct|class|union|extern)\b", header):
                start = i + 1
            elif "(" in header and re.search(r"[^=\s] $", header):  # no space before the braces of a member's value
                yield function(header, code[i:close])
                start = close + 1
                i = close
            else:  # an enumeration or a value
                i = close
        i += 1
