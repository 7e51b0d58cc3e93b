"""Checks results against the documented error bound, on as many rows as fit in a second of work."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

import selfattn
from selfattn import reference

from .._rounding import EXACT_UNITS, MATRIX_ROUNDINGS
from .numbers import UNIT_ROUNDOFF, bound_of, computed_in, numpy_dtype, rounded_bound
from .workload import Array, Arrays, Workload

Float64 = NDArray[np.float64]

# Allowed error of other libraries, relative to the norm of the result: they round at other places between steps.
COARSE_ERRORS = {"bfloat16": 2e-2, "float16": 3e-3, "medium": 2e-2, "high": 3e-3}
MAX_PAIRS = 2**22  # (query, key) pairs that a check computes in float64, in less than a second


class Mismatch(AssertionError):
    """A result is further from the reference than the error bound allows."""


@dataclass(frozen=True)
class Expected:
    """The expected values of a part of an output.

    Attributes
    ----------
    index : tuple
        Index of the part in the output.
    value, bound : ndarray of float64
        The reference and the allowed error of each element.
    magnitude : ndarray of float64, optional
        The sums of p|v|, relative to which attention's errors are measured.
    """

    index: tuple[slice, ...]
    value: Float64
    bound: Float64
    magnitude: Float64 | None = None


@dataclass(frozen=True)
class Units:
    """The error bounds of a call's results in units of the unit roundoff u.

    The bound of an output is (16 + 4 sigma) u sum_j p_j |v_j| plus the roundings of a matrix unit; sigma is the largest
    scale sum_d |q_d k_d| of the call.
    """

    out: float
    lse: float
    weights: float

    @classmethod
    def of(cls, sigma: float, dtype: str, precision: str, unit: str) -> Units:
        """Return the bounds for a dtype, a precision, and the unit that `explain` names."""
        values, scores = (0.0, 0.0) if unit in EXACT_UNITS else MATRIX_ROUNDINGS.get((dtype, precision), (0.0, 0.0))
        roundoff = UNIT_ROUNDOFF[computed_in(dtype)]
        own, rounded = 16.0 + 4.0 * sigma, sigma * scores / roundoff
        # A weight's error comes from its own score and, through the division, from all other scores of its row.
        return cls(own + rounded + values / roundoff, own + rounded, own + 6.0 * rounded)


def unit_of(workload: Workload) -> str:
    """Return the unit that computes a workload's products; if there are two units, the one that rounds."""
    w, nothing = workload, np.zeros((), numpy_dtype(workload.dtype))

    def explained(batch: int, q_len: int) -> str:
        q, k, v = (
            np.broadcast_to(nothing, (batch, heads, length, dim))
            for heads, length, dim in (
                (w.num_heads, q_len, w.head_dim),
                (w.num_kv_heads, w.kv_len, w.head_dim),
                (w.num_kv_heads, w.kv_len, w.value_dim),
            )
        )
        return str(selfattn.explain(q, k, v, precision=w.precision)["unit"])

    units = [explained(w.batch, w.q_len)]
    if w.cache and w.cache.cascade:  # the queries of all sequences attend to the shared prompt in one call
        units.append(explained(1, w.batch * w.q_len))
    return next((unit for unit in units if unit not in EXACT_UNITS), units[0])


def coarse_error(workload: Workload) -> float:
    """Return the relative error allowed for another library; 0 if it must meet our own bound."""
    return COARSE_ERRORS.get(workload.dtype) or COARSE_ERRORS.get(workload.precision, 0.0)


def expected_parts(workload: Workload, arrays: Arrays) -> list[Expected]:
    """Compute the expected output on the active ISA: all of it, or rows at start, middle and end of some heads.

    `arrays` are the arrays that the call reads (`Peer.held`).
    """
    unit = unit_of(workload)
    if workload.kind == "layer":
        return _layer_parts(workload, arrays, unit)
    parts = []
    entries = _few(workload.batch)
    heads = _few(workload.num_heads)
    rows = MAX_PAIRS // (len(entries) * len(heads) * workload.kv_len)
    for entry in entries:
        for head in heads:
            for start, stop in _row_ranges(workload.q_len, max(1, rows)):
                parts.append(_attention_part(workload, arrays, unit, entry, head, slice(start, stop)))
    return parts


def _few(count: int) -> list[int]:
    """Indices of the first, middle and last of `count` items."""
    return sorted({0, count // 2, count - 1})


def _row_ranges(q_len: int, rows: int) -> list[tuple[int, int]]:
    """All rows, or three ranges with `rows` rows in total: start, middle and end."""
    if rows >= q_len:
        return [(0, q_len)]
    part = max(1, rows // 3)
    starts = sorted({0, q_len // 2, q_len - part})
    return [(start, min(start + part, q_len)) for start in starts]


def _attention_part(workload: Workload, arrays: Arrays, unit: str, entry: int, head: int, rows: slice) -> Expected:
    at_entry, at_head = slice(entry, entry + 1), slice(head, head + 1)
    kv_head = head // workload.group_size
    at_kv_head = slice(kv_head, kv_head + 1)
    options = workload.attention_options(arrays)
    for name in ("mask", "bias"):
        if name in options:
            options[name] = _cut(options[name], (at_entry, at_head, rows))
    if "kv_lens" in options:
        options["kv_lens"] = options["kv_lens"][at_entry]
    if "alibi_slopes" in options:
        options["alibi_slopes"] = options["alibi_slopes"][at_head]
    if workload.options.causal or workload.options.window or workload.options.alibi:
        options["q_offset"] = int(workload.offsets()[entry]) + rows.start
    result = reference.attention(
        arrays["q"][at_entry, at_head, rows],
        arrays["k"][at_entry, at_kv_head],
        arrays["v"][at_entry, at_kv_head],
        **options,
    )
    units = Units.of(result.sigma, workload.dtype, workload.precision, unit)
    bound = bound_of(units.out * result.magnitude, workload.dtype)
    bound = rounded_bound(result.out, bound, workload.dtype)
    return Expected((at_entry, at_head, rows), result.out, bound, result.magnitude)


def _cut(array: Array, index: tuple[slice, ...]) -> Array:
    """array[index], but axes of length 1 are kept for broadcasting."""
    whole = slice(None)
    return array[tuple(whole if array.shape[i] == 1 else part for i, part in enumerate(index))]


def _layer_parts(workload: Workload, arrays: Arrays, unit: str) -> list[Expected]:
    """Projections and attention in float64 for the first, middle and last batch entries."""
    # On a matrix unit, projections of a bfloat16 layer are rounded between the steps, as float32 operands would be.
    axis = ("float32", "medium") if workload.dtype == "bfloat16" else (workload.dtype, workload.precision)
    options = workload.attention_options(arrays)
    double = {name: np.asarray(array, dtype=np.float64) for name, array in arrays.items()}
    parts = []
    for entry in _few(workload.batch):
        at_entry = slice(entry, entry + 1)
        q, k, v = (
            split_heads(double["x"][at_entry] @ double[f"w_{name}"] + double[f"b_{name}"], heads)
            for name, heads in (
                ("q", workload.num_heads),
                ("k", workload.num_kv_heads),
                ("v", workload.num_kv_heads),
            )
        )
        result = reference.attention(q, k, v, **options)
        attended = Units.of(result.sigma, *axis, unit).out
        # Rounding errors have random signs, so their sums over d_model and over the concatenated heads grow like
        # square roots. A worst-case bound would be a thousand times larger than any observed error.
        units = join_heads(attended * result.magnitude + 4.0 * workload.d_model**0.5)
        units = np.sqrt(units**2 @ double["w_o"] ** 2) + np.abs(double["b_o"])
        value = join_heads(result.out) @ double["w_o"] + double["b_o"]
        bound = rounded_bound(value, bound_of(units, workload.dtype), workload.dtype)
        parts.append(Expected((at_entry,), value, bound))
    return parts


def split_heads(rows: Array, num_heads: int) -> Array:
    """(B, S, H * D) to (B, H, S, D)."""
    batch, length, width = rows.shape
    heads: Array = rows.reshape(batch, length, num_heads, width // num_heads).swapaxes(1, 2)
    return heads


def join_heads(heads: Array) -> Array:
    """(B, H, S, D) to (B, S, H * D)."""
    batch, num_heads, length, dim = heads.shape
    rows: Array = heads.swapaxes(1, 2).reshape(batch, length, num_heads * dim)
    return rows


def check(name: str, out: Array, parts: list[Expected]) -> float:
    """Compare an output with the expected values.

    Returns
    -------
    float
        The largest error as a fraction of its bound, at most 1.

    Raises
    ------
    Mismatch
        If any error exceeds its bound, or is not a number.
    """
    worst = 0.0
    for part in parts:
        error = np.abs(np.asarray(out[part.index], dtype=np.float64) - part.value)
        fraction = float(np.max(error / part.bound, initial=0.0))
        if not fraction <= 1.0:
            raise Mismatch(
                f"{name}: error {error.max():.3g} is {fraction:.3g} times its bound at output part {part.index}"
            )
        worst = max(worst, fraction)
    return worst


def storage_error(workload: Workload, arrays: Arrays, out: Array) -> float:
    """Return the largest error from rounding k and v to a cache's dtype, as a fraction of sum p|v|."""
    worst = 0.0
    for part in expected_parts(replace(workload, cache=None), arrays):
        assert part.magnitude is not None
        errors = np.abs(_double(out[part.index]) - part.value) / part.magnitude
        worst = max(worst, float(np.max(errors, initial=0.0)))
    return worst


def check_everywhere(name: str, out: Array, trusted: Array, parts: list[Expected]) -> None:
    """Compare a whole output with one that `check` accepted; errors may be a few times the largest bound.

    Raises
    ------
    Mismatch
        If the outputs differ in shape or by more than is allowed.
    """
    _check_shape(name, out, trusted)
    allowed = 4.0 * max(float(np.max(part.bound, initial=0.0)) for part in parts)
    difference = float(np.max(np.abs(_double(out) - _double(trusted)), initial=0.0))
    if not difference <= allowed:
        raise Mismatch(f"{name}: differs from selfattn by {difference:.3g}, allowed {allowed:.3g}")


def check_coarsely(name: str, out: Array, trusted: Array, allowed: float) -> float:
    """Compare a whole output with one that `check` accepted, by the norms of both.

    Returns
    -------
    float
        The error as a fraction of what is allowed, at most 1.

    Raises
    ------
    Mismatch
        If the outputs differ in shape, or by more than `allowed` times the norm.
    """
    _check_shape(name, out, trusted)
    error = float(np.linalg.norm(_double(out) - _double(trusted)) / np.linalg.norm(_double(trusted)))
    if not error <= allowed:
        raise Mismatch(f"{name}: differs from selfattn by {error:.3g} of the result, allowed {allowed:.3g}")
    return error / allowed


def _check_shape(name: str, out: Array, trusted: Array) -> None:
    if out.shape != trusted.shape:
        raise Mismatch(f"{name}: output has shape {out.shape}, expected {trusted.shape}")


def _double(array: Array) -> Float64:
    return np.asarray(array, dtype=np.float64)
