"""Computes how much each word of a passage contributes to its score.

A passage's embedding is the mean m of its tokens' vectors x_t, scaled to length 1. So its score for a query q of
length 1, q·m / |m|, is the sum of the tokens' shares q·x_t / (n |m|). This decomposition is exact. It shows which
vectors contribute to the score. Each vector depends on the whole passage, so a share is not the amount that the score
would lose without the word.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from minilm import Vectors
from nn import Array

WORD = re.compile(r"\w+(?:[-_.'’]\w+)*")


@dataclass(frozen=True)
class Word:
    """A word's place in the passage, and the sum of its tokens' shares."""

    start: int
    stop: int
    share: float


@dataclass(frozen=True)
class Shares:
    """A score as a sum."""

    words: list[Word]
    rest: float  # the share of punctuation, [CLS] and [SEP] together

    @property
    def score(self) -> float:
        """The sum."""
        return self.rest + sum(word.share for word in self.words)


def decompose(text: str, vectors: Vectors, query: Array) -> Shares:
    """Return what each word adds to the cosine of the angle between the text's embedding and the query's."""
    states = vectors.states.astype(np.float64)
    shares = states @ query / np.linalg.norm(states.sum(axis=0))
    places = [match.span() for match in WORD.finditer(text)]
    sums = [0.0] * len(places)
    rest, word = 0.0, 0
    for share, (start, stop) in zip(shares, vectors.spans, strict=True):
        while word < len(places) and places[word][1] <= start:
            word += 1
        if start < stop and word < len(places) and places[word][0] <= start:
            sums[word] += float(share)
        else:
            rest += float(share)
    return Shares([Word(*place, total) for place, total in zip(places, sums, strict=True)], rest)
