"""Models whose queries see only chosen keys: llm.py chooses those that transformers chooses."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llm_models import CHOSEN, CONFIGS, build, draw, load, logits_of, pair_of

NAMES = ("deepseek-v3.2", "glm-dsa")


@pytest.fixture(scope="module")
def llm(load_example: Any) -> Any:
    return load_example("llm")


@pytest.fixture(scope="module")
def latent(load_example: Any) -> Any:
    return load_example("llm_latent")


@pytest.fixture(scope="module", params=NAMES)
def pair(request: pytest.FixtureRequest, llm: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return pair_of(request.param, llm, tmp_path_factory.mktemp("model"))


def indices_of(peer: Any, ids: Any) -> list[Any]:
    """Return what each indexer of transformers' model chooses, (B, S, count)."""
    found: list[Any] = []
    indexers = [part for name, part in peer.named_modules() if name.endswith(".indexer")]
    hooks = [part.register_forward_hook(lambda part, given, result: found.append(result.numpy())) for part in indexers]
    logits_of(peer, ids)
    for hook in hooks:
        hook.remove()
    return found


def indices_in(caches: list[Any]) -> list[Any]:
    """Return what is chosen in each index, which several caches may share."""
    return [index.chosen[:, 0] for index in {id(cache.index): cache.index for cache in caches}.values()]


def test_choices_are_those_of_transformers(pair: tuple[Any, Any], latent: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, peer = pair
    ids, gaps = draw(2, 90), []
    own_best = latent.best

    def best(scores: Any, count: int) -> Any:
        ordered = -np.sort(-scores, axis=-1)
        gaps.append(np.min(ordered[:, count - 1] - ordered[:, count]))
        return own_best(scores, count)

    monkeypatch.setattr(latent, "best", best)
    caches = model.new_caches(90, 90, batch=2)
    model(ids, 0, caches)
    assert min(gaps) > 1e-5, "rounding may decide between two keys: take another seed"
    own, wanted = indices_in(caches), indices_of(peer, ids)
    assert len(own) == len(wanted) == sum(block.attention.indexer is not None for block in model.blocks)
    for chosen, others in zip(own, wanted, strict=True):
        assert np.array_equal(np.sort(chosen[:, CHOSEN:]), np.sort(others[:, CHOSEN:]))
        for i in range(CHOSEN):  # transformers fills rows with hidden keys
            assert chosen[:, i].tolist() == [[*range(i + 1), *[-1] * (CHOSEN - i - 1)]] * 2
        newest = np.arange(90)[:, None] - np.arange(CHOSEN)
        assert not np.array_equal(np.sort(chosen[0, CHOSEN:]), np.sort(newest[CHOSEN:]))


def test_texts_no_longer_than_what_is_chosen_see_all(llm: Any, tmp_path: Path) -> None:
    name, values = CONFIGS["glm-dsa"]
    peer = build(name, values | {"index_topk": 30})
    peer.save_pretrained(tmp_path)
    model, ids = load(llm, tmp_path), draw(2, 33)
    caches = model.new_caches(33, 30, batch=2)
    first = model(ids[:, :30], 0, caches)
    assert all(cache.index.chosen is None for cache in caches)
    logits = [first, *(model(ids[:, i : i + 1], i, caches) for i in range(30, 33))]
    assert [chosen.shape for chosen in indices_in(caches)] == [(2, 1, 30)] * 2
    assert np.max(abs(np.concatenate(logits, axis=1) - logits_of(peer, ids)[:, 29:])) <= 1e-4


def test_of_equal_scores_the_first_tokens_are_chosen(latent: Any) -> None:
    rng = np.random.default_rng(0)
    # Small integers, so that sums are exact and many scores are equal.
    q, keys = (rng.integers(-2, 3, shape).astype(np.float32) for shape in ((2, 2, 20, 4), (2, 20, 4)))
    factors = rng.integers(-1, 3, (2, 20, 2)).astype(np.float32)
    found, ties = latent.choose(q, factors, keys, 5), 0
    for b, i in np.ndindex(2, 20):
        products = np.maximum(q[b, :, i].astype(np.float64) @ keys[b, : i + 1].T, 0)
        scores = (factors[b, i] @ products).tolist()
        order = sorted(range(i + 1), key=lambda token, scores=scores: (-scores[token], token))
        ties += i >= 5 and scores[order[4]] == scores[order[5]]
        assert sorted(found[b, i]) == sorted(order[:5] + [-1] * (4 - i))
    assert ties > 10
    parts = [latent.choose(q[:, :, a:b], factors[:, a:b], keys[:, :b], 5) for a, b in pairwise([0, 3, 4, 11, 20])]
    assert np.array_equal(np.concatenate(parts, axis=1), found)


def test_latents_are_stored_once_and_indices_shared(pair: tuple[Any, Any]) -> None:
    model = pair[0]
    caches = model.new_caches(40, 30, batch=2)
    for cache in caches:
        assert np.shares_memory(cache.latents.k, cache.latents.v)
        assert np.shares_memory(cache.index.keys.k, cache.index.keys.v)
    kinds = model.config.values.get("indexer_types", ["full"] * len(caches))
    assert [a.index is b.index for a, b in pairwise(caches)] == [kind == "shared" for kind in kinds[1:]]
    model(draw(2, 30), 0, caches)
    assert [cache.index.keys.lengths.tolist() for cache in caches] == [[30, 30]] * len(caches)


@pytest.mark.parametrize(("dtype", "error"), [("float16", 0.02), ("bfloat16", 1.0)])
def test_caches_of_16_bits(pair: tuple[Any, Any], dtype: str, error: float) -> None:
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    model, ids = pair[0], draw(1, 40)
    caches = model.new_caches(40, 30, dtype)
    model(ids[:, :30], 0, caches)
    assert 0 < np.max(abs(model(ids[:, 30:], 30, caches) - model(ids)[:, -1:])) < error


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_caches_of_codes_are_refused(pair: tuple[Any, Any], dtype: str) -> None:
    with pytest.raises(ValueError, match=f"in caches of float32, float16, bfloat16, not of {dtype}"):
        pair[0].new_caches(40, 30, dtype)


def test_weights_in_bfloat16(llm: Any, tmp_path: Path) -> None:
    pytest.importorskip("ml_dtypes")
    build(*CONFIGS["glm-dsa"]).bfloat16().save_pretrained(tmp_path)
    wide, narrow, ids = load(llm, tmp_path), load(llm, tmp_path, "bfloat16"), draw(1, 30)
    assert 0 < np.sqrt(np.mean((narrow(ids) - wide(ids)) ** 2)) < 0.5


def test_the_first_layer_needs_an_index(llm: Any, tmp_path: Path) -> None:
    name, values = CONFIGS["glm-dsa"]
    build(name, values | {"indexer_types": ["shared", *["full"] * 4]}).save_pretrained(tmp_path)
    with pytest.raises(KeyError, match=r"the weight model\.layers\.0\.self_attn\.indexer\.wq_b\.weight is missing"):
        load(llm, tmp_path)
