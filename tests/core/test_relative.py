"""Relative attention: against float64, against the paper's shift, and segments against one long pass."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
from array_layouts import misaligned

import selfattn as sa
from selfattn import reference

# batch, heads, kv heads, segment, memory, head_dim, value_dim: row and tile kernel, several blocks, stretches of keys
# and row blocks, grouped heads, ranges of keys.
SHAPES = [
    (1, 1, 1, 1, 0, 8, 8),
    (2, 2, 2, 5, 3, 16, 7),
    (1, 2, 2, 1, 700, 16, 16),
    (1, 1, 1, 48, 0, 64, 64),
    (2, 4, 2, 97, 130, 24, 24),
    (1, 2, 2, 200, 600, 33, 64),
    (2, 6, 2, 3, 20, 16, 16),
    (1, 3, 1, 20, 2500, 8, 8),
]
DTYPES = (np.float32, np.float64, np.float16, "bfloat16")


class Drawn(NamedTuple):
    q: Any
    k: Any
    v: Any
    r: Any
    u: Any
    w: Any


@pytest.fixture
def draw(rng: np.random.Generator) -> Any:
    def make(shape: Any, rows: int | None = None, *, dtype: Any = np.float32, shared: bool = False) -> Drawn:
        pytest.importorskip("ml_dtypes")  # teaches NumPy bfloat16
        batch, heads, kv_heads, segment, memory, dim, value_dim = shape
        rows = segment + memory if rows is None else rows

        def normal(*extents: int) -> Any:
            return rng.standard_normal(extents).astype(dtype)

        q, k = normal(batch, heads, segment, dim), normal(batch, kv_heads, memory + segment, dim)
        v = normal(batch, kv_heads, memory + segment, value_dim)
        r = normal(rows, dim) if shared else normal(heads, rows, dim)
        return Drawn(q, k, v, r, *rng.standard_normal((2, heads, dim)))

    return make


@pytest.fixture
def hold(assert_accurate: Any) -> Any:
    """Compute and return everything, compare it with float64, and return out."""

    def run(
        x: Drawn, memory: int, *, causal: bool = True, r_origin: int = 0, trivial: bool = False, **options: Any
    ) -> Any:
        precise = np.longdouble if x.q.dtype == np.float64 else np.float64
        terms = (x.r, x.u, x.w, r_origin)
        exact = reference.attention(
            x.q, x.k, x.v, causal=causal, q_offset=memory, relative=terms, dtype=precise, **options
        )
        options |= {"mem_len": memory, "causal": causal, "r_origin": r_origin}
        out, lse, weights = sa.relative_attention(*x, return_lse=True, return_weights=True, **options)
        assert out.dtype == x.q.dtype
        assert_accurate(out, exact, trivial=trivial)
        tolerance = (16 + 4 * exact.sigma) * (2.0**-53 if x.q.dtype == np.float64 else 2.0**-24)
        finite = np.isfinite(exact.lse)
        assert np.array_equal(finite, np.isfinite(lse))
        assert np.all(abs(lse[finite] - exact.lse[finite]) <= tolerance * (1 + abs(exact.lse[finite])))
        assert np.all(abs(weights - exact.weights) <= 8 * tolerance + 1e-37)
        # Without weights, the kernel takes other steps.
        assert np.array_equal(sa.relative_attention(*x, **options), out)
        return out

    return run


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", [False, True])
def test_against_float64(isa: str, draw: Any, hold: Any, shape: Any, dtype: Any, shared: bool) -> None:
    hold(draw(shape, dtype=dtype, shared=shared), shape[4])


@pytest.mark.parametrize("length", [*range(1, 20), 31, 32, 33, 47, 48, 49, 95, 96, 97, 127, 128, 129])
def test_every_length_at_the_edges_of_blocks(isa: str, draw: Any, hold: Any, length: int) -> None:
    for memory in (0, 1, 511, 513 - length):
        shape = (1, 1, 1, length, max(memory, 0), 7, 5)
        hold(draw(shape), shape[4])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 2, 50])
def test_distances_beyond_the_table_use_its_end(isa: str, draw: Any, hold: Any, shape: Any, rows: int) -> None:
    x, memory = draw(shape, rows), shape[4]
    out = hold(x, memory)
    length = memory + shape[3]
    if rows < length:
        longer = np.concatenate([x.r, np.repeat(x.r[:, -1:], length - rows, axis=1)], axis=1)
        assert np.array_equal(sa.relative_attention(*x._replace(r=longer), mem_len=memory), out)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, (3, None), (600, 2)])
def test_tables_with_two_sides(isa: str, draw: Any, hold: Any, shape: Any, causal: bool, window: Any) -> None:
    hold(draw(shape, 140), shape[4], causal=causal, r_origin=60, window=window)


def shifted(x: Drawn, memory: int) -> Any:
    """The paper's method, in float64: all queries times all encodings, with a column of zeros in front, reshaped.

    Encodings are ordered from the farthest distance to 0, and the memory's queries do not exist.
    """
    q, k, v, r, u, w = (np.asarray(a, dtype=np.float64) for a in x)
    batch, heads, segment, dim = q.shape
    length = memory + segment
    content = np.einsum("bhid,bhjd->bhij", q + u[:, None], k)
    position = np.einsum("bhid,hjd->bhij", q + w[:, None], r[:, length - 1 :: -1])
    padded = np.concatenate([np.zeros((batch, heads, segment, 1)), position], axis=-1)
    moved = padded.reshape(batch, heads, length + 1, segment)[:, :, 1:].reshape(batch, heads, segment, length)
    scores = (content + moved) / np.sqrt(dim)
    scores[..., np.triu(np.ones((segment, length), dtype=bool), 1 + memory)] = -np.inf
    parts = np.exp(scores - scores.max(-1, keepdims=True))
    return parts / parts.sum(-1, keepdims=True) @ v


@pytest.mark.parametrize(("segment", "memory"), [(1, 0), (7, 0), (40, 30), (130, 600), (1, 60)])
def test_against_padding_and_shifting(isa: str, draw: Any, segment: int, memory: int) -> None:
    x = draw((2, 3, 3, segment, memory, 16, 16))
    assert np.allclose(sa.relative_attention(*x, mem_len=memory), shifted(x, memory), rtol=0, atol=1e-5)


@pytest.mark.parametrize("segment", [1, 7, 64])
@pytest.mark.parametrize("memory", [0, 5, 100])
def test_segments_with_memory_are_one_long_pass(isa: str, draw: Any, segment: int, memory: int) -> None:
    length = 4 * segment + 3
    x = draw((2, 2, 2, length, 0, 16, 16))
    first = np.arange(length) // segment * segment  # of each token's segment
    mask = np.arange(length) >= (first - memory)[:, None]
    whole = sa.relative_attention(*x, mask=mask)
    for start in range(0, length, segment):
        end, begin = min(start + segment, length), max(start - memory, 0)
        part = x._replace(q=x.q[:, :, start:end], k=x.k[:, :, begin:end], v=x.v[:, :, begin:end])
        out = sa.relative_attention(*part, mem_len=start - begin)
        assert np.allclose(out, whole[:, :, start:end], rtol=0, atol=2e-6)


def test_same_length(isa: str, draw: Any, hold: Any) -> None:
    x, memory = draw((1, 2, 2, 60, 40, 16, 16)), 40
    hold(x, memory, window=(memory - 1, 0))


def test_everything_composes(isa: str, draw: Any, hold: Any, rng: np.random.Generator) -> None:
    x, memory = draw((2, 4, 2, 70, 200, 16, 16)), 200
    options = {
        "mask": rng.random((2, 1, 70, 270)) < 0.8,
        "bias": rng.standard_normal((4, 70, 270)),
        "kv_lens": [270, 131],
        "q_lens": [70, 33],
        "kv_starts": [30, 90],
        "alibi_slopes": sa.alibi_slopes(4),
        "sinks": rng.standard_normal(4),
        "softcap": 5.0,
        "scale": 0.2,
        "window": (150, None),
        "t5": sa.T5Bias(rng.standard_normal((32, 4))),
    }
    hold(x, memory, trivial=True, **options)
    for name, value in options.items():
        hold(x, memory, trivial=True, **{name: value})


def test_layout_strides_and_out_change_no_bit(isa: str, draw: Any) -> None:
    x, memory = draw((2, 3, 3, 50, 70, 16, 16)), 70
    out = sa.relative_attention(*x, mem_len=memory)
    apart = np.zeros((3, 130, 40), np.float32)
    apart[:, 5:125, ::2][:, :, 3:19] = x.r
    strided = x._replace(r=apart[:, 5:125, ::2][:, :, 3:19], u=np.asfortranarray(x.u), w=x.w[::-1].copy()[::-1])
    assert np.array_equal(sa.relative_attention(*strided, mem_len=memory), out)
    shifted = x._replace(r=misaligned(x.r), u=misaligned(x.u.astype(np.float64)), w=misaligned(x.w.astype(np.float64)))
    assert np.array_equal(sa.relative_attention(*shifted, mem_len=memory), out)
    swapped = x._replace(**{name: np.ascontiguousarray(getattr(x, name).swapaxes(1, 2)) for name in "qkv"})
    target = np.empty((2, 50, 3, 16), np.float32)
    assert sa.relative_attention(*swapped, mem_len=memory, layout="bshd", out=target) is target
    assert np.array_equal(target.swapaxes(1, 2), out)
    over_r = np.array(x.r[:, :50])  # the result is written over a table that is read
    inside = Drawn(x.q[0], x.k[0], x.v[0], over_r, x.u, x.w)
    alone = sa.relative_attention(*inside, mem_len=memory)
    assert np.array_equal(sa.relative_attention(*inside, mem_len=memory, out=over_r), alone)


def test_bits_depend_on_neither_threads_nor_neighbours(isa: str, draw: Any) -> None:
    x, memory = draw((3, 4, 4, 150, 300, 16, 16)), 300
    out = sa.relative_attention(*x, mem_len=memory, num_threads=1)
    assert np.array_equal(sa.relative_attention(*x, mem_len=memory, num_threads=3), out)
    one = Drawn(x.q[1:2, 2:3], x.k[1:2, 2:3], x.v[1:2, 2:3], x.r[2:3], x.u[2:3], x.w[2:3])
    assert np.array_equal(sa.relative_attention(*one, mem_len=memory)[0, 0], out[1, 2])
    wider = x._replace(r=np.concatenate([x.r, np.full_like(x.r, np.nan)], axis=1))  # distances that do not occur
    assert np.array_equal(sa.relative_attention(*wider, mem_len=memory), out)


@pytest.mark.parametrize("segment", [3, 70])
def test_hidden_values_are_inert_and_visible_ones_propagate(isa: str, draw: Any, segment: int) -> None:
    x, memory = draw((1, 2, 2, segment, 40, 16, 16), 200), 40
    out = sa.relative_attention(*x, mem_len=memory, window=(20, None))
    r = x.r.copy()
    r[:, 21:] = np.nan  # beyond the window
    assert np.array_equal(sa.relative_attention(*x._replace(r=r), mem_len=memory, window=(20, None)), out)
    r[:, 20] = np.inf
    assert np.isnan(sa.relative_attention(*x._replace(r=r), mem_len=memory, window=(20, None))).any(axis=-1).all()
    r = x.r.copy()
    r[:, memory + segment - 1] = np.nan  # of the last query and the first key alone
    found = np.isnan(sa.relative_attention(*x._replace(r=r), mem_len=memory)).any(axis=(0, 1, 3))
    assert found[-1]
    assert not found[:-1].any()


GOOD = {
    "q": np.ones((2, 3, 4), np.float32),
    "k": np.ones((2, 5, 4), np.float32),
    "v": np.ones((2, 5, 4), np.float32),
    "r": np.ones((2, 5, 4), np.float32),
    "u": np.ones((2, 4)),
    "w": np.ones((2, 4)),
    "mem_len": 2,
}


@pytest.mark.one_isa
@pytest.mark.parametrize(
    ("changes", "exception", "message"),
    [
        ({"mem_len": 3}, ValueError, "k has length 5, but mem_len 3 and the length of q, 3, make 6"),
        ({"mem_len": -1}, ValueError, "mem_len is -1, but it must be at least 0"),
        ({"mem_len": 1 << 61}, ValueError, "mem_len is 2305843009213693952, but it must be at most"),
        ({"mem_len": 2.0}, TypeError, "mem_len is 2.0, but an integer is needed"),
        ({"r": np.ones((3, 5, 4), np.float32)}, ValueError, r"r has shape \(3, 5, 4\), but \(2, R, 4\) or \(R, 4\)"),
        ({"r": np.ones((2, 5, 3), np.float32)}, ValueError, r"r has shape \(2, 5, 3\)"),
        ({"r": np.ones((2, 0, 4), np.float32)}, ValueError, "with R at least 1"),
        ({"r": np.ones(4, np.float32)}, ValueError, r"r has shape \(4,\)"),
        ({"r": np.ones((2, 5, 4))}, TypeError, "r has dtype float64, but q has float32"),
        ({"r": np.ones((2, 5, 4), np.int32)}, TypeError, "r has dtype int32"),
        ({"u": np.ones((1, 4))}, ValueError, r"u has shape \(1, 4\), but \(2, 4\) is needed"),
        ({"w": np.ones(4)}, ValueError, r"w has shape \(4,\), but \(2, 4\) is needed"),
        ({"w": np.ones((2, 4), int)}, TypeError, "w has dtype int64"),
        ({"r_origin": 5}, ValueError, "r_origin is 5, but r has the rows 0 to 4"),
        ({"r_origin": -1}, ValueError, "r_origin is -1"),
        ({"causal": False}, ValueError, "causal is False, but with r_origin 0 r has no rows for keys ahead"),
        ({"layout": "sbhd"}, ValueError, "layout is 'sbhd'"),
        ({"q_offset": 2}, TypeError, "unexpected keyword argument 'q_offset'.*did you mean 'mem_len'"),
        ({"same_length": True}, TypeError, "did you mean 'window'"),
        ({"out": np.ones((2, 3, 5), np.float32)}, ValueError, "out has shape"),
        ({"q": np.ones((2, 3, 5), np.float32)}, ValueError, "k has head_dim 4 but q has 5"),
    ],
)
def test_errors(changes: dict[str, Any], exception: type[Exception], message: str) -> None:
    assert sa.relative_attention(**GOOD).shape == (2, 3, 4)
    with pytest.raises(exception, match="relative_attention: .*" + message):
        sa.relative_attention(**{**GOOD, **changes})


def test_empty_and_two_dimensional_operands(isa: str, draw: Any) -> None:
    x = draw((2, 2, 2, 5, 3, 8, 8))
    assert sa.relative_attention(*x._replace(q=x.q[:0], k=x.k[:0], v=x.v[:0]), mem_len=3).shape == (0, 2, 5, 8)
    none = x._replace(q=x.q[:, :, :0], k=x.k[:, :, :3], v=x.v[:, :, :3])
    assert sa.relative_attention(*none, mem_len=3).shape == (2, 2, 0, 8)
    whole = sa.relative_attention(*x, mem_len=3)
    one_head = Drawn(x.q[0, 1], x.k[0, 1], x.v[0, 1], x.r[1], x.u[1:], x.w[1:])
    assert np.array_equal(sa.relative_attention(*one_head, mem_len=3), whole[0, 1])
