"""Checks of errors: the same on all ranks, and raised before anything travels; see rank_checks.py."""

from __future__ import annotations

from typing import Any

import numpy as np
from mpi4py import MPI
from rank_operands import error_of_all, operands, own, raised

import selfattn as sa
from selfattn.distributed import Group, SplitSelfAttention

LENGTH = 60


def calls(group: Group) -> tuple[list[Any], dict[str, Any], bool]:
    """Return arrays and rows of a right call, and whether this rank is the one that differs."""
    rows = group.rows(LENGTH)
    return own(group, rows, *operands(LENGTH)), {"rows": rows}, group.rank == group.size - 1


def check_what_differs(group: Group) -> dict[str, str]:
    """The last rank passes something else."""
    (q, k, v), given, odd = calls(group)
    mask = np.ones((1, LENGTH), bool)
    rows = given["rows"]

    def error(*arrays: Any, **options: Any) -> str:
        return error_of_all(group, lambda: group.attention(*arrays, **{**given, **options}))

    def pick(usual: Any, other: Any) -> Any:
        return other if odd else usual

    found = {
        "q": error(pick(q, q.astype(np.float64)), k, v),
        "k": error(q, pick(k, k[:, :1]), v),
        "v": error(q, k, pick(v, v[..., :8])),
        "batch": error(*(pick(x, x[:1]) for x in (q, k, v))),
        "rows_length": error(q, k, v, rows=pick(rows, rows[:-1])),
        "rows_overlap": error(q, k, v, rows=pick(rows, np.arange(len(rows)))),
        "rows_gap": error(q, k, v, rows=pick(rows, rows + 1)),
        "rows_dtype": error(q, k, v, rows=pick(rows, rows * 1.0)),
        "mask": error(q, k, v, mask=pick(mask, None)),
        "bias": error(q, k, v, bias=pick(mask.astype(np.float32), mask.astype(np.float64))),
        "mask_of_all_rows": error(q, k, v, mask=mask ^ odd),
        "mask_of_keys": error(q, k, v, mask=mask[0] ^ odd, by="heads"),
        "bias_of_all_rows": error(q, k, v, bias=np.full((4, 1, LENGTH), float(odd))),
        "layout": error(q, k, v, layout=pick("bhsd", "bshd")),
    }
    other = group.attention_backward
    results = (q, q, k, v, q, q[..., 0])
    found["function"] = error_of_all(
        group, lambda: other(*results, **given) if odd else group.attention(q, k, v, **given)
    )
    found["raises"] = error_of_all(group, lambda: group.attention(pick(q, [["text"]]), k, v, **given))
    return found


def check_what_all_do(group: Group) -> dict[str, str]:
    """All ranks pass the same."""
    (q, k, v), given, _ = calls(group)

    def error(*arrays: Any, **options: Any) -> str:
        return error_of_all(group, lambda: group.attention(*arrays, **{**given, **options}))

    return {
        "heads": error(q[:, :3], k, v),
        "kv_lens": error(q, k, v, kv_lens=[5, 5000]),
        "mask": error(q, k, v, mask=np.ones((7, LENGTH), bool)),
        "mask_keys": error(q, k, v, mask=np.ones((1, 7), bool)),
        "mask_dtype": error(q, k, v, mask=np.ones((1, LENGTH), int)),
        "out": error(q, k, v, out=np.empty((3, 3), np.float32)),
        "is_causal": error(q, k, v, is_causal=True),
        "dropout": error(q, k, v, dropout=0.1),
        "q_offset": error(q, k, v, q_offset=0),
        "return_weights": error(q, k, v, return_weights=True),
        "chunk": error(q, k, v, chunk=0),
        "prefix_lens": error(q, k, v, prefix_lens=LENGTH + 1),
        "prefix_and_chunk": error(q, k, v, prefix_lens=3, chunk=3),
        "by": error(q, k, v, by="rows"),
        "rows": error(q, k, v, rows=np.zeros((2, 2), int)),
        "negative_rows": error(q, k, v, rows=given["rows"] - 1),
        "too_few_heads": error(q[:, :1], k[:, :1], v[:, :1], by="heads"),
    }


def check_accepted(group: Group) -> None:
    """Defaults may be named, and what is this rank's own may differ."""
    (q, k, v), given, odd = calls(group)
    expected = group.attention(q, k, v, **given)
    options = {
        "dropout": 0.0,
        "seed": None,
        "q_offset": None,
        "return_weights": False,
        "chunk": None,
        "prefix_lens": None,
    }
    found = group.attention(q, k, v, **given, **options, num_threads=1 + odd, out=np.empty_like(q) if odd else None)
    assert np.array_equal(found, expected)


def check_groups(group: Group) -> dict[str, str]:
    return {
        "comm": raised(lambda: Group("world")),
        "timeout": raised(lambda: Group(MPI.COMM_WORLD, timeout=0.0)),
        "num_threads": raised(lambda: Group(MPI.COMM_WORLD, num_threads=0)),
        "length": raised(lambda: group.rows(-1)),
        "order": raised(lambda: group.rows(3, "random")),
    }


def check_layers(group: Group) -> dict[str, str]:
    weights = np.zeros((4, 32, 32), np.float32)
    odd = group.rank == group.size - 1

    def layer(*arrays: Any, **options: Any) -> Any:
        return SplitSelfAttention(group, *arrays, **{"num_heads": 8, **options})

    made = layer(*weights)
    x = np.zeros((2, 3, 32), np.float32)
    return {
        "heads": error_of_all(group, lambda: layer(*weights, num_kv_heads=1)),
        "w_o": error_of_all(group, lambda: layer(*weights[:3], None)),
        "w_q": error_of_all(group, lambda: layer(weights[0][:, : 24 if odd else 32], *weights[1:])),
        "x": error_of_all(group, lambda: made(x[:1] if odd else x)),
        "causal": error_of_all(group, lambda: made(x, causal=odd)),
        "width": error_of_all(group, lambda: made(x[..., :5])),
        "return_lse": error_of_all(group, lambda: made(x, return_lse=True)),
        "unknown": error_of_all(group, lambda: made(x, is_causal=True)),
        "out": error_of_all(group, lambda: made(x, out=np.empty((2, 3, 31), np.float32))),
        "post_norm": error_of_all(group, lambda: layer(*weights, post_norm=sa.RMSNorm(np.ones(31)))),
        "norm": error_of_all(group, lambda: layer(*weights, norm=sa.RMSNorm() if odd else sa.LayerNorm())),
        "no_norm": error_of_all(group, lambda: layer(*weights, **({"norm": sa.RMSNorm()} if odd else {}))),
        "setting": error_of_all(group, lambda: layer(*weights, kv_heads=8)),
        "vjp": error_of_all(group, lambda: layer(*weights, norm=sa.RMSNorm()).vjp(x)),
        "wrt": error_of_all(group, lambda: made.vjp(x, wrt=("x", "u"))),
        "grad_y": error_of_all(group, lambda: made.vjp(x)[1](x[:1] if odd else x)),
    }
