"""Write test cases with exact results for `attend_vectors`: python tests/native/write_vectors.py FILE.

Needs NumPy, ml_dtypes and the sources only; the format is described in vectors_file.h.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
ROOT = Path(__file__).resolve().parents[2]
TYPES = {"float32": "f32", "float64": "f64", "float16": "f16", "bfloat16": "bf16", "int64": "i64", "bool": "bool"}
NARROW = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
LENGTHS = (1, 2, 3, 5, 6, 7, 12, 13, 24, 25, 31, 47, 64, 65, 97, 130)


def load_reference() -> ModuleType:
    """Return selfattn.reference without selfattn itself, whose import needs the compiled core."""
    package = ModuleType("selfattn")
    package.__path__ = [str(ROOT / "selfattn")]
    sys.modules["selfattn"] = package
    return importlib.import_module("selfattn.reference")


class Case(NamedTuple):
    name: str
    q: Array
    k: Array
    v: Array
    options: dict[str, Any]


class T5(NamedTuple):
    table: Array
    bidirectional: bool
    max_distance: int = 20


class Maker:
    """Makes cases of one element type, or of two: `keys` is the type of keys and values."""

    def __init__(self, dtype: Any, seed: int, keys: Any = None) -> None:
        self.dtype = np.dtype(dtype)
        self.keys = np.dtype(keys or dtype)
        self.random = np.random.default_rng(seed)

    def normal(self, *shape: int) -> Array:
        return self.random.standard_normal(shape).astype(self.dtype)

    def qkv(
        self, q_len: int, kv_len: int, *, batch: tuple[int, ...] = (2,), heads: int = 2, kv_heads: int = 2, d: int = 16
    ) -> tuple[Array, Array, Array]:
        """Return operands with head_dim d and value_dim d + 3, which are never both multiples of a vector's width."""
        return (
            self.normal(*batch, heads, q_len, d),
            self.normal(*batch, kv_heads, kv_len, d).astype(self.keys, copy=False),
            self.normal(*batch, kv_heads, kv_len, d + 3).astype(self.keys, copy=False),
        )

    def mask(self, *shape: int) -> Array:
        return self.random.random(shape) < 0.7

    def case(self, name: str, operands: tuple[Array, Array, Array], **options: Any) -> Case:
        types = dict.fromkeys(TYPES[dtype.name] for dtype in (self.dtype, self.keys))
        return Case("-".join((name, *types)), *operands, options)


def shapes(m: Maker) -> Iterator[Case]:
    for d in (1, 5, 80, 256):
        yield m.case(f"head-dim-{d}", m.qkv(20, 37, batch=(), d=d))
    q, k, v = m.qkv(18, 33, batch=(), heads=1, kv_heads=1)
    yield m.case("two-axes", (q[0], k[0], v[0]))
    yield m.case("broadcast-batch", (m.normal(3, 2, 10, 8), m.normal(2, 21, 8), m.normal(1, 2, 21, 9)))
    yield m.case("grouped-heads", m.qkv(9, 50, heads=8, kv_heads=2))
    yield m.case("one-kv-head", m.qkv(1, 70, heads=7, kv_heads=1))
    yield m.case("no-keys", m.qkv(5, 0))
    yield m.case("decode-key-ranges", m.qkv(1, 2500, batch=(), heads=4, kv_heads=2))
    yield m.case("tile-key-ranges", m.qkv(30, 4200, batch=(), heads=1, kv_heads=1, d=8))
    yield m.case("tile-edges", m.qkv(65, 259, d=33))
    q, k, v = m.qkv(14, 29)
    swapped = tuple(np.ascontiguousarray(x.swapaxes(-2, -3)) for x in (q, k, v))
    yield m.case("layout-bshd", (swapped[0], swapped[1], swapped[2]), layout="bshd", causal=True)


def limits(m: Maker) -> Iterator[Case]:
    yield m.case("causal", m.qkv(40, 75), causal=True)
    yield m.case("causal-empty-rows", m.qkv(40, 25), causal=True)
    yield m.case("causal-offset", m.qkv(40, 75), causal=True, q_offset=np.array([-7, 60]))
    yield m.case("window", m.qkv(100, 300), window=(20, 5))
    yield m.case("window-causal", m.qkv(70, 170), window=(33, None), causal=True)
    yield m.case("lengths", m.qkv(33, 140), q_lens=np.array([33, 11]), kv_lens=np.array([37, 140]))
    yield m.case("lengths-empty", m.qkv(5, 40), q_lens=np.array([0, 5]), kv_lens=np.array([20, 0]))


def masks(m: Maker) -> Iterator[Case]:
    yield m.case("mask-of-keys", m.qkv(20, 90), mask=m.mask(90))
    yield m.case("mask-of-pairs", m.qkv(30, 90), mask=m.mask(2, 2, 30, 90))
    mask = m.mask(60, 400)
    mask[:, 120:270] = False  # a whole block of keys (128 to 255) between visible ones
    mask[7] = False
    yield m.case("mask-empties-tiles", m.qkv(60, 400), mask=mask)
    yield m.case("mask-empties-tiles-decode", m.qkv(1, 400), mask=mask[:1])
    yield m.case("bias", m.qkv(20, 90), bias=m.normal(2, 1, 20, 90))
    yield m.case("bias-float64", m.qkv(3, 90), bias=m.normal(90).astype(np.float64))
    bias = m.normal(2, 25, 50)
    bias[:, :, 30:] = -np.inf
    bias[0, 3] = -np.inf
    yield m.case("bias-hides", m.qkv(25, 50), bias=bias, mask=m.mask(25, 50))


def scores(m: Maker) -> Iterator[Case]:
    slopes = m.random.random((2, 2)) / 2
    yield m.case("alibi", m.qkv(26, 60), alibi_slopes=slopes, causal=True)
    yield m.case("softcap", m.qkv(26, 60), softcap=1.5, scale=0.7)
    yield m.case("sinks", m.qkv(26, 60), sinks=np.array([0.5, -2.0]))
    yield m.case("scale-negative", m.qkv(26, 60), scale=-0.8)
    yield m.case("scale-large", m.qkv(26, 60), scale=20.0)
    for q_len in (2, 45):
        yield m.case(
            f"everything-{q_len}-queries",
            m.qkv(q_len, 150, heads=6, kv_heads=3),
            mask=m.mask(2, 1, q_len, 150),
            bias=m.normal(6, 1, 150),
            causal=True,
            window=(90, None),
            q_lens=np.array([q_len, 2]),
            kv_lens=np.array([150, 77]),
            scale=0.5,
            softcap=4.0,
            alibi_slopes=m.random.random(6) / 8,
            sinks=m.random.standard_normal(6),
        )


def distances(m: Maker) -> Iterator[Case]:
    def relative(name: str, segment: int, memory: int, rows: int, origin: int, *, own: bool = True) -> Case:
        r = m.normal(*(2,) * own, rows, 16)
        u, w = m.random.standard_normal((2, 2, 16))
        sizes = {"q_offset": np.array([memory, memory]), "causal": origin == 0, "relative": (r, u, w, origin)}
        return m.case(f"relative-{name}", m.qkv(segment, memory + segment), **sizes)

    yield relative("decode", 1, 600, 601, 0)
    yield relative("segment", 60, 70, 130, 0)
    yield relative("long-memory", 50, 700, 750, 0, own=False)
    yield relative("clamped", 33, 40, 5, 0)
    yield relative("two-sided", 70, 30, 90, 40)
    for bidirectional in (False, True):
        t5 = T5(m.random.standard_normal((12, 4)), bidirectional)
        for q_len in (2, 45):
            operands = m.qkv(q_len, 150, heads=4)
            yield m.case(f"t5-{q_len}-queries-{1 + bidirectional}-sides", operands, t5=t5, kv_lens=np.array([150, 77]))
    bias = m.normal(4, 45, 150)
    bias[..., 40:90] = -np.inf
    yield m.case("t5-with-bias", m.qkv(45, 150, heads=4), t5=t5, bias=bias)


def odd_values(m: Maker) -> Iterator[Case]:
    for q_len in (1, 30):
        q, k, v = m.qkv(q_len, 200)
        mask = m.mask(200)
        mask[:2] = True
        k[..., ~mask, :] = np.nan
        v[..., ~mask, ::2] = np.nan
        v[..., ~mask, 1::2] = np.inf
        yield m.case(f"hidden-nan-{q_len}-queries", (q, k, v), mask=mask)
        q, k, v = m.qkv(q_len, 50)
        k[0, :, 31:], v[0, :, 31:] = np.nan, -np.inf
        yield m.case(f"nan-beyond-length-{q_len}-queries", (q, k, v), kv_lens=np.array([31, 50]))
        q, k, v = m.qkv(q_len, 50)
        k[0, 0, 49], v[1, 1, 48, 3] = np.nan, np.inf
        yield m.case(f"visible-nan-{q_len}-queries", (q, k, v), causal=True)


def dropouts(m: Maker) -> Iterator[Case]:
    for q_len in (1, 45):
        sizes = {"dropout": 0.3, "seed": 0xFEDCBA987654}  # numbers in the file are doubles
        yield m.case(f"dropout-{q_len}-queries", m.qkv(q_len, 150, heads=4), causal=True, **sizes)
        yield m.case(f"dropout-{q_len}-queries-hidden", m.qkv(q_len, 150), mask=m.mask(150), window=(99, None), **sizes)


def cases(dtype: Any) -> Iterator[Case]:
    m = Maker(dtype, seed=20)
    for i, q_len in enumerate(LENGTHS):
        if i % 2 == (m.dtype in (np.float64, ml_dtypes.bfloat16)):  # each type gets every other length
            yield m.case(f"length-{q_len}", m.qkv(q_len, q_len + i, d=3 + 4 * i))
    groups: tuple[Callable[[Maker], Iterator[Case]], ...] = (
        shapes, limits, masks, scores, distances, odd_values, dropouts,
    )  # fmt: skip
    for group in groups:
        yield from group(m)


def narrower_keys() -> Iterator[Case]:
    for wide in (np.float32, np.float64):
        for narrow in NARROW:
            m = Maker(wide, seed=21, keys=narrow)
            for q_len in (1, 40):
                yield m.case(f"{q_len}-queries-of-narrower-keys", m.qkv(q_len, 150, heads=4), causal=True)
    m = Maker(np.float32, seed=22, keys=NARROW[0])
    yield m.case("decode-key-ranges-of-narrower-keys", m.qkv(1, 2500, batch=(), heads=4, kv_heads=2))


def write_number(file: BinaryIO, name: str, value: float) -> None:
    file.write(f"number {name} {float(value)!r}\n".encode())


def write_array(file: BinaryIO, name: str, values: Any) -> None:
    array = np.ascontiguousarray(values)
    kind, shape = TYPES[array.dtype.name], " ".join(map(str, (np.ndim(values), *np.shape(values))))
    if array.dtype in NARROW:  # bfloat16 comes from another package, which does not swap bytes
        array = array.view(np.uint16)
    array = array.astype(array.dtype.newbyteorder("<"))
    file.write(f"array {name} {kind} {shape}\n".encode() + array.tobytes() + b"\n")


def write_t5(file: BinaryIO, t5: T5, reference: ModuleType) -> None:
    """Write the bias of each head and distance, and the index of distance 0."""
    origin = t5.max_distance if t5.bidirectional else 0
    terms = reference.t5_terms(t5, np.arange(-origin, t5.max_distance + 1)[None, None])
    write_array(file, "distance_bias", terms[:, 0])
    write_number(file, "distance_origin", origin)


def write_options(file: BinaryIO, options: dict[str, Any], reference: ModuleType) -> None:
    for name, value in options.items():
        if name == "t5":
            write_t5(file, value, reference)
            continue
        if name == "relative":
            for term, array in zip("ruw", value, strict=False):
                write_array(file, term, array)
            write_number(file, "r_origin", value[3])
            continue
        if name == "window":
            for side, reach in zip(("left", "right"), value, strict=True):
                write_number(file, f"window_{side}", -1 if reach is None else reach)
        elif name == "layout":
            write_number(file, "bshd", value == "bshd")
        elif name in {"q_offset", "q_lens", "kv_lens"}:
            write_array(file, name, value.astype(np.int64))
        elif isinstance(value, np.ndarray):
            write_array(file, name, value)
        else:
            write_number(file, name, value)


def write_case(file: BinaryIO, case: Case, reference: ModuleType) -> None:
    # Rounding exact results to float64 adds an error of one unit. The bound of float64 results is at least 16 units.
    precise = np.longdouble if case.q.dtype == np.float64 else np.float64
    exact = reference.attention(case.q, case.k, case.v, dtype=precise, **case.options)
    # sigma is computed with finite keys: a NaN that some rows see must not change the bound of other rows.
    finite = np.nan_to_num(case.k.astype(precise))
    sigma = reference.attention(case.q, finite, case.v, dtype=precise, **case.options).sigma
    trivial = case.k.shape[-2] == 0 or np.count_nonzero(exact.magnitude) * 4 < exact.magnitude.size
    assert trivial == (case.name.startswith(("no-keys", "lengths-empty"))), f"{case.name} compares little but zeros"
    file.write(f"case {case.name}\n".encode())
    write_number(file, "sigma", sigma)
    for name, values in (("q", case.q), ("k", case.k), ("v", case.v)):
        write_array(file, name, values)
    write_options(file, case.options, reference)
    for name in ("out", "lse", "weights", "magnitude"):
        write_array(file, name, getattr(exact, name).astype(np.float64))
    file.write(b"end\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    path = parser.parse_args().file
    reference = load_reference()
    count = 0
    with path.open("wb") as file:
        file.write(b"selfattn vectors 1\n")
        made = (cases(dtype) for dtype in (np.float32, np.float64, *NARROW))
        for case in itertools.chain(*made, narrower_keys()):
            write_case(file, case, reference)
            count += 1
    print(f"{path}: {count} cases, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
