"""Indexes of passages and made-up pages for tests of examples/ask.py."""

from __future__ import annotations

from typing import Any

import numpy as np

NOTES = {
    "cats.md": "# Cats\n\nA cat sleeps most of the day. It wakes up to hunt mice at night.\n",
    "ships/harbour.txt": "The harbour master names every boat. Boats that leave at dawn pay nothing.\n",
    "bread.md": "# Bread\n\nKnead the dough for ten minutes.\n\n## Oven\n\nBake it until the crust is brown.\n",
}


def build(indexing: Any, model: Any, files: dict[str, bytes], old: Any = None, reports: Any = None) -> Any:
    seen = [] if reports is None else reports
    return indexing.refresh(old or indexing.EMPTY, files.items(), model, lambda *report: seen.append(report))


def page(rng: np.random.Generator, sentences: int) -> str:
    words = ["harbour", "bread", "winter", "signal", "matrix", "quiet", "engine", "paper", "cloud", "number", "river"]
    return " ".join(" ".join(rng.choice(words, rng.integers(4, 30))).capitalize() + "." for _ in range(sentences))
