"""Checks of requests: untrusted input becomes arguments, or a `Problem` with a message."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from decoder import MAX_LENGTH, encode
from generate import Chooser
from nn import Array

MAX_BODY = 1 << 20
MAX_TEXTS, MAX_CHARACTERS = 64, 10_000


class Problem(Exception):
    """The answer to a request that cannot be served."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Embed(NamedTuple):
    texts: list[str]


class Generate(NamedTuple):
    prompt: Array
    tokens: int
    temperature: float
    seed: int
    stream: bool

    def chooser(self) -> Chooser:
        return Chooser(self.temperature, self.seed)


def parse_embed(body: bytes) -> Embed:
    """Read {"texts": [...]}."""
    values = _object(body, {"texts"})
    texts = values.get("texts")
    if not isinstance(texts, list) or not 1 <= len(texts) <= MAX_TEXTS:
        raise Problem(400, f"texts must be a list of 1 to {MAX_TEXTS} strings")
    for i, text in enumerate(texts):
        _utf8(f"texts[{i}]", text)
        if len(text) > MAX_CHARACTERS:
            raise Problem(400, f"texts[{i}] has {len(text)} characters, but at most {MAX_CHARACTERS} are taken")
    return Embed(texts)


def parse_generate(body: bytes) -> Generate:
    """Read {"prompt": "...", "tokens": 20, "temperature": 1.0, "seed": 0, "stream": false}.

    The last three may be missing.
    """
    values = _object(body, {"prompt", "tokens", "temperature", "seed", "stream"})
    _utf8("prompt", values.get("prompt"))
    prompt = encode(values["prompt"])
    if len(prompt) == 0:
        raise Problem(400, "prompt is empty")
    tokens = _integer("tokens", values.get("tokens"), 1, MAX_LENGTH)
    if len(prompt) + tokens > MAX_LENGTH:
        raise Problem(400, f"prompt and tokens have {len(prompt)} + {tokens} bytes, but at most {MAX_LENGTH} together")
    seed = _integer("seed", values.get("seed", 0), 0, 2**32 - 1)
    temperature = values.get("temperature", 1.0)
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise Problem(400, "temperature must be a number")
    if not 0 <= temperature <= 100:  # true for NaN as well
        raise Problem(400, "temperature must be from 0 to 100")
    stream = values.get("stream", False)
    if not isinstance(stream, bool):
        raise Problem(400, "stream must be true or false")
    return Generate(prompt, tokens, float(temperature), seed, stream)


def _object(body: bytes, known: set[str]) -> dict[str, Any]:
    try:
        values = json.loads(body)
    except RecursionError:
        raise Problem(400, "the body is nested too deeply") from None
    except ValueError as error:  # also invalid UTF-8, and integers of thousands of digits
        raise Problem(400, f"the body is no JSON: {error}") from None
    if not isinstance(values, dict):
        raise Problem(400, "the body must be a JSON object")
    unknown = sorted(values.keys() - known)
    if unknown:
        raise Problem(400, f"unknown key {unknown[0][:40]!r}; known are {', '.join(sorted(known))}")
    return values


def _utf8(name: str, text: Any) -> None:
    if not isinstance(text, str):
        raise Problem(400, f"{name} must be a string")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Problem(400, f"{name} has half of a surrogate pair, which is no character") from None


def _integer(name: str, value: Any, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise Problem(400, f"{name} must be an integer")
    if not least <= value <= most:
        raise Problem(400, f"{name} must be from {least} to {most}")
    return value
