"""Checks of `Group.attention_backward`, see rank_checks.py."""

from __future__ import annotations

from typing import Any

import numpy as np
from rank_operands import error_of_all, one_process, operands, own, whole

import selfattn as sa
from selfattn.distributed import Group


def gradients(group: Group, q: Any, k: Any, v: Any, options: dict[str, Any], **more: Any) -> tuple[Any, Any]:
    """Return the gradients of all ranks' rows, and those of one process."""
    rng = np.random.default_rng(5)
    out, lse = one_process(q, k, v, **options)
    grad_out = rng.standard_normal(out.shape).astype(out.dtype)
    whole_lse = rng.standard_normal(lse.shape).astype(lse.dtype) if more.pop("lse", False) else None
    alone = {**options, **({"q_lens": options["kv_lens"]} if "kv_lens" in options else {})}
    expected = sa.attention_backward(grad_out, q, k, v, out, lse, grad_lse=whole_lse, q_offset=0, **alone, **more)
    rows = group.rows(q.shape[-2])
    own_lse = None if whole_lse is None else whole_lse[..., rows]
    given = {
        name: x[..., rows, :] if name in ("mask", "bias") and x.shape[-2] > 1 else x for name, x in options.items()
    }
    arrays = own(group, rows, grad_out, q, k, v, out)
    found = group.attention_backward(*arrays, lse[..., rows], rows=rows, grad_lse=own_lse, **given, **more)
    return [None if x is None else whole(group, rows, x) for x in found[:3]], expected[:3]


def check_options(group: Group) -> None:
    rng = np.random.default_rng(2)
    cases: list[tuple[int, dict[str, Any], dict[str, Any]]] = [
        (130, {}, {}),
        (130, {"causal": True}, {"lse": True}),
        (700, {"causal": True, "window": (300, None)}, {}),
        (700, {"kv_lens": np.array([700, 300]), "kv_starts": np.array([5, 0]), "softcap": 3.0}, {}),
        (130, {"alibi_slopes": sa.alibi_slopes(4), "causal": True, "sinks": np.ones(4)}, {}),
        (130, {"t5": sa.T5Bias(rng.standard_normal((32, 4))), "scale": 1.0}, {"wrt": ("k",)}),
        (130, {"mask": rng.random((2, 1, 1, 130)) < 0.7, "bias": rng.standard_normal((1, 130))}, {}),
        (130, {"mask": rng.random((130, 130)) < 0.7}, {"wrt": ("q",)}),
        (2, {"causal": True}, {}),
        (1, {}, {"wrt": ("v", "q")}),
    ]
    for length, options, more in cases:
        q, k, v = operands(length, dtype=np.float64)
        found, expected = gradients(group, q, k, v, options, **more)
        for one, other in zip(found, expected, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                np.testing.assert_allclose(one, other, rtol=0, atol=1e-12, err_msg=str((length, sorted(options))))


def check_types(group: Group) -> None:
    """Sums are in the type of computation, and are rounded once."""
    for dtype, tolerance in ((np.float32, 1e-5), (np.float16, 4e-3)):
        q, k, v = operands(600, dtype=dtype)
        found, expected = gradients(group, q, k, v, {"causal": True})
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == dtype
            np.testing.assert_allclose(one.astype(float), other.astype(float), rtol=tolerance, atol=tolerance)


def check_layout(group: Group) -> None:
    q, k, v = operands(40)
    rows = group.rows(40)
    out, lse = sa.attention(q, k, v, return_lse=True)
    arrays = own(group, rows, out, q, k, v, out)
    expected = group.attention_backward(*arrays, lse[..., rows], rows=rows)
    swapped = [x.swapaxes(1, 2) for x in arrays]
    found = group.attention_backward(*swapped, lse[..., rows], rows=rows, layout="bshd")
    for one, other in zip(found[:3], expected[:3], strict=True):
        assert np.array_equal(one.swapaxes(1, 2), other)


def check_errors(group: Group) -> dict[str, str]:
    q, k, v = operands(60)
    rows = group.rows(60)
    q, k, v = own(group, rows, q, k, v)
    lse = q[..., 0]
    odd = group.rank == group.size - 1

    def error(*arrays: Any, **options: Any) -> str:
        return error_of_all(group, lambda: group.attention_backward(*arrays, rows=rows, **options))

    return {
        "wrt": error(q, q, k, v, q, lse, wrt=("q",) if odd else ("k",)),
        "sinks": error(q, q, k, v, q, lse, wrt=("sinks",), sinks=np.ones(4)),
        "scale": error(q, q, k, v, q, lse, wrt=("scale",)),
        "grad_out": error(q[..., :3], q, k, v, q, lse),
        "lse": error(q, q, k, v, q, lse[:, :2]),
        "mask": error(q, q, k, v, q, lse, mask=np.ones((len(rows), 60), bool)),
        "dropout": error(q, q, k, v, q, lse, dropout=0.5, seed=1),
    }
