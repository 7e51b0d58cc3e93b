"""flash_attn_with_kvcache: rows, chosen rows and pages, rotation, left padding, and new tokens in place."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flash_reference import OPTIONS, close, paged, plain

from selfattn import _core, compat


def rotated(x: Any, cos: Any, sin: Any, places: Any, interleaved: bool) -> Any:
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

    def expected(self, q: Any, starts: Any, rotate: Any, **options: Any) -> list[Any]:
        """Update k and v, and return (out, lse, weights) of each sequence."""
        found = []
        for b, length in enumerate(self.lengths):
            total = length + self.new
            query = rotate(q[b], np.full(q.shape[1], length) + (np.arange(q.shape[1]) if in_order(options) else 0))
            if self.new:
                self.k[b, length:total] = rotate(self.options["k"][b], length + np.arange(self.new))
                self.v[b, length:total] = self.options["v"][b]
            found.append(plain(query, self.k[b, starts[b] : total], self.v[b, starts[b] : total], b, **options))
        return found


def in_order(options: Any) -> bool:
    return options.get("causal", False) or options.get("window_size", (-1, -1)) != (-1, -1)


# Numbers of queries and of new tokens, and their rotation. Without new tokens, rotation is an error.
STEPS = [(q_len, new, rotary) for q_len, new in ((1, 1), (3, 3), (2, 4)) for rotary in (None, "interleaved", "halves")]
STEPS += [(1, 0, None), (5, 0, None)]


@pytest.mark.dtypes("float32")
@pytest.mark.parametrize("kind", ["rows", "chosen rows", "pages"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("q_len", "new", "rotary"), STEPS)
@pytest.mark.parametrize("leftpad", [False, True])
def test_flash_attn_with_kvcache(
    normal: Any, rng: Any, kind: str, name: str, q_len: int, new: int, rotary: str | None, leftpad: bool
) -> None:
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
    rotate = lambda x, places: rotated(x, cos, sin, places, rotary == "interleaved") if rotary else x  # noqa: E731
    for b, (own_out, own_lse, _) in enumerate(caches.expected(q, starts, rotate, **OPTIONS[name])):
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


@pytest.mark.one_isa(reason="rotation is scalar code")
@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64"])
def test_tables_of_any_type(normal: Any, rng: Any, name: str) -> None:
    dtype = np.dtype(getattr(pytest.importorskip("ml_dtypes"), name) if name == "bfloat16" else name)
    angles = rng.uniform(0, 6, (9, 3))
    cos, sin = (table[::-1].astype(dtype)[::-1] for table in (np.cos(angles), np.sin(angles)))
    for x_dtype, ulp in ((np.float16, 2**-10), (np.float32, 2**-23), (np.float64, 2**-52)):
        q, k, v = (x.astype(x_dtype) for x in normal(3, 1, 2, 2, 8))
        cache = np.zeros((2, 1, 9, 2, 8), x_dtype)
        compat.flash_attn_with_kvcache(q, cache[0], cache[1], k, v, cos, sin, cache_seqlens=4, rotary_interleaved=False)
        wide = [table.astype(np.float64) for table in (cos, sin)]
        wanted = rotated(k[0].astype(np.float64), *wide, np.arange(4, 6), False)
        # Tables are used as they are, and the result is rounded once.
        assert np.max(abs(cache[0, 0, 4:6] - wanted)) <= ulp * np.max(abs(wanted))


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
    "v_cache has shape .*the same for keys and values": {"v_cache": np.zeros((2, 8, 2, 8), np.float32)},
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


@pytest.mark.one_isa
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


@pytest.mark.one_isa
@pytest.mark.parametrize("kind", ["rows", "chosen rows", "pages"])
def test_an_interrupt_leaves_caches_as_they_were(normal: Any, rng: Any, kind: str, monkeypatch: Any) -> None:
    caches, original = Caches(normal, rng, kind, 6), _core.attend_cache
    arrays = caches.k_cache, caches.v_cache
    before = [array.tobytes() for array in arrays]
    written = []

    def then_interrupted(*arguments: Any) -> None:
        original(*arguments)
        written.extend(array.tobytes() for array in arrays)
        raise KeyboardInterrupt

    monkeypatch.setattr(_core, "attend_cache", then_interrupted)
    caches.options["cache_seqlens"] = lengths = np.array([6, 3, 5])
    with pytest.raises(KeyboardInterrupt):
        compat.flash_attn_with_kvcache(normal(3, 2, 4, 8), *arrays, **caches.options)
    assert all(new != old for new, old in zip(written, before, strict=True))
    assert [array.tobytes() for array in arrays] == before
    assert lengths.tolist() == [6, 3, 5]


@pytest.mark.one_isa
@pytest.mark.parametrize("shape", [(3,), (1,), (1, 4), (4, 2), ()])
def test_slopes_with_pages_have_a_shape(shape: Any) -> None:
    from selfattn.compat import flash_attn_varlen_func

    q, pages = np.ones((6, 4, 8), np.float32), np.ones((4, 4, 2, 8), np.float32)
    arguments = (q, pages, pages, [0, 2, 6], [0, 3, 9], 4, 6)
    table = [[0, 0, 0], [1, 2, 3]]
    assert flash_attn_varlen_func(*arguments, block_table=table, alibi_slopes=np.ones((2, 4))).shape == q.shape
    with pytest.raises(ValueError, match="flash_attn_varlen_func: alibi_slopes has shape"):
        flash_attn_varlen_func(*arguments, block_table=table, alibi_slopes=np.ones(shape))
