"""Functions with the names of PyTorch's and JAX's, against the originals."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
from typing import Any

import numpy as np
import pytest

from selfattn import compat

# Documented in https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.scaled_dot_product_attention.html
PYTORCH = "query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False"


def close(found: Any, expected: Any, tolerance: float = 2e-6) -> None:
    assert type(found) is np.ndarray
    assert found.shape == expected.shape
    assert np.allclose(found.astype(np.float64), np.asarray(expected, np.float64), rtol=0, atol=tolerance)


def listed(function: Any) -> str:
    parameters = inspect.signature(function).parameters.values()
    return ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters)


@pytest.mark.one_isa
def test_names_and_order_of_arguments_as_in_pytorch() -> None:
    assert listed(compat.scaled_dot_product_attention) == PYTORCH
    kinds = [p.kind for p in inspect.signature(compat.scaled_dot_product_attention).parameters.values()]
    keyword_only = inspect.Parameter.KEYWORD_ONLY
    assert [kind is keyword_only for kind in kinds] == [False] * 6 + [True] * 2


@pytest.mark.one_isa
@pytest.mark.filterwarnings("ignore")
def test_names_and_order_of_arguments_as_in_jax() -> None:
    jax = pytest.importorskip("jax")
    theirs, ours = (
        inspect.signature(f).parameters.values() for f in (jax.nn.dot_product_attention, compat.dot_product_attention)
    )
    assert [(p.name, p.kind, p.default) for p in ours] == [(p.name, p.kind, p.default) for p in theirs]


PYTORCH_CASES: dict[str, Any] = {
    "plain": ((2, 4, 9, 8), (2, 4, 7, 8), {}),
    "causal": ((2, 4, 9, 8), (2, 4, 7, 8), {"is_causal": True}),
    "causal, more keys": ((2, 4, 7, 8), (2, 4, 9, 8), {"is_causal": True}),
    "scale": ((2, 4, 9, 8), (2, 4, 7, 8), {"scale": 0.3}),
    "groups": ((2, 6, 9, 8), (2, 2, 7, 8), {"enable_gqa": True, "is_causal": True}),
    "mask": ((2, 4, 9, 8), (2, 4, 7, 8), {"attn_mask": (4, 1, 7)}),
    "two dimensions": ((9, 8), (7, 8), {}),
    "five dimensions": ((2, 3, 4, 9, 8), (2, 3, 4, 7, 8), {}),
    "one head of keys": ((2, 4, 9, 8), (1, 7, 8), {}),
    "one head of queries": ((9, 8), (2, 4, 7, 8), {"is_causal": True}),
    "no keys": ((2, 4, 9, 8), (2, 4, 0, 8), {}),
}


@pytest.mark.dtypes("float32")
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("case", PYTORCH_CASES)
def test_scaled_dot_product_attention(normal: Any, rng: Any, case: str, kind: str) -> None:
    torch = pytest.importorskip("torch")
    q_shape, k_shape, options = PYTORCH_CASES[case]
    q, k, v = normal(*q_shape), normal(*k_shape), normal(*k_shape)
    theirs = dict(options)
    if "attn_mask" in options:
        mask = rng.random(options["attn_mask"]) < 0.6 if kind == "bool" else normal(*options["attn_mask"])
        options, theirs = {"attn_mask": mask}, {"attn_mask": torch.from_numpy(mask)}
    expected = torch.nn.functional.scaled_dot_product_attention(*map(torch.from_numpy, (q, k, v)), **theirs)
    close(compat.scaled_dot_product_attention(q, k, v, **options), expected.numpy())


def test_arguments_in_pytorchs_order(normal: Any) -> None:
    q, k, v = normal(2, 4, 9, 8), normal(2, 4, 7, 8), normal(2, 4, 7, 8)
    mask = normal(9, 7)
    by_name = compat.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=mask)
    assert np.array_equal(compat.scaled_dot_product_attention(q, k, v, mask, 0.0, False), by_name)


JAX_CASES: dict[str, Any] = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": -0.3},
    "window": {"local_window_size": (3, 2)},
    "one window": {"local_window_size": 2, "is_causal": True},
    "lengths": {"query_seq_lengths": [5, 9], "key_value_seq_lengths": [3, 7]},
    "lengths, causal": {"key_value_seq_lengths": [3, 7], "is_causal": True},
    "lengths, window": {"query_seq_lengths": [1, 8], "key_value_seq_lengths": [7, 6], "local_window_size": (9, 1)},
    "mask": {"mask": (1, 4, 9, 7), "implementation": "xla"},
    "bias": {"bias": (2, 1, 1, 7), "mask": (2, 1, 9, 7)},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", JAX_CASES)
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dot_product_attention(normal: Any, rng: Any, case: str, groups: int, dtype: str) -> None:
    jax = pytest.importorskip("jax")
    kind = jax.numpy.dtype(dtype)
    q, k, v = (x.astype(kind) for x in (normal(2, 9, 4, 8), normal(2, 7, groups, 8), normal(2, 7, groups, 8)))
    options = dict(JAX_CASES[case])
    if "bias" in options:
        options["bias"] = normal(*options["bias"]).astype(kind)
    if "mask" in options:
        options["mask"] = rng.random(options["mask"]) < 0.6
        options["mask"][..., 0] = True
    theirs = {n: np.asarray(x, np.int32) if n.endswith("lengths") else x for n, x in options.items()}
    expected, lse = jax.nn.dot_product_attention(q, k, v, **theirs, return_residual=True)
    found, residual = compat.dot_product_attention(q, k, v, **options, return_residual=True)
    tolerance = {"float32": 2e-6, "bfloat16": 3e-2, "float16": 4e-3}[dtype]
    # If a row sees nothing, JAX gives the mean of all values. The difference is documented, so such rows are left out.
    seen = np.isfinite(residual.astype(np.float32))
    assert np.count_nonzero(seen) * 3 > seen.size
    assert found.dtype == expected.dtype
    close(found * seen[..., None], np.asarray(expected) * seen[..., None], tolerance)
    assert not np.any(found[~seen])
    assert residual.dtype == lse.dtype
    close(residual[seen], np.asarray(lse)[seen], 4 * tolerance)
    assert np.array_equal(compat.dot_product_attention(q, k, v, **options), found)


@pytest.mark.filterwarnings("ignore")
def test_dot_product_attention_of_one_sequence(normal: Any) -> None:
    jax = pytest.importorskip("jax")
    q, k, v, bias = normal(9, 4, 8), normal(7, 2, 8), normal(7, 2, 8), normal(4, 9, 7)
    expected, lse = jax.nn.dot_product_attention(q, k, v, bias, is_causal=True, return_residual=True)
    found, residual = compat.dot_product_attention(q, k, v, bias, is_causal=True, return_residual=True)
    close(found, expected)
    close(residual, lse)


def test_rows_without_keys(normal: Any) -> None:
    q, k, v = normal(1, 5, 2, 8), normal(1, 6, 2, 8), normal(1, 6, 2, 8)
    mask = np.ones((1, 1, 5, 6), bool)
    mask[..., 2, :] = False
    out, residual = compat.dot_product_attention(q, k, v, mask=mask, query_seq_lengths=[4], return_residual=True)
    assert np.array_equal(np.isneginf(residual[0, :, 0]), [False, False, True, False, True])
    assert np.array_equal(np.any(out != 0, axis=(0, 2, 3)), [True, True, False, True, False])
    heads_first = [x.swapaxes(1, 2) for x in (q, k, v)]
    again = compat.scaled_dot_product_attention(*heads_first, attn_mask=mask)
    assert np.array_equal(np.any(again != 0, axis=(0, 1, 3)), [True, True, False, True, True])


PYTORCH_ERRORS: dict[str, Any] = {
    "dropout_p is 0.1": {"dropout_p": 0.1},
    "dropout_p is 'a'": {"dropout_p": "a"},
    "together with is_causal": {"attn_mask": np.ones((5, 6), bool), "is_causal": True},
    "attn_mask has dtype int64": {"attn_mask": np.ones((5, 6), np.int64)},
    "attn_mask has dtype float64, but bool, float32": {"attn_mask": np.ones((5, 6))},
    "attn_mask has shape": {"attn_mask": np.ones(6, bool)},
    "key has dtype float64": {"key": np.ones((1, 2, 6, 8))},
    "key has head_dim 7": {"key": np.ones((1, 2, 6, 7), np.float32)},
    "pass enable_gqa=True": {"query": np.ones((1, 4, 5, 8), np.float32)},
    "do not divide": {"query": np.ones((1, 3, 5, 8), np.float32), "enable_gqa": True},
    "enable_gqa is 1": {"enable_gqa": 1},
    "scale is 'x'": {"scale": "x"},
    "attn_mask has shape \\(5, 7\\), which does not broadcast": {"attn_mask": np.ones((5, 7), bool)},
    "query has head_dim 0": {
        "query": np.ones((1, 2, 5, 0)),
        "key": np.ones((1, 2, 6, 0)),
        "value": np.ones((1, 2, 6, 8)),
    },
}
JAX_ERRORS: dict[str, Any] = {
    "implementation is 'cudnn'": {"implementation": "cudnn"},
    "mask has dtype int64, but bool": {"mask": np.ones((1, 1, 5, 6), np.int64)},
    "bias has shape": {"bias": np.ones((1, 3, 5, 6), np.float32)},
    "mask has shape": {"mask": np.ones((2, 2, 5, 6), bool)},
    "query_seq_lengths has shape": {"query_seq_lengths": [5, 5]},
    "key_value_seq_lengths has dtype float64": {"key_value_seq_lengths": [5.0]},
    "query_seq_lengths holds 9, which is outside 0..5 \\(the length of query\\)": {"query_seq_lengths": [9]},
    "query has 2 heads, which is not a multiple of the 3 heads of key": {
        "key": np.ones((1, 6, 3, 8), np.float32),
        "value": np.ones((1, 6, 3, 8), np.float32),
    },
    "local_window_size is 2.0": {"local_window_size": 2.0},
    "local_window_size is \\(1, 2, 3\\)": {"local_window_size": (1, 2, 3)},
    "local_window_size is -1": {"local_window_size": -1},
    "value has shape": {"value": np.ones((1, 6, 2, 7), np.float32)},
    "key has shape": {"key": np.ones((6, 2, 8), np.float32)},
    "key has a batch of 2": {"key": np.ones((2, 6, 2, 8), np.float32), "value": np.ones((2, 6, 2, 8), np.float32)},
    "is_causal is 1": {"is_causal": 1},
    "scale is nan": {"scale": np.nan},
    "return_residual is 'no'": {"return_residual": "no"},
}


@pytest.mark.one_isa
@pytest.mark.parametrize("message", PYTORCH_ERRORS)
def test_errors_of_scaled_dot_product_attention(normal: Any, message: str) -> None:
    given = {"query": normal(1, 2, 5, 8), "key": normal(1, 2, 6, 8), "value": normal(1, 2, 6, 8)}
    with pytest.raises((TypeError, ValueError), match=f"^scaled_dot_product_attention: .*{message}"):
        compat.scaled_dot_product_attention(**{**given, **PYTORCH_ERRORS[message]})


@pytest.mark.one_isa
@pytest.mark.parametrize("message", JAX_ERRORS)
def test_errors_of_dot_product_attention(normal: Any, message: str) -> None:
    given = {"query": normal(1, 5, 2, 8), "key": normal(1, 6, 2, 8), "value": normal(1, 6, 2, 8)}
    with pytest.raises((TypeError, ValueError), match=f"^dot_product_attention: .*{message}"):
        compat.dot_product_attention(**{**given, **JAX_ERRORS[message]})


@pytest.mark.parametrize("name", ["_flash_attn", "_jax", "_pytorch"])
def test_docstrings_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"selfattn.compat.{name}"))
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.one_isa
@pytest.mark.parametrize("name", compat.__all__)
def test_docstrings_tell_the_differences(name: str) -> None:
    """Each docstring has a table, or refers to that of the function for separate operands."""
    function = getattr(compat, name)
    text = inspect.getdoc(function) or ""
    if "packed" in name:
        assert re.search(r"as from `flash_attn_(varlen_)?func`, whose tables? of differences appl(y|ies)\.", text)
    else:
        assert len(re.findall(r"^=+  =+  =+$", text, re.M)) == 3
    for parameter in inspect.signature(function).parameters:
        assert parameter in text
