"""Errors are the same on all ranks and name the rank that differs; the group can be used afterwards."""

from __future__ import annotations

from typing import Any

import pytest

NAME = "Group.attention"
DIFFERS = {
    "q": f"TypeError: {NAME}: q has dtype float64 on rank 2 but float32 on rank 0",
    "k": f"ValueError: {NAME}: k has shape (2, 1, rows, 16) on rank 2 but (2, 2, rows, 16) on rank 0",
    "v": f"ValueError: {NAME}: v has shape (2, 2, rows, 8) on rank 2 but (2, 2, rows, 16) on rank 0",
    "batch": f"ValueError: {NAME}: q has shape (1, 4, rows, 16) on rank 2 but (2, 4, rows, 16) on rank 0",
    "rows_length": f"ValueError: {NAME}: q has 20 rows but rows has 19 positions (on rank 2)",
    "rows_overlap": f"ValueError: {NAME}: rows overlap: position 0 is on ranks 0 and 2",
    "rows_gap": f"ValueError: {NAME}: rows leave a gap: no rank has position 20",
    "rows_dtype": f"TypeError: {NAME}: rows has dtype float64, but integers are needed (on rank 2)",
    "mask": f"TypeError: {NAME}: mask has dtype not given on rank 2 but bool on rank 0",
    "bias": f"TypeError: {NAME}: bias has dtype float64 on rank 2 but float32 on rank 0",
    "mask_of_all_rows": f"ValueError: {NAME}: mask has checksum ",
    "mask_of_keys": f"ValueError: {NAME}: mask has checksum ",
    "bias_of_all_rows": f"ValueError: {NAME}: bias has checksum ",
    "layout": f"ValueError: {NAME}: q has 4 rows but rows has 20 positions (on rank 2)",
    "function": "ValueError: Group.attention: rank 2 has called Group.attention_backward, but rank 0 has not",
    "raises": f"TypeError: {NAME}: q ",
}
ALL = {
    "heads": f"ValueError: {NAME}: q has 3 heads, which is not a multiple of the 2 heads of k",
    "kv_lens": f"ValueError: {NAME}: kv_lens holds 5000",
    "mask": f"ValueError: {NAME}: mask has 7 rows but rows has 20 positions",
    "mask_keys": f"ValueError: {NAME}: mask has shape (1, 7)",
    "mask_dtype": f"TypeError: {NAME}: mask has dtype int64",
    "out": f"ValueError: {NAME}: out has shape (3, 3)",
    "is_causal": "TypeError: Group: unexpected keyword argument 'is_causal' (did you mean 'causal'?)",
    "dropout": f"ValueError: {NAME}: dropout is 0.1 without a seed",
    "q_offset": f"ValueError: {NAME}: q_offset cannot be used over ranks: ",
    "return_weights": f"ValueError: {NAME}: return_weights cannot be used over ranks: ",
    "chunk": f"ValueError: {NAME}: chunk is 0, but ",
    "prefix_lens": f"ValueError: {NAME}: prefix_lens holds 61",
    "prefix_and_chunk": f"ValueError: {NAME}: prefix_lens cannot be used with chunk",
    "by": f"ValueError: {NAME}: by is 'rows', but it must be one of 'keys', 'heads'",
    "rows": f"ValueError: {NAME}: rows has shape (2, 2), but one axis is needed",
    "negative_rows": f"ValueError: {NAME}: rows holds -1, but positions start at 0 (on rank 0)",
    "too_few_heads": f"ValueError: {NAME}: by is 'heads', which needs a KV head for each of 3 ranks, but there are 1",
}
GROUPS = {
    "comm": "TypeError: Group: comm is a str, but an mpi4py communicator is needed",
    "timeout": "ValueError: Group: timeout is 0.0, but it must be positive",
    "num_threads": "ValueError: Group: num_threads is 0",
    "length": "ValueError: Group.rows: length is -1",
    "order": "ValueError: Group.rows: order is 'random', but it must be one of 'zigzag', 'contiguous'",
}
LAYER = "SplitSelfAttention"
LAYERS = {
    "heads": f"ValueError: {LAYER}: num_kv_heads is 1, but every one of 3 ranks needs a KV head",
    "w_o": f"ValueError: {LAYER}: w_o is missing",
    "w_q": f"ValueError: {LAYER}: w_k has 12 columns, but 3 KV heads of head_dim 3 (from w_q) need 9 (on rank 2)",
    "x": f"ValueError: {LAYER}: x has shape (1, 3, 32) on rank 2 but (2, 3, 32) on rank 0",
    "causal": f"ValueError: {LAYER}: causal is True on rank 2 but False on rank 0",
    "width": f"ValueError: {LAYER}: x has ",
    "return_lse": f"ValueError: {LAYER}: return_lse cannot be used over ranks",
    "unknown": "TypeError: SplitSelfAttention: unexpected keyword argument 'is_causal' (did you mean 'causal'?)",
    "out": f"ValueError: {LAYER}: out has shape (2, 3, 31) and dtype float32, but y has (2, 3, 32) and float32",
    "post_norm": f"ValueError: {LAYER}: post_norm is of 31 numbers",
    "norm": f"ValueError: {LAYER}: norm is RMSNorm(not given, not given, 1e-06) on rank 2 but LayerNorm(",
    "no_norm": f"ValueError: {LAYER}: norm is RMSNorm(not given, not given, 1e-06) on rank 2 but not given on rank 0",
    "setting": f"TypeError: {LAYER}: unexpected keyword argument 'kv_heads' (did you mean 'num_kv_heads'?)",
    "vjp": f"ValueError: {LAYER}.vjp: norm is part of the layer: apply it outside",
    "wrt": f"ValueError: {LAYER}.vjp: wrt names 'u', but it must be one of ",
    "grad_y": f"ValueError: {LAYER}.vjp: grad_y has shape (1, 3, 32) but (2, 3, 32) is needed (on rank 2)",
}


@pytest.mark.parametrize(
    ("check", "expected"),
    [("what_differs", DIFFERS), ("what_all_do", ALL), ("groups", GROUPS), ("layers", LAYERS)],
)
def test_errors(checked: Any, check: str, expected: dict[str, str]) -> None:
    found = checked("checks_errors", check, 3)
    assert found.keys() == expected.keys()
    wrong = {name: text for name, text in found.items() if not text.startswith(expected[name])}
    assert wrong == {}
    assert all("on rank 2 but" in text for text in found.values() if "checksum" in text)


def test_what_may_differ(checked: Any) -> None:
    checked("checks_errors", "accepted", 3)
