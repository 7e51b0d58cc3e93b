"""Functions with the names of flash-attn's, against formulas written from its documentation."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
from flash_reference import OPTIONS, close, paged, plain

from selfattn import compat

# Documented in https://github.com/Dao-AILab/flash-attention, version 2.
COMMON = "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
COMMON += "deterministic=False, return_attn_probs=False"
SIGNATURES = {
    "flash_attn_func": f"q, k, v, {COMMON}",
    "flash_attn_varlen_func": "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, "
    f"{COMMON}, block_table=None",
    "flash_attn_qkvpacked_func": f"qkv, {COMMON}",
    "flash_attn_kvpacked_func": f"q, kv, {COMMON}",
    "flash_attn_varlen_qkvpacked_func": f"qkv, cu_seqlens, max_seqlen, {COMMON}",
    "flash_attn_varlen_kvpacked_func": "q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, " + COMMON,
    "flash_attn_with_kvcache": "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, "
    "cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, "
    "causal=False, window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0, "
    "return_softmax_lse=False",
}


def call(function: Any, reference: Any, given: Any, options: dict[str, Any], tolerance: float = 3e-6) -> None:
    """Compare a function's out, lse and weights with those of a list of sequences."""
    out, lse, weights = function(**given, **options, return_attn_probs=True)
    for b, (own_out, own_lse, own_weights) in enumerate(reference):
        close(out[b], own_out, tolerance)
        close(lse[b], own_lse, tolerance)
        close(weights[b], own_weights, tolerance)
    assert np.array_equal(function(**given, **options), out)


@pytest.mark.one_isa
@pytest.mark.parametrize("name", SIGNATURES)
def test_names_and_order_of_arguments(name: str) -> None:
    parameters = inspect.signature(getattr(compat, name)).parameters.values()
    found = ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters)
    assert found == SIGNATURES[name]
    assert {p.kind for p in parameters} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}


@pytest.mark.dtypes("float32")
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("lengths", [(6, 6), (4, 9), (9, 4), (1, 8)], ids=str)
@pytest.mark.parametrize("groups", [4, 2])
def test_flash_attn_func(normal: Any, name: str, lengths: Any, groups: int) -> None:
    q_len, kv_len = lengths
    q, k, v = normal(3, q_len, 4, 8), normal(3, kv_len, groups, 8), normal(3, kv_len, groups, 5)
    reference = [plain(q[b], k[b], v[b], b, **OPTIONS[name]) for b in range(3)]
    call(compat.flash_attn_func, reference, {"q": q, "k": k, "v": v}, OPTIONS[name])


def test_causal_pictures_of_the_documentation() -> None:
    """Two queries on five keys, and five on two: 1 if a key is visible."""
    for q_len, kv_len, seen in (
        (2, 5, ["11110", "11111"]),
        (5, 2, ["00", "00", "00", "10", "11"]),
    ):
        q, k = np.zeros((1, q_len, 1, 4), np.float32), np.zeros((1, kv_len, 1, 4), np.float32)
        out, lse, weights = compat.flash_attn_func(q, k, k + 1, causal=True, return_attn_probs=True)
        assert np.array_equal(weights[0, 0] > 0, np.array([[c == "1" for c in row] for row in seen]))
        rows = np.array(["1" in row for row in seen])
        assert np.array_equal(out[0, :, 0, 0], rows)
        assert np.array_equal(np.isneginf(lse[0, 0]), ~rows)


def test_narrow_types(normal: Any) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    for dtype, tolerance in ((np.float16, 2e-3), (ml_dtypes.bfloat16, 2e-2)):
        q, k, v = (normal(2, 9, 4, 8).astype(dtype) for _ in "qkv")
        found = compat.flash_attn_func(q, k, v, 0.0, None, True)
        assert found.dtype == dtype
        close(found[1], plain(q[1], k[1], v[1], causal=True)[0], tolerance)


VARLEN = {"starts_q": [0, 4, 4, 10], "starts_k": [0, 7, 9, 14]}


@pytest.mark.dtypes("float32")
@pytest.mark.parametrize("name", OPTIONS)
def test_flash_attn_varlen_func(normal: Any, name: str) -> None:
    starts_q, starts_k = (np.array(x, np.int32) for x in VARLEN.values())
    q, k, v = normal(10, 4, 8), normal(14, 2, 8), normal(14, 2, 5)
    given = (q, k, v, starts_q, starts_k, 6, 8)
    out, lse, weights = compat.flash_attn_varlen_func(*given, **OPTIONS[name], return_attn_probs=True)
    assert weights.shape == (3, 4, 6, 8)
    for b in range(3):
        rows, keys = slice(*starts_q[b : b + 2]), slice(*starts_k[b : b + 2])
        own_out, own_lse, own_weights = plain(q[rows], k[keys], v[keys], b, **OPTIONS[name])
        close(out[rows], own_out)
        close(lse[:, rows], own_lse)
        padded = np.zeros((4, 6, 8))
        padded[:, : own_weights.shape[1], : own_weights.shape[2]] = own_weights
        close(weights[b], padded)
    assert np.array_equal(compat.flash_attn_varlen_func(*given, **OPTIONS[name]), out)


@pytest.mark.dtypes("float32")
@pytest.mark.parametrize("name", OPTIONS)
def test_flash_attn_varlen_func_with_pages(normal: Any, rng: Any, name: str) -> None:
    starts_q, lengths = np.array(VARLEN["starts_q"]), np.array([7, 2, 5])
    q, k, v = normal(10, 4, 8), normal(3, 7, 2, 8), normal(3, 7, 2, 8)
    both, table = paged(np.concatenate([k, v], axis=-1), lengths, rng)
    starts_k = np.array([0, *np.cumsum(lengths)])
    given = (q, both[..., :8], both[..., 8:], starts_q, starts_k, 6, 7)
    out = compat.flash_attn_varlen_func(*given, **OPTIONS[name], block_table=table)
    for b in range(3):
        rows, length = slice(*starts_q[b : b + 2]), lengths[b]
        close(out[rows], plain(q[rows], k[b, :length], v[b, :length], b, **OPTIONS[name])[0])


@pytest.mark.dtypes("float32")
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("varlen", [False, True])
def test_packed_operands(normal: Any, name: str, varlen: bool) -> None:
    """They give the bits of the separate operands, whose tests have formulas."""
    front = (14,) if varlen else (3, 6)
    qkv, kv = normal(*front, 3, 4, 8), normal(*front, 2, 2, 8)
    q, k, v = (qkv[..., i, :, :] for i in range(3))
    starts = np.array([0, 7, 7, 14])
    one, two = ((starts, 7), (starts, starts, 7, 9)) if varlen else ((), ())
    prefix = "flash_attn_varlen" if varlen else "flash_attn"
    separate, of_all, of_keys = (getattr(compat, f"{prefix}_{x}func") for x in ("", "qkvpacked_", "kvpacked_"))
    options = OPTIONS[name]
    assert np.array_equal(of_all(qkv, *one, **options), separate(q, k, v, *one[:1] * 2, *one[1:] * 2, **options))
    expected = separate(q, kv[..., 0, :, :], kv[..., 1, :, :], *two, **options, return_attn_probs=True)
    found = of_keys(q, kv, *two, **options, return_attn_probs=True)
    assert all(np.array_equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.one_isa
def test_packed_operands_are_read_in_place(normal: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    module = inspect.getmodule(inspect.unwrap(compat.flash_attn_func))
    monkeypatch.setattr(module, "attention", lambda *operands, **_: seen.extend(operands))
    qkv = normal(2, 5, 3, 4, 8)
    compat.flash_attn_qkvpacked_func(qkv)
    for i, x in enumerate(seen):
        assert x.ctypes.data == qkv[:, :, i].ctypes.data
        assert x.strides == qkv[:, :, i].strides


FLASH_ERRORS: dict[str, Any] = {
    "dropout_p is 0.5": {"dropout_p": 0.5},
    "softmax_scale is '1'": {"softmax_scale": "1"},
    "causal is 1": {"causal": 1},
    "window_size is 4": {"window_size": 4},
    "window_size is \\(None, 0\\)": {"window_size": (None, 0)},
    "softcap is -2": {"softcap": -2.0},
    "deterministic is 0": {"deterministic": 0},
    "return_attn_probs is 0": {"return_attn_probs": 0},
    "alibi_slopes": {"alibi_slopes": np.ones(3, np.float32)},
    "k has dtype float64 but q has float32": {"k": np.ones((5, 2, 8))},
}
VARLEN_ERRORS: dict[str, Any] = {
    "max_seqlen_q is 2, but cu_seqlens_q has a sequence of 3": {"max_seqlen_q": 2},
    "max_seqlen_k is 4.0": {"max_seqlen_k": 4.0},
    "cu_seqlens_q must start with 0": {"cu_seqlens_q": [1, 5]},
    "cu_seqlens_k must start with 0 and never fall": {"cu_seqlens_k": [0, 5, 3, 5]},
    "cu_seqlens_k has shape": {"cu_seqlens_k": [[0, 5]]},
    "cu_seqlens_q goes from 0 to 3": {"cu_seqlens_q": [0, 3]},
    "return_attn_probs is True.*block_table": {"return_attn_probs": True, "block_table": [[0]]},
    "q has shape": {"q": np.ones((1, 5, 4, 8), np.float32)},
    "k has shape": {"block_table": [[0], [1]]},
}


@pytest.mark.one_isa
@pytest.mark.parametrize("message", FLASH_ERRORS)
@pytest.mark.parametrize("name", ["flash_attn_func", "flash_attn_varlen_func"])
def test_errors(normal: Any, name: str, message: str) -> None:
    given: dict[str, Any] = {"q": normal(5, 4, 8), "k": normal(5, 2, 8), "v": normal(5, 2, 8), **FLASH_ERRORS[message]}
    if name == "flash_attn_func":
        given.update((x, given[x][None]) for x in "qkv")
    else:
        given.update(cu_seqlens_q=[0, 2, 5], cu_seqlens_k=[0, 3, 5], max_seqlen_q=3, max_seqlen_k=3)
    with pytest.raises((TypeError, ValueError), match=f"^{name}: .*({message})"):
        getattr(compat, name)(**given)


@pytest.mark.one_isa
@pytest.mark.parametrize("message", VARLEN_ERRORS)
def test_errors_of_flash_attn_varlen_func(normal: Any, message: str) -> None:
    given: dict[str, Any] = {"q": normal(5, 4, 8), "k": normal(5, 2, 8), "v": normal(5, 2, 8)}
    given |= {"cu_seqlens_q": [0, 2, 5], "cu_seqlens_k": [0, 3, 5], "max_seqlen_q": 3, "max_seqlen_k": 5}
    with pytest.raises((TypeError, ValueError), match=f"^flash_attn_varlen_func: .*({message})"):
        compat.flash_attn_varlen_func(**{**given, **VARLEN_ERRORS[message]})
