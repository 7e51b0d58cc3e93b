"""The files of the translation models: a shortlist is read, other files are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest


def test_a_shortlist_allows_the_frequent_words_and_those_of_the_source(load_example: Any, tmp_path: Path) -> None:
    files = load_example("marian_files")
    file = tmp_path / "lex.bin"
    offsets = np.array([0, 2, 2, 5], "<u8")  # of the source's words 0, 1 and 2
    entries = np.array([70, 49, 90, 80, 70], "<u4")
    header = np.array([0, 0, files.FREQUENT, 0, len(offsets), len(entries)], "<u8")
    file.write_bytes(header.tobytes() + offsets.tobytes() + entries.tobytes())
    shortlist = files.Shortlist.read(file)
    assert shortlist.allowed([1]).tolist() == list(range(50))
    assert shortlist.allowed([0, 1, 0]).tolist() == [*range(50), 70]
    assert shortlist.allowed([2, 0]).tolist() == [*range(50), 70, 80, 90]


def test_other_files_are_refused(load_example: Any, tmp_path: Path) -> None:
    files = load_example("marian_files")
    other = tmp_path / "model.bin"
    other.write_bytes(np.array([2, 0, 0, 0, 0, 0], "<u8").tobytes())
    with pytest.raises(ValueError, match=r"model\.bin: version 2"):
        files.read_weights(other)
    with pytest.raises(ValueError, match=r"model\.bin: 0 frequent words"):
        files.Shortlist.read(other)
