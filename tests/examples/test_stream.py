"""The example of keys in files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import selfattn as sa


@pytest.fixture(scope="module")
def example(load_example: Any) -> Any:
    return load_example("stream")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("piece", [100, 512, 5000])
def test_pieces_of_files(example: Any, tmp_path: Path, dtype: str, piece: int) -> None:
    rng = np.random.default_rng(1)
    k, v = (example.Tokens(tmp_path / name, np.dtype(dtype), 1300, 2, 16) for name in ("k", "v"))
    for tokens in (k, v):
        tokens.write(rng, piece)
        assert tokens.path.stat().st_size == tokens.bytes()
    q = rng.standard_normal((20, 4, 16), dtype=np.float32).astype(dtype)
    done: list[int] = []
    out = example.stream(q, k, v, piece, done.append)
    keys, values = (np.fromfile(tokens.path, dtype).reshape(1300, 2, 16) for tokens in (k, v))
    whole = sa.attention(q, keys, values, causal=True, layout="bshd")
    assert np.allclose(out, whole, rtol=0, atol=example.TOLERANCE[dtype])
    assert done[-1] == 1300
    assert len(done) == -(-1300 // piece)


def test_the_program(example: Any, tmp_path: Path, capsys: Any) -> None:
    assert example.main(["--keys", "3000", "--queries", "40", "--piece", "700", "--folder", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "3,000 keys and values, 3 MiB, in pieces of 700; 40 queries" in printed
    assert "largest difference from a single call" in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keys", "0"], "all numbers must be at least 1"),
        (["--keys", "10", "--queries", "11"], "queries are the last tokens of keys"),
        (["--heads", "3"], "heads are a multiple of kv-heads"),
        (["--folder", "/no/such/folder"], "/no/such/folder: no such folder"),
    ],
)
def test_wrong_arguments(example: Any, capsys: Any, arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit):
        example.main(arguments)
    assert message in capsys.readouterr().err
