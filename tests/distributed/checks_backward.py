"""Checks of `Group.attention_backward`, see rank_checks.py."""

from __future__ import annotations

from typing import Any

import numpy as np
from rank_operands import error_of_all, one_process, operands, own, rows_of_options, sha, whole

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
    given = rows_of_options(options, rows)
    arrays = own(group, rows, grad_out, q, k, v, out)
    found = group.attention_backward(*arrays, lse[..., rows], rows=rows, grad_lse=own_lse, **given, **more)._asdict()
    for name, x in found.items():
        with_rows = name in ("q", "k", "v") or (name == "bias" and np.shape(options.get("bias"))[-2:-1] > (1,))
        found[name] = whole(group, rows, x) if with_rows and x is not None else x
    return found, expected._asdict()


def check_options(group: Group) -> None:
    rng = np.random.default_rng(2)
    everything = ("bias", "k", "t5", "q", "scale", "alibi_slopes", "v", "sinks")
    terms: dict[str, Any] = {"sinks": np.ones(4), "t5": sa.T5Bias(rng.standard_normal((32, 4)))}
    cases: list[tuple[int, dict[str, Any], dict[str, Any]]] = [
        (130, {}, {}),
        (130, {"causal": True}, {"lse": True}),
        (700, {"causal": True, "window": (300, None)}, {}),
        (700, {"kv_lens": np.array([700, 300]), "kv_starts": np.array([5, 0]), "softcap": 3.0}, {}),
        (130, {"alibi_slopes": sa.alibi_slopes(4), "causal": True, "sinks": np.ones(4)}, {"wrt": ("alibi_slopes",)}),
        (130, {"t5": sa.T5Bias(rng.standard_normal((32, 4))), "scale": 1.0}, {"wrt": ("k",)}),
        (130, {"mask": rng.random((2, 1, 1, 130)) < 0.7, "bias": rng.standard_normal((1, 130))}, {"wrt": ("bias",)}),
        (130, {"mask": rng.random((130, 130)) < 0.7}, {"wrt": ("v", "sinks"), "lse": True, "sinks": np.ones(4)}),
        (700, {"causal": True, "chunk": 100, "sinks": np.ones(4)}, {"wrt": ("q", "k", "v", "sinks"), "lse": True}),
        (300, {"chunk": 7, "bias": rng.standard_normal((4, 300, 300)), "kv_lens": [300, 50]}, {"wrt": ("bias", "k")}),
        (700, {"chunk": 300, "mask": rng.random((700, 700)) < 0.7, "dropout": 0.2, "seed": 1}, {}),
        (700, {"causal": True, "prefix_lens": np.array([650, 3])}, {}),
        (300, {"window": (None, 9), "prefix_lens": [90, 0], "bias": rng.standard_normal(300)}, {"wrt": ("bias", "v")}),
        (2, {"causal": True}, {}),
        (1, {}, {"wrt": ("v", "q")}),
        (600, {"dropout": 0.3, "seed": 5, "causal": True}, {}),
        (3, {**terms, "alibi_slopes": np.ones((2, 4)), "bias": rng.standard_normal((3, 3))}, {"wrt": everything}),
    ]
    biases = [(2, 1, 600, 600), (4, 600, 600), (600,), (4, 600, 1), (2, 1, 1, 1), ()]
    for shape in biases:
        options = {**terms, "alibi_slopes": rng.random((2, 1)), "bias": rng.standard_normal(shape), "dropout": 0.2}
        options |= {"seed": 9, "mask": rng.random((4, 600, 600)) < 0.8, "causal": len(shape) == 3}
        cases.append((600, options, {"wrt": everything, "lse": len(shape) == 1}))
    for length, options, more in cases:
        if "sinks" in more:
            options["sinks"] = more.pop("sinks")
        q, k, v = operands(length, dtype=np.float64)
        found, expected = gradients(group, q, k, v, options, **more)
        for name, other in expected.items():
            case = f"{name}: {length} {sorted(options)} {np.shape(options.get('bias'))}"
            assert (found[name] is None) == (other is None), case
            if other is not None:
                assert found[name].dtype == other.dtype, case
                np.testing.assert_allclose(found[name], other, rtol=1e-12, atol=1e-11, err_msg=case)


def hashes_of_gradients(group: Group) -> list[str]:
    """Return hashes of the gradients of rows, which must not depend on the number of ranks."""
    hashes = []
    rng = np.random.default_rng(0)
    cases: list[tuple[Any, dict[str, Any]]] = [
        (np.float32, {"causal": True, "dropout": 0.1, "seed": 3}),
        (np.float32, {"window": (200, 30), "bias": rng.standard_normal((4, 600, 600)).astype(np.float32)}),
        (np.float16, {"kv_lens": [600, 520], "sinks": np.ones(4)}),
        (np.float64, {"softcap": 5.0, "kv_starts": [0, 30]}),
        (np.float32, {"causal": True, "chunk": 100}),
        (np.float32, {"chunk": 333, "mask": rng.random((1, 600, 600)) < 0.8, "dropout": 0.1, "seed": 3}),
        (np.float32, {"causal": True, "prefix_lens": [77, 590]}),
    ]
    for dtype, options in cases:
        q, k, v = operands(600, dtype=dtype)
        wrt = ("q", "k", "v", *(["bias"] if "bias" in options else []))
        found, _ = gradients(group, q, k, v, options, wrt=wrt)
        hashes.append(sha(*(found[name] for name in wrt)))
    return hashes


def check_types(group: Group) -> None:
    """Sums are in the type of computation, and are rounded once."""
    for dtype, tolerance in ((np.float32, 1e-5), (np.float16, 4e-3)):
        q, k, v = operands(600, dtype=dtype)
        found, expected = gradients(group, q, k, v, {"causal": True})
        for name in ("q", "k", "v"):
            assert found[name].dtype == dtype
            one, other = found[name].astype(float), expected[name].astype(float)
            np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


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


def check_bias_of_one_row(group: Group) -> None:
    """One rank has one row of bias and mask for all of its rows; the others have a row for each."""
    q, k, v = operands(60, dtype=np.float64)
    rng = np.random.default_rng(0)
    bias, mask = rng.standard_normal((4, 1, 60)), rng.random((1, 60)) < 0.8
    out, lse = sa.attention(q, k, v, bias=bias, mask=mask, return_lse=True)
    expected = sa.attention_backward(q, q, k, v, out, lse, bias=np.repeat(bias, 60, 1), mask=mask, wrt=("bias", "k"))
    assert expected.bias is not None
    for order in ("zigzag", "contiguous"):
        rows = group.rows(60, order)
        given: dict[str, Any] = {"rows": rows, "bias": bias, "mask": mask}
        if group.rank > 0:
            given |= {"bias": np.repeat(bias, len(rows), 1), "mask": np.repeat(mask, len(rows), 0)}
        arrays = own(group, rows, q, k, v)
        for by in ("keys", "heads")[: 1 + (group.size <= 2)]:
            found = group.attention(*arrays, **given, by=by)
            np.testing.assert_allclose(found, out[..., rows, :], rtol=0, atol=1e-12)
        results = out[..., rows, :], lse[..., rows]
        grads = group.attention_backward(q[..., rows, :], *arrays, *results, **given, wrt=("bias", "k"))
        of_rows = expected.bias[:, rows]
        of_rows = of_rows if group.rank else of_rows.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(grads.bias, of_rows, rtol=0, atol=1e-11)
        np.testing.assert_allclose(grads.k, expected.k[..., rows, :], rtol=0, atol=1e-11)


def check_bias_of_few_rows(group: Group) -> None:
    """No rank has two rows: a bias that is the same on all ranks is shared by all rows."""
    for length in (1, 2):
        q, k, v = operands(length, dtype=np.float64)
        bias = np.random.default_rng(0).standard_normal((4, 1, length))
        found, expected = gradients(group, q, k, v, {"bias": bias}, wrt=("bias",))
        np.testing.assert_allclose(found["bias"], expected["bias"], rtol=0, atol=1e-12)


def check_errors(group: Group) -> dict[str, str]:
    q, k, v = operands(60)
    rows = group.rows(60)
    q, k, v = own(group, rows, q, k, v)
    lse = q[..., 0]

    def error(*arrays: Any, **options: Any) -> str:
        return error_of_all(group, lambda: group.attention_backward(*arrays, rows=rows, **options))

    return {
        "sinks": error(q, q, k, v, q, lse, wrt=("sinks",)),
        "r": error(q, q, k, v, q, lse, wrt=("r",)),
        "grad_out": error(q[..., :3], q, k, v, q, lse),
        "lse": error(q, q, k, v, q, lse[:, :2]),
        "mask": error(q, q, k, v, q, lse, mask=np.ones((60, 60), bool)),
        "dropout": error(q, q, k, v, q, lse, dropout=0.5),
    }
