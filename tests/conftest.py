"""Fixtures that every test module shares."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, settings
from instruction_sets import KNOWN_ISAS, ON_EVERY_ISA, is_marked, lists_isas, repeats_avx512

import selfattn
from selfattn import reference
from selfattn._rounding import rounding

# Profiles of hypothesis. Examples depend on the test alone unless `--hypothesis-profile random` asks for new ones.
settings.register_profile("same", derandomize=True)
settings.register_profile("random", derandomize=False)
# For mutants any failure is enough, and shrinking it would take minutes.
settings.register_profile("mutants", settings.get_profile("same"), phases=[Phase.explicit, Phase.generate])
settings.load_profile("same")


def pytest_report_header() -> str:
    available = selfattn.isas()
    skipped = [name for name in KNOWN_ISAS if name not in available] or ["none"]
    return f"selfattn ISAs: {', '.join(available)} (active: {selfattn.active_isa()}; skipped: {', '.join(skipped)})"


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the option
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Run the whole suite on two workers where pytest-xdist is installed."""
    if hasattr(config, "workerinput"):
        return  # a worker, which must not start workers of its own
    whole = config.args_source == pytest.Config.ArgsSource.TESTPATHS
    if whole and config.pluginmanager.hasplugin("xdist") and config.option.numprocesses is None:
        config.option.numprocesses = 2


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    test = metafunc.definition
    needed = test.path.parent.name in ON_EVERY_ISA and not is_marked(test)
    asked = "isa" in inspect.signature(metafunc.function).parameters
    if (needed or asked) and not lists_isas(test):
        metafunc.parametrize("isa", selfattn.isas(), indirect=True)  # the report's header names the others


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    repeated = {item for item in items if repeats_avx512(item)}
    config.hook.pytest_deselected(items=[item for item in items if item in repeated])
    items[:] = [item for item in items if item not in repeated]


@pytest.fixture(autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str | None]:
    """Select the instruction set of this run of the test, if it has one."""
    name = getattr(request, "param", None)
    if name is not None and name not in selfattn.isas():
        pytest.skip(f"this machine has no {name}")
    with nullcontext() if name is None else selfattn.use_isa(name):
        yield name


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def unit(dtype: Any) -> float:
    """Half an ulp of 1 in the type that results of this dtype are computed in."""
    return 2.0**-53 if dtype == np.float64 else 2.0**-24


def half_ulp(exact: Any, dtype: np.dtype[Any]) -> Any:
    """Return what rounding to a 16-bit type may add, half the ulp of the next power of two; else 0."""
    if dtype.itemsize > 2:
        return 0.0
    bits = 11 if dtype == np.float16 else 8
    return abs(exact) * 2.0**-bits


def smallest_subnormal(dtype: np.dtype[Any]) -> float:
    # NumPy does not know bfloat16, which has float32's exponent and 16 fewer bits of mantissa.
    return 2.0**-133 if dtype.name == "bfloat16" else float(np.finfo(dtype).smallest_subnormal)


def _assert_accurate(
    out: Any,
    exact: reference.Result,
    *,
    trivial: bool = False,
    rounded: tuple[float, float] = (0.0, 0.0),
    extra: float = 0.0,
) -> float:
    """Check |out - exact| <= (16 + 4 sigma) u magnitude; return the largest error as a share of its bound.

    Rounding to a 16-bit type may add half an ulp of it, a matrix unit adds `rounding`, and `extra` is added as it is.
    A comparison of zeros only verifies nothing: it fails unless `trivial`.
    """
    assert out.shape == exact.out.shape
    dtype, out = out.dtype, out if out.dtype.itemsize > 2 else out.astype(np.float64)
    assert np.array_equal(np.isnan(out), np.isnan(exact.out)), "NaN in other places than the reference's"
    assert trivial or out.size == 0 or np.count_nonzero(exact.magnitude > 0) * 4 >= exact.magnitude.size, "trivial"
    with np.errstate(invalid="ignore"):
        error = np.where(np.isfinite(exact.out), abs(out - exact.out), 0)
    bound = ((16 + 4 * exact.sigma) * unit(dtype) + rounded[0] + exact.sigma * rounded[1]) * exact.magnitude + extra
    # An error that changes a result may change its ulp as well.
    bound = bound + half_ulp(abs(exact.out) + bound, dtype)
    # The result itself must be rounded to out's type; below its normal numbers that is an absolute error.
    bound = bound + smallest_subnormal(dtype)
    bound = np.where(np.isnan(bound), np.inf, bound)
    share = float(np.max(error / bound, initial=0))
    assert share <= 1, f"error is {share:.3g} times its bound"
    return share


@pytest.fixture
def assert_accurate() -> Callable[..., float]:
    return _assert_accurate


@pytest.fixture
def check(assert_accurate: Callable[..., float]) -> Callable[..., Any]:
    """Compute attention, compare out, lse and weights with the reference, and return out."""

    def run(q: Any, k: Any, v: Any, *, trivial: bool = False, precision: str = "highest", **options: Any) -> Any:
        precise = np.longdouble if q.dtype == np.float64 else np.float64
        exact = reference.attention(q, k, v, dtype=precise, **options)
        options["precision"] = precision
        rounded = rounding(q, k, v, **options)
        out, lse, weights = selfattn.attention(q, k, v, return_lse=True, return_weights=True, **options)
        assert_accurate(out, exact, trivial=trivial, rounded=rounded)
        tolerance = (16 + 4 * exact.sigma) * unit(q.dtype) + exact.sigma * rounded[1]
        finite = np.isfinite(exact.lse)
        assert np.array_equal(finite, np.isfinite(lse))
        assert np.array_equal(np.isneginf(lse), np.isneginf(exact.lse))
        assert np.all(abs(lse[finite] - exact.lse[finite]) <= tolerance * (1 + abs(exact.lse[finite])))
        assert np.array_equal(np.isnan(weights), np.isnan(exact.weights))
        with np.errstate(invalid="ignore", divide="ignore"):
            # Numerator and denominator have errors; that of a small weight grows with its logit, biases included.
            logits = np.where(exact.weights > 0, abs(np.log(exact.weights)), 0)
            allowed = (2 * tolerance + 4 * logits * (unit(q.dtype) + rounded[1])) * exact.weights + 1e-37
            excess = abs(weights - exact.weights) - allowed
        assert np.nanmax(excess, initial=0) <= 0
        # The fused call without weights computes in other steps; its result must be bit-identical.
        assert np.array_equal(selfattn.attention(q, k, v, **options), out, equal_nan=True)
        return out

    return run


@pytest.fixture
def normal(rng: np.random.Generator) -> Callable[..., Any]:
    """Unit normals: normal(2, 4, 10, 8) or normal(..., dtype=numpy.float64)."""

    def make(*shape: int, dtype: Any = np.float32) -> Any:
        return rng.standard_normal(shape).astype(dtype)

    return make


@pytest.fixture
def run_python(tmp_path: Path) -> Callable[..., str]:
    """Run code in a new interpreter, which must succeed, and return what it printed.

    It starts in an empty folder: in the project's folder it would import the sources, which lack the core.
    """

    def run(code: str, *, expected_exit: int = 0, **environment: str) -> str:
        result = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            capture_output=True,
            text=True,
            timeout=90,
            cwd=tmp_path,
            env={**os.environ, **environment},
            check=False,
        )
        assert result.returncode == expected_exit, result.stderr
        return result.stdout + result.stderr if expected_exit else result.stdout

    return run


@pytest.fixture
def made_up() -> Callable[..., Any]:
    """Make up a result of one of the benchmark's workloads, with ratios to peers by name."""
    from selfattn._bench.measure import Result
    from selfattn._bench.timing import Quartiles
    from workbench.cache_grid import ON_CACHES
    from workbench.grid import EVERY

    def result(name: str, threads: int = 1, fraction: float = 0.5, seconds: float = 2e-3, **ratios: float) -> Result:
        workload = {**EVERY, **ON_CACHES}[name]
        work = workload.kv_bytes() if workload.memory_bound else workload.flops()
        times = {peer: Quartiles(*[seconds * ratio] * 3) for peer, ratio in {"selfattn": 1.0, **ratios}.items()}
        return Result(
            workload=workload,
            threads=threads,
            isa="avx2",
            rounds=5,
            times=times,
            ratios={peer: Quartiles(ratio, ratio, ratio) for peer, ratio in ratios.items()},
            errors={"selfattn": 0.1},
            skipped={},
            flop_peak=workload.flops() / seconds / fraction,
            bandwidth=work / seconds / fraction,
        )

    return result
