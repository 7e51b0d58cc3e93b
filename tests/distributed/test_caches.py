"""Caches that are spread over ranks, and layers whose heads are: the results of one process."""

from __future__ import annotations

from typing import Any

import pytest

NAME = "Group.attention_with_kvcache"
ERRORS = {
    "full": "ValueError: ",
    "missing": f"ValueError: {NAME}: k is missing, but with several causal queries",
    "v": f"ValueError: {NAME}: v is missing",
    "mask": f"ValueError: {NAME}: mask is given without k, but it covers the newest tokens",
    "cache": f"TypeError: {NAME}: cache is a list, but a KVCache or PagedKVCache is needed (on rank 1)",
    "window_of_cache": f"ValueError: {NAME}: cache has a window, which needs the positions of its",
    "positions": f"ValueError: {NAME}: cache has 4 tokens of sequence 0, but positions of 0 are known: use place",
    "rows": "ValueError: SpreadCache.place: rows has shape (2,), but ascending positions are needed",
    "sequences": f"ValueError: {NAME}: sequences is needed with a PagedKVCache",
    "window": f"ValueError: {NAME}: window needs the positions of the tokens in the cache: pass a SpreadCache",
    "overlap": f"ValueError: {NAME}: rows overlap: position 0 is on ranks 0 and 1",
    "gap": f"ValueError: {NAME}: rows leave a gap: no rank has position 4",
    "kv_heads": f"ValueError: {NAME}: cache has num_kv_heads 1 on rank 1 but 2 on rank 0",
    "head_dim": f"ValueError: {NAME}: cache has head_dim 8 on rank 1 but 16 on rank 0",
    "value_dim": f"ValueError: {NAME}: cache has value_dim 8 on rank 1 but 16 on rank 0",
    "kept": f"ValueError: {NAME}: cache has window 4 on rank 1 but 3 on rank 0",
    "kind": f"ValueError: {NAME}: cache is a SpreadCache on rank 1 but no SpreadCache on rank 0",
    "kv_starts": "TypeError: Group: unexpected keyword argument 'kv_starts'",
    "chunk": "TypeError: Group: unexpected keyword argument 'chunk'",
    "prefix_lens": "TypeError: Group: unexpected keyword argument 'prefix_lens'",
    "batch": f"ValueError: {NAME}: q has a batch of 1, but there are 2 sequences in cache",
    "bias_too_wide": f"ValueError: {NAME}: bias has shape (1, 5), which ",
    "bias_too_narrow": f"ValueError: {NAME}: bias has shape (1, 3), which ",
    "bias_of_batch": f"ValueError: {NAME}: bias has shape (3, 1, 1, 4), which ",
    "heads_of_t5": f"ValueError: {NAME}: t5 ",
    "heads_of_slopes": f"ValueError: {NAME}: alibi_slopes ",
    "unknown": "TypeError: Group: unexpected keyword argument 'cache_seqlens'",
}


CHECKS = ["caches", "pages", "layout_and_mask", "layer", "layer_gradients", "distances", "prompt"]


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("check", CHECKS)
def test_caches(checked: Any, check: str, size: int) -> None:
    checked("checks_caches", check, size)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_rings_take_steps_of_several_tokens(checked: Any, size: int) -> None:
    checked("checks_rings", "steps", size)


def test_a_ring_refuses_what_needs_lost_tokens(checked: Any) -> None:
    found = checked("checks_rings", "refused", 2)
    for name, left in (("nothing", "none"), ("slopes", "none"), ("right", "none"), ("farther", "5 to the left")):
        text = f"window is {left}, but the cache keeps only the tokens that a window of 4 sees"
        assert found[name] == f"ValueError: {NAME}: {text}"
    assert len(found) == 5


def test_errors(checked: Any) -> None:
    found = checked("checks_caches", "errors", 2)
    assert found.keys() == ERRORS.keys()
    assert {name: text for name, text in found.items() if not text.startswith(ERRORS[name])} == {}
