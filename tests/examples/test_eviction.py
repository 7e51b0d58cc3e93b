"""The example of caches that evict tokens."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

import selfattn as sa


@pytest.fixture(scope="module")
def example(load_example: Any) -> Any:
    return load_example("eviction")


def test_best(example: Any) -> None:
    received = np.array([[[0.0, 5, 1, 4, 9, 9], [7, 5, 1, 8, 0, 0]]])
    assert example.best(received, 4, 2).tolist() == [[[1, 3, 4, 5], [0, 3, 4, 5]]]


def test_h2o_keeps_what_received_most(example: Any, normal: Any) -> None:
    q, k = normal(1, 4, 20, 8), normal(1, 2, 20, 8)
    heavy = example.H2O(sa.KVCache(1, 2, 8, 30), 10, 3)
    outs = [heavy.attend(q[:, :, s], k[:, :, s], k[:, :, s]) for s in (slice(8), slice(8, 12), slice(12, 13))]
    assert heavy.cache.lengths.tolist() == [10]
    _, weights = sa.attention(q[:, :, :12], k[:, :, :12], k[:, :, :12], causal=True, return_weights=True)
    received = weights.reshape(1, 2, 2, 12, 12).sum(axis=(2, 3))
    for head in range(2):
        kept = sorted([*np.argsort(received[0, head, :9])[-7:], 9, 10, 11, 12])
        own, group = k[0, head][kept], slice(2 * head, 2 * head + 2)
        assert np.allclose(outs[2][0, group], sa.attention(q[0, group, 12:13], own[None], own[None]), atol=1e-5)


def test_snapkv_keeps_what_the_last_queries_see(example: Any, normal: Any) -> None:
    q, k = normal(1, 4, 40, 8), normal(1, 2, 40, 8)
    k[0, 0, 11] = 30 * q[0, :2, -4:].mean(axis=(0, 1))
    cache = sa.KVCache(1, 2, 8, 40)
    cache.append(k, k)
    example.snapkv(cache, q, 11, 4)
    kept = k[0, 0, [*range(8, 15), *range(36, 40)]]  # the key 11, its neighbours, the newest
    assert np.array_equal(cache.k[0, 0, :11], kept)


def test_the_program(example: Any, capsys: Any) -> None:
    assert example.main(["--tokens", "600", "--budget", "80", "--recent", "8", "--steps", "4"]) == 0
    printed = capsys.readouterr().out
    found = {
        name.strip(): (int(n), float(e))
        for name, n, e in re.findall(r"^(.{12}) *(\d+) tokens.*?([\d.]+)$", printed, re.M)
    }
    assert {name: n for name, (n, _) in found.items()} == {"all tokens": 604, "newest": 84, "SnapKV": 84, "H2O": 80}
    assert found["all tokens"][1] == 0
    assert max(found["SnapKV"][1], found["H2O"][1]) < found["newest"][1] / 2
    with pytest.raises(SystemExit):
        example.main(["--tokens", "100"])
    assert "must ascend" in capsys.readouterr().err
