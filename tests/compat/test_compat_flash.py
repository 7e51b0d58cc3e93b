"""Functions with the names of flash-attn's, against formulas written from its documentation."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest

from selfattn import compat

# Documented in https://github.com/Dao-AILab/flash-attention, version 2.
COMMON = "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
COMMON += "deterministic=False, return_attn_probs=False"
SIGNATURES = {
    "flash_attn_func": f"q, k, v, {COMMON}",
    "flash_attn_varlen_func": "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, "
    f"{COMMON}, block_table=None",
    "flash_attn_with_kvcache": "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, "
    "cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, "
    "causal=False, window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0, "
    "return_softmax_lse=False",
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (3, 2)},
    "left window": {"window_size": (2, -1), "softmax_scale": 0.5},
    "causal window": {"causal": True, "window_size": (4, 4)},
    "softcap": {"softcap": 2.0},
    "slopes": {"alibi_slopes": np.array([0.5, 0.25, 1.0, 0.1], np.float32), "softcap": 3.0},
    "slopes of rows": {"alibi_slopes": np.linspace(0.1, 1, 12, dtype=np.float32).reshape(3, 4), "causal": True},
}


def plain(q: Any, k: Any, v: Any, b: int = 0, **options: Any) -> Any:
    """Attention of one sequence, (tokens, heads, size), as documented: one score at a time, in float64."""
    options = {"softmax_scale": None, "causal": False, "window_size": (-1, -1), "softcap": 0.0, "alibi_slopes": None,
               **options}  # fmt: skip
    scale = q.shape[-1] ** -0.5 if options["softmax_scale"] is None else options["softmax_scale"]
    k, v = (np.repeat(x.astype(np.float64), q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    scores = np.einsum("qhd,khd->hqk", q.astype(np.float64), k) * scale
    if options["softcap"]:
        scores = options["softcap"] * np.tanh(scores / options["softcap"])
    place, key = np.arange(len(q))[:, None] + len(k) - len(q), np.arange(len(k))
    if options["alibi_slopes"] is not None:
        slopes = options["alibi_slopes"].astype(np.float64)
        slopes = slopes[b] if slopes.ndim == 2 else slopes
        scores -= slopes[:, None, None] * abs(place - key)
    left, right = options["window_size"]
    hidden = np.zeros(scores.shape[1:], bool)
    hidden |= (key > place) & options["causal"]
    hidden |= (key < place - left) & (left >= 0)
    hidden |= (key > place + right) & (right >= 0)
    scores[:, hidden] = -np.inf
    with np.errstate(divide="ignore"):
        lse = np.log(np.sum(np.exp(scores), axis=-1))
    weights = np.exp(scores - np.where(np.isneginf(lse), 0, lse)[..., None])
    return np.einsum("hqk,khd->qhd", weights, v), lse, weights


def close(found: Any, expected: Any, tolerance: float = 3e-6) -> None:
    assert type(found) is np.ndarray
    assert found.shape == expected.shape
    assert np.allclose(found.astype(np.float64), expected, rtol=0, atol=tolerance)


def call(function: Any, reference: Any, given: Any, options: dict[str, Any], tolerance: float = 3e-6) -> None:
    """Compare a function's out, lse and weights with those of a list of sequences."""
    out, lse, weights = function(**given, **options, return_attn_probs=True)
    for b, (own_out, own_lse, own_weights) in enumerate(reference):
        close(out[b], own_out, tolerance)
        close(lse[b], own_lse, tolerance)
        close(weights[b], own_weights, tolerance)
    assert np.array_equal(function(**given, **options), out)


@pytest.mark.parametrize("name", SIGNATURES)
def test_names_and_order_of_arguments(name: str) -> None:
    parameters = inspect.signature(getattr(compat, name)).parameters.values()
    found = ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters)
    assert found == SIGNATURES[name]
    assert {p.kind for p in parameters} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}


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


def paged(k: Any, lengths: Any, rng: Any, page_size: int = 4, spare: int = 3) -> Any:
    """Scatter sequences (count, tokens, heads, size) over pages in a random order; unused entries are invalid."""
    runs = -(-k.shape[1] // page_size)
    pages = np.full((len(k) * runs + spare, page_size, *k.shape[2:]), np.nan, k.dtype)
    table = rng.permutation(len(pages))[: len(k) * runs].reshape(len(k), runs).astype(np.int32)
    for b, length in enumerate(lengths):
        for t in range(length):
            pages[table[b, t // page_size], t % page_size] = k[b, t]
        table[b, -(-length // page_size) :] = 999
    return pages, table


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


def turned(x: Any, cos: Any, sin: Any, places: Any, interleaved: bool) -> Any:
    """Multiply pairs by complex numbers of length 1."""
    half = cos.shape[1]
    one, other = (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(half), slice(half, 2 * half))
    z = (x[..., one] + 1j * x[..., other]) * (cos + 1j * sin)[places][:, None]
    result = x.astype(np.float64)
    result[..., one], result[..., other] = z.real, z.imag
    return result


class Caches:
    """Caches of 3 sequences with room for 12 tokens, in rows or pages, and their expected contents."""

    def __init__(self, normal: Any, rng: Any, kind: str, new: int) -> None:
        self.lengths = np.array([8, 3, 5], np.int32)
        self.k, self.v = normal(3, 12, 2, 8), normal(3, 12, 2, 8)
        self.options: dict[str, Any] = {"cache_seqlens": self.lengths}
        if kind == "pages":
            both, table = paged(np.concatenate([self.k, self.v], axis=-1), [12, 12, 12], rng)
            self.k_cache, self.v_cache = np.ascontiguousarray(both[..., :8]), np.ascontiguousarray(both[..., 8:])
            self.options["block_table"] = table
            self.places = table[:, np.arange(12) // 4], np.broadcast_to(np.arange(12) % 4, (3, 12))
        else:
            rows = np.array([4, 0, 2]) if kind == "chosen rows" else np.arange(3)
            self.k_cache, self.v_cache = normal(max(rows) + 1, 12, 2, 8), normal(max(rows) + 1, 12, 2, 8)
            self.k_cache[rows], self.v_cache[rows] = self.k, self.v
            if kind == "chosen rows":
                self.options["cache_batch_idx"] = rows
            self.places = np.broadcast_to(rows[:, None], (3, 12)), np.broadcast_to(np.arange(12), (3, 12))
        if new:
            self.options["k"], self.options["v"] = normal(3, new, 2, 8), normal(3, new, 2, 8)
        self.new = new

    def expected(self, q: Any, starts: Any, turn: Any, **options: Any) -> list[Any]:
        """Update k and v, and return (out, lse, weights) of each sequence."""
        found = []
        for b, length in enumerate(self.lengths):
            total = length + self.new
            query = turn(q[b], np.full(q.shape[1], length) + (np.arange(q.shape[1]) if in_order(options) else 0))
            if self.new:
                self.k[b, length:total] = turn(self.options["k"][b], length + np.arange(self.new))
                self.v[b, length:total] = self.options["v"][b]
            found.append(plain(query, self.k[b, starts[b] : total], self.v[b, starts[b] : total], b, **options))
        return found


def in_order(options: Any) -> bool:
    return options.get("causal", False) or options.get("window_size", (-1, -1)) != (-1, -1)


@pytest.mark.parametrize("kind", ["rows", "chosen rows", "pages"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("tokens", [(1, 0), (1, 1), (3, 3), (2, 4), (5, 0)], ids=str)
@pytest.mark.parametrize("rotary", [None, "interleaved", "halves"])
@pytest.mark.parametrize("leftpad", [False, True])
def test_flash_attn_with_kvcache(
    normal: Any, rng: Any, kind: str, name: str, tokens: Any, rotary: Any, leftpad: bool
) -> None:
    q_len, new = tokens
    if rotary and not new:
        rotary = None  # nothing to rotate, which raises another error
    caches, q = Caches(normal, rng, kind, new), normal(3, q_len, 4, 8)
    options = dict(caches.options)
    angles = rng.uniform(0, 6, (12, 3))
    cos, sin = np.cos(angles), np.sin(angles)
    if rotary:
        options.update(rotary_cos=cos, rotary_sin=sin, rotary_interleaved=rotary == "interleaved")
    starts = np.array([2, 0, 5]) if leftpad else np.zeros(3, int)
    if leftpad:
        options["cache_leftpad"] = starts
    untouched = caches.k_cache.copy(), caches.v_cache.copy()
    out, lse = compat.flash_attn_with_kvcache(
        q, caches.k_cache, caches.v_cache, **options, **OPTIONS[name], return_softmax_lse=True
    )
    turn = lambda x, places: turned(x, cos, sin, places, rotary == "interleaved") if rotary else x  # noqa: E731
    for b, (own_out, own_lse, _) in enumerate(caches.expected(q, starts, turn, **OPTIONS[name])):
        close(out[b], own_out)
        close(lse[b], own_lse)
    # Only the new tokens were written, in place.
    for cache, before, whole in zip((caches.k_cache, caches.v_cache), untouched, (caches.k, caches.v), strict=True):
        before[caches.places] = whole
        assert np.allclose(cache, before, rtol=0, atol=1e-6, equal_nan=True)


def test_whole_caches_and_one_length_for_all(normal: Any) -> None:
    q, k, v = normal(2, 3, 4, 8), normal(2, 9, 2, 8), normal(2, 9, 2, 8)
    whole = compat.flash_attn_with_kvcache(q, k, v, causal=True)
    close(whole[0], plain(q[0], k[0], v[0], causal=True)[0])
    for splits in (1, 7):
        again = compat.flash_attn_with_kvcache(q, k, v, cache_seqlens=9, causal=True, num_splits=splits)
        assert np.array_equal(again, whole)
    part = compat.flash_attn_with_kvcache(q, k, v, cache_seqlens=4)
    close(part[1], plain(q[1], k[1, :4], v[1, :4])[0])
    none = compat.flash_attn_with_kvcache(q, k, v, cache_seqlens=0)
    assert not none.any()


@pytest.mark.parametrize("empty", ["batch", "queries", "new tokens", "value size", "pages"])
def test_empty_dimensions(normal: Any, empty: str) -> None:
    batch, q_len = (0 if empty == "batch" else 2), (0 if empty == "queries" else 3)
    q, k, v = normal(batch, q_len, 4, 8), normal(batch, 9, 2, 8), normal(batch, 9, 2, 0 if empty == "value size" else 8)
    options: dict[str, Any] = {"cache_seqlens": 0 if empty == "pages" else 9}
    if empty == "new tokens":
        options |= {"k": normal(2, 0, 2, 8), "v": normal(2, 0, 2, 8)}
    if empty == "pages":
        k, v, options["block_table"] = k[:0], v[:0], np.zeros((2, 3), int)
    out = compat.flash_attn_with_kvcache(q, k, v, **options)
    assert out.shape == (batch, q_len, 4, v.shape[3])
    if empty == "new tokens":
        close(out[1], plain(q[1], k[1], v[1])[0])
    else:
        assert not out.any()


def test_narrow_caches_without_copies(normal: Any) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    for dtype, tolerance in ((np.float16, 2e-3), (ml_dtypes.bfloat16, 2e-2)):
        cache = np.zeros((2, 2, 40, 3, 8), dtype)[:, :, 2:36]  # not contiguous as a whole
        cache[:, :, :20] = normal(2, 2, 20, 3, 8).astype(dtype)
        q, k, v = (normal(2, 1, n, 8).astype(dtype) for n in (6, 3, 3))
        out = compat.flash_attn_with_kvcache(q, cache[0], cache[1], k, v, cache_seqlens=20)
        assert np.array_equal(cache[0][:, 20:21], k)
        assert np.array_equal(cache[1][:, 20:21], v)
        close(out[1], plain(q[1], cache[0][1, :21], cache[1][1, :21])[0], tolerance)


def test_torch_tensors_are_caches_too(normal: Any) -> None:
    torch = pytest.importorskip("torch")
    q, k, v = normal(2, 1, 4, 8), normal(2, 1, 2, 8), normal(2, 1, 2, 8)
    caches = normal(2, 2, 9, 2, 8)
    tensors = torch.from_numpy(caches.copy())
    expected = compat.flash_attn_with_kvcache(q, caches[0], caches[1], k, v, cache_seqlens=4)
    found = compat.flash_attn_with_kvcache(
        torch.from_numpy(q), tensors[0], tensors[1], torch.from_numpy(k), torch.from_numpy(v), cache_seqlens=4
    )
    assert np.array_equal(found, expected)
    assert np.array_equal(tensors.numpy(), caches)


CACHE_ERRORS: dict[str, Any] = {
    "num_splits is -1": {"num_splits": -1},
    "num_splits is True": {"num_splits": True},
    "cache_seqlens is missing": {"cache_seqlens": None},
    "cache_seqlens has shape": {"cache_seqlens": [1, 2, 3]},
    "sequence 0 has 10 tokens, but k_cache has room for 9": {"cache_seqlens": 9},
    "sequence 1 has -1 tokens": {"cache_seqlens": [1, -1]},
    "sequence 0 has 9223372036854775807 tokens": {"cache_seqlens": 1 << 80},
    "sequence 0 has 9223372036854775807 tokens,": {"cache_seqlens": [np.iinfo(np.int64).max] * 2},
    "'v' is given|v is given without k|k is given without v": {"v": None},
    "k has shape": {"k": np.zeros((2, 1, 3, 8), np.float32)},
    "v has shape": {"v": np.zeros((2, 2, 2, 8), np.float32)},
    "k_cache has dtype float64 but q has float32": {"k_cache": np.zeros((2, 9, 2, 8))},
    "v_cache is a list": {"v_cache": np.zeros((2, 9, 2, 8), np.float32).tolist()},
    "k_cache has 3 rows but q has 2": {"k_cache": np.zeros((3, 9, 2, 8), np.float32)},
    "v_cache has shape .*alike for keys and values": {"v_cache": np.zeros((2, 8, 2, 8), np.float32)},
    "k_cache holds pages whose last dimension is not contiguous": {
        "k_cache": np.zeros((2, 9, 2, 16), np.float32)[..., ::2]
    },
    "room for a token": {"k_cache": np.zeros((2, 0, 2, 8), np.float32), "v_cache": np.zeros((2, 0, 2, 8), np.float32)},
    "k_cache is read-only": {"k_cache": np.broadcast_to(np.float32(0), (2, 9, 2, 8)).copy().view()},
    "cache_batch_idx holds 2, which is outside 0..1": {"cache_batch_idx": [0, 2]},
    "cache_batch_idx has shape": {"cache_batch_idx": [0]},
    "two rows of k would be written to one place": {"cache_batch_idx": [1, 1]},
    "cache_leftpad holds 5, which is outside 0..4": {"cache_leftpad": [0, 5]},
    "together with block_table": {"block_table": [[0], [1]], "cache_batch_idx": [0, 1]},
    "block_table has shape": {"block_table": [0, 1]},
    "block_table gives sequence 1 a page outside": {"block_table": [[0], [7]]},
    "block_table gives sequence 0 a page outside": {"block_table": [[-1], [1]]},
    "rotary_cos and rotary_sin are needed together": {"rotary_cos": np.zeros((9, 4))},
    "without k and v": {"rotary_cos": np.zeros((9, 4)), "rotary_sin": np.zeros((9, 4)), "k": None, "v": None},
    "rotary_sin has shape": {"rotary_cos": np.zeros((9, 4)), "rotary_sin": np.zeros((9, 3))},
    "rotary_cos has shape": {"rotary_cos": np.zeros((9, 5)), "rotary_sin": np.zeros((9, 5))},
    "position 4 is needed": {"rotary_cos": np.zeros((4, 4)), "rotary_sin": np.zeros((4, 4))},
    "rotary_interleaved is 'yes'": {"rotary_interleaved": "yes"},
    "window_size is 3": {"window_size": 3},
    "softcap is -1": {"softcap": -1.0},
    "causal is None": {"causal": None},
    "softmax_scale is inf": {"softmax_scale": np.inf},
    "return_softmax_lse is 1": {"return_softmax_lse": 1},
    "alibi_slopes has shape": {"alibi_slopes": np.ones((3, 4), np.float32)},
    "q has head_dim 6": {"q": np.zeros((2, 1, 4, 6), np.float32)},
}


@pytest.mark.parametrize("message", CACHE_ERRORS)
def test_errors_leave_caches_as_they_were(normal: Any, message: str) -> None:
    caches = normal(2, 2, 9, 2, 8)
    before = caches.copy()
    given = {"q": normal(2, 1, 4, 8), "k_cache": caches[0], "v_cache": caches[1], "cache_seqlens": 4}
    given |= {"k": normal(2, 1, 2, 8), "v": normal(2, 1, 2, 8)}
    given |= CACHE_ERRORS[message]
    if "read-only" in message:
        given["k_cache"].flags.writeable = False
    with pytest.raises((TypeError, ValueError), match=message):
        compat.flash_attn_with_kvcache(**given)
    assert np.array_equal(caches, before)


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


@pytest.mark.parametrize("message", VARLEN_ERRORS)
def test_errors_of_flash_attn_varlen_func(normal: Any, message: str) -> None:
    given: dict[str, Any] = {"q": normal(5, 4, 8), "k": normal(5, 2, 8), "v": normal(5, 2, 8)}
    given |= {"cu_seqlens_q": [0, 2, 5], "cu_seqlens_k": [0, 3, 5], "max_seqlen_q": 3, "max_seqlen_k": 5}
    with pytest.raises((TypeError, ValueError), match=f"^flash_attn_varlen_func: .*({message})"):
        compat.flash_attn_varlen_func(**{**given, **VARLEN_ERRORS[message]})


@pytest.mark.parametrize("shape", [(3,), (1,), (1, 4), (4, 2), ()])
def test_slopes_beside_pages_have_a_shape(shape: Any) -> None:
    from selfattn.compat import flash_attn_varlen_func

    q, pages = np.ones((6, 4, 8), np.float32), np.ones((4, 4, 2, 8), np.float32)
    arguments = (q, pages, pages, [0, 2, 6], [0, 3, 9], 4, 6)
    table = [[0, 0, 0], [1, 2, 3]]
    assert flash_attn_varlen_func(*arguments, block_table=table, alibi_slopes=np.ones((2, 4))).shape == q.shape
    with pytest.raises(ValueError, match="flash_attn_varlen_func: alibi_slopes has shape"):
        flash_attn_varlen_func(*arguments, block_table=table, alibi_slopes=np.ones(shape))
