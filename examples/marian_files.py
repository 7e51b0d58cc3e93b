"""The files of a Marian model: the weights, with 8-bit matrices, and the lexical shortlist."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from nn import Array

FLOAT32, INTGEMM8 = 0x0404, 0x4101
EMBEDDING = "Wemb"
FREQUENT = 50  # the words that a shortlist always allows


def read_weights(file: Path) -> dict[str, Array]:
    """Return all weights as float32, matrices ready for x @ w.

    The file is little-endian. It begins with a version and the number of items. Then come, for each item, the length of
    its name, its type, and its numbers of dimensions and of bytes. All names, all shapes, a gap, and the items one
    after another follow.
    """
    data = file.read_bytes()
    version, count = np.frombuffer(data, "<u8", 2).tolist()
    if version != 1:
        raise ValueError(f"{file.name}: version {version} of Marian's format is unknown, only 1 is")
    headers = np.frombuffer(data, "<u8", 4 * count, 16).reshape(count, 4).tolist()
    at = 16 + 32 * count
    names, shapes = [], []
    for length, *_ in headers:
        names.append(data[at : at + length - 1].decode())  # without the final NUL
        at += length
    for _, _, rank, _ in headers:
        shapes.append(np.frombuffer(data, "<i4", rank, at).tolist())
        at += 4 * rank
    at += 8 + int(np.frombuffer(data, "<u8", 1, at)[0])
    weights = {}
    for name, shape, (_, kind, _, size) in zip(names, shapes, headers, strict=True):
        if kind == INTGEMM8:
            weights[name] = _dequantized(data, at, name, shape)
        elif kind == FLOAT32:
            weights[name] = np.frombuffer(data, "<f4", int(np.prod(shape)), at).reshape(shape)
        at += size
    return weights


def _dequantized(data: bytes, at: int, name: str, shape: list[int]) -> Array:
    # 8-bit codes, then the number to divide them by. All matrices but the embedding are stored transposed.
    codes = np.frombuffer(data, np.int8, int(np.prod(shape)), at)
    matrix = codes.astype(np.float32) / np.frombuffer(data, "<f4", 1, at + codes.size)
    return matrix.reshape(shape) if name == EMBEDDING else np.ascontiguousarray(matrix.reshape(shape[::-1]).T)


@dataclass(frozen=True)
class Shortlist:
    """For each word of the source language, the words that it may be translated to."""

    offsets: Array
    entries: Array

    @classmethod
    def read(cls, file: Path) -> Shortlist:
        """Read a shortlist: six numbers (the third and the last two matter here), offsets, entries."""
        data = file.read_bytes()
        _, _, frequent, _, offsets, entries = np.frombuffer(data, "<u8", 6).tolist()
        if frequent != FREQUENT:
            raise ValueError(f"{file.name}: {frequent} frequent words are always allowed, but {FREQUENT} are known")
        return cls(
            np.frombuffer(data, "<u8", offsets, 48).astype(np.int64),
            np.frombuffer(data, "<u4", entries, 48 + 8 * offsets).astype(np.int64),
        )

    def allowed(self, source: list[int]) -> Array:
        """Return the ids that a translation of these ids may consist of, in order."""
        parts = [self.entries[self.offsets[i] : self.offsets[i + 1]] for i in set(source)]
        return np.unique(np.concatenate([np.arange(FREQUENT), *parts]))
