"""`python -m selfattn selftest`: checks the results on this machine against a float64 reference."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

import selfattn

from . import reference
from ._bench.check import (
    Expected,
    Mismatch,
    Units,
    check,
    expected_parts,
)
from ._bench.numbers import DTYPES, bound_of, numpy_dtype, rounded_bound, why_no_numbers
from ._bench.peers import OWN
from ._bench.workload import Array
from ._bench.workloads import layer_workload

Attention = Callable[..., Any]
Options = dict[str, Any]
Shape = tuple[int, int, int, int, int, int, int]

MINUS_INFINITY = -(2.0**100)

# batch, num_heads, num_kv_heads, q_len, kv_len, head_dim, value_dim
SHAPES: tuple[Shape, ...] = (
    (1, 1, 1, 1, 1, 1, 1),
    (1, 1, 1, 1, 7, 3, 5),
    (1, 1, 1, 16, 16, 64, 64),
    (1, 12, 12, 24, 24, 64, 64),
    (2, 3, 3, 17, 31, 8, 8),
    (1, 4, 2, 33, 65, 40, 40),
    (1, 2, 1, 64, 64, 64, 64),
    (1, 8, 2, 1, 300, 128, 128),
    (2, 4, 1, 5, 129, 32, 32),
    (1, 1, 1, 97, 128, 72, 72),
    (1, 2, 2, 130, 257, 80, 80),
    (1, 1, 1, 200, 200, 96, 48),
    (1, 1, 1, 7, 513, 256, 256),
    (1, 1, 1, 300, 40, 64, 64),
    (1, 3, 3, 3, 2, 127, 1),
    (1, 2, 2, 48, 48, 33, 65),
    (1, 1, 1, 4, 0, 8, 8),
    (2, 2, 2, 12, 1100, 16, 16),
)

# The shapes that options are tested with: small, odd with grouped heads, decode, several blocks.
OPTION_SHAPES = (SHAPES[4], SHAPES[5], SHAPES[8], SHAPES[10])

Rng = np.random.Generator


def _mask(rng: Rng, shape: Shape) -> Options:
    batch, num_heads, _, q_len, kv_len = shape[:5]
    mask = rng.random((batch, num_heads, q_len, kv_len)) < 0.6
    mask[..., 0, :] = False  # a row without a visible key
    return {"mask": mask}


def _key_mask(rng: Rng, shape: Shape) -> Options:
    return {"mask": rng.random((shape[0], 1, 1, shape[4])) < 0.5}


def _bias(rng: Rng, shape: Shape) -> Options:
    bias = rng.standard_normal((shape[1], shape[3], shape[4]), dtype=np.float32)
    bias[bias < -1.5] = -np.inf
    return {"bias": bias}


def _lens(rng: Rng, shape: Shape) -> Options:
    batch, q_len, kv_len = shape[0], shape[3], shape[4]
    return {
        "kv_lens": rng.integers(0, kv_len + 1, batch),
        "q_lens": rng.integers(0, q_len + 1, batch),
    }


def _alibi(rng: Rng, shape: Shape) -> Options:
    return {"alibi_slopes": rng.random(shape[1], dtype=np.float32)}


def _sinks(rng: Rng, shape: Shape) -> Options:
    return {"sinks": rng.standard_normal(shape[1], dtype=np.float32)}


def _everything(rng: Rng, shape: Shape) -> Options:
    makers = (_mask, _bias, _lens, _alibi, _sinks)
    options = {name: value for make in makers for name, value in make(rng, shape).items()}
    return {**options, "causal": True, "window": (20, 0), "softcap": 4.0, "scale": 0.3}


OPTIONS: dict[str, tuple[Callable[[Rng, Shape], Options], ...]] = {
    "offsets": (
        lambda rng, shape: {"causal": True, "q_offset": 0},
        lambda rng, shape: {"causal": True, "q_offset": -3},
        lambda rng, shape: {"causal": True, "q_offset": rng.integers(0, 50, shape[0])},
    ),
    "windows": (
        lambda rng, shape: {"window": (9, 0)},
        lambda rng, shape: {"window": (None, 4), "q_offset": 2},
        lambda rng, shape: {"window": (3, 70), "causal": True},
    ),
    "masks": (_mask, _key_mask),
    "bias": (_bias,),
    "scores": (
        lambda rng, shape: {"scale": -0.7},
        lambda rng, shape: {"scale": 0.0},
        lambda rng, shape: {"scale": 20.0},
        lambda rng, shape: {"softcap": 2.0},
    ),
    "alibi, sinks": (_alibi, _sinks),
    "lengths": (_lens, lambda rng, shape: {**_lens(rng, shape), "causal": True}),
    "everything": (_everything,),
}


@dataclass(frozen=True)
class Case:
    """One call: its arrays in float32, and the group under which it is reported.

    `returns` asks for lse and weights as well.
    """

    group: str
    shape: Shape
    options: Options
    arrays: tuple[Array, Array, Array]
    returns: bool = False


def cases() -> Iterator[Case]:
    """All cases of `attention`. They are the same in every run."""
    rng = np.random.default_rng(20)
    for shape in SHAPES:
        yield Case("plain", shape, {}, _arrays(rng, shape))
    for shape in SHAPES:
        yield Case("causal", shape, {"causal": True}, _arrays(rng, shape))
    for group, makers in OPTIONS.items():
        for make in makers:
            for shape in OPTION_SHAPES:
                yield Case(group, shape, make(rng, shape), _arrays(rng, shape))
    for shape in OPTION_SHAPES:
        for make in (_everything, _lens, _bias):
            options, arrays = make(rng, shape), _arrays(rng, shape)
            yield Case("lse, weights", shape, options, arrays, returns=True)


def _arrays(rng: Rng, shape: Shape) -> tuple[Array, Array, Array]:
    batch, num_heads, num_kv_heads, q_len, kv_len, head_dim, value_dim = shape
    return (
        rng.standard_normal((batch, num_heads, q_len, head_dim), dtype=np.float32),
        rng.standard_normal((batch, num_kv_heads, kv_len, head_dim), dtype=np.float32),
        rng.standard_normal((batch, num_kv_heads, kv_len, value_dim), dtype=np.float32),
    )


class Tally:
    """The number of checks, the failures and the worst error of one group."""

    def __init__(self, group: str) -> None:
        self.group = group
        self.checks = 0
        self.failures: list[str] = []
        self.worst = 0.0

    def add(self, name: str, call: Callable[[], Any], *expected: list[Expected]) -> None:
        """Check all arrays that a call returns; an exception counts as a failure, like a wrong number."""
        self.checks += 1
        try:
            returned = call() if len(expected) > 1 else (call(),)
            for array, parts in zip(returned, expected, strict=True):
                # MINUS_INFINITY, a substitute for -inf, is exact in float32 and float64, so its error is 0.
                wide = array if array.dtype.itemsize > 2 else array.astype(np.float32)
                finite = np.where(np.isneginf(wide), MINUS_INFINITY, wide)
                self.worst = max(self.worst, check(name, finite, parts))
        except Mismatch as error:
            self.failures.append(str(error))
        except Exception as error:  # anything that a broken build raises belongs in the report
            self.failures.append(f"{name}: {type(error).__name__}: {error}")

    def line(self) -> str:
        """Return this group's line of the report."""
        verdict = f"{len(self.failures)} FAILED" if self.failures else "ok"
        return f"{self.group:14}{self.checks:5} checks, largest error {self.worst:7.2%} of its bound: {verdict}"


def run(attention: Attention | None = None, write: Callable[[str], Any] = print) -> int:
    """Check `attention` and the layer on every ISA of this machine, in every dtype that is available here.

    Parameters
    ----------
    attention : callable, optional
        Function to check instead of `selfattn.attention`.
    write : callable
        Receives the lines of the report.

    Returns
    -------
    int
        Number of failed checks.
    """
    start = time.perf_counter()
    tallies: dict[str, Tally] = {}
    for case in cases():
        _check_case(tallies.setdefault(case.group, Tally(case.group)), case, attention)
    tallies["layer"] = _check_layers()
    for tally in tallies.values():
        write(tally.line())
        for failure in tally.failures[:5]:
            write(f"    {failure}")
    checks = sum(tally.checks for tally in tallies.values())
    failures = sum(len(tally.failures) for tally in tallies.values())
    seconds = time.perf_counter() - start
    isas = ", ".join(selfattn.isas())
    for reason in filter(None, map(why_no_numbers, DTYPES)):
        write(f"not checked: {reason}")
    verdict = f"{failures} of {checks} checks FAILED" if failures else f"all {checks} checks passed"
    write(f"{verdict} on {isas} in {seconds:.1f} s")
    return failures


def _check_case(tally: Tally, case: Case, attention: Attention | None) -> None:
    function: Attention = attention or selfattn.attention
    asked: Options = {"return_lse": True, "return_weights": True} if case.returns else {}
    exact = reference.attention(*case.arrays, **case.options)
    for dtype in _dtypes():
        arrays = tuple(array.astype(numpy_dtype(dtype)) for array in case.arrays)
        result = exact if dtype in ("float32", "float64") else reference.attention(*arrays, **case.options)
        for isa in selfattn.isas():
            name = f"{case.group} {dtype} {isa} shape {case.shape}"
            call = partial(function, *arrays, **case.options, **asked)
            with _use_isa(isa):
                unit = selfattn.explain(*arrays, **case.options)["unit"]
                tally.add(name, call, *_expected(case, result, dtype, unit))


def _expected(case: Case, result: reference.Result, dtype: str, unit: str) -> Iterator[list[Expected]]:
    """The expected arrays of a call; lse and weights are float32 if the result is 16-bit."""
    units, whole = Units.of(result.sigma, dtype, "highest", unit), (slice(None),)
    bound = bound_of(units.out * result.magnitude, dtype)
    yield [Expected(whole, result.out, rounded_bound(result.out, bound, dtype))]
    if case.returns:
        lse = np.where(np.isneginf(result.lse), MINUS_INFINITY, result.lse)
        yield [Expected(whole, lse, bound_of(units.lse + np.abs(lse), dtype))]
        yield [Expected(whole, result.weights, bound_of(units.weights * result.weights, dtype))]


def _dtypes() -> list[str]:
    return [dtype for dtype in DTYPES if not why_no_numbers(dtype)]


def _check_layers() -> Tally:
    tally = Tally("layer")
    grouped = replace(layer_workload("", "", 2, 37, 96, 6), num_kv_heads=2)
    for layer in (grouped, layer_workload("", "", 1, 70, 128, 2)):
        for dtype in _dtypes():
            workload = replace(layer, dtype=dtype)
            arrays = workload.make_arrays()
            for isa in selfattn.isas():
                with _use_isa(isa):
                    parts = expected_parts(workload, arrays)
                    name = f"layer {dtype} {isa} d_model {workload.d_model}"
                    tally.add(name, OWN.prepare(workload, arrays, threads=2), parts)
    return tally


def _use_isa(name: str) -> AbstractContextManager[Any]:
    return selfattn.use_isa(name)
