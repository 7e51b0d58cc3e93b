"""Merging the results of attention over parts of the keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _core
from ._arguments import as_array, floats
from ._errors import refusal
from ._keywords import hinted


@hinted
def merge_states(
    outs: Sequence[ArrayLike] | ArrayLike, lses: Sequence[ArrayLike] | ArrayLike
) -> tuple[NDArray[Any], NDArray[Any]]:
    r"""Merge attention over disjoint parts of the keys into attention over all of them.

    ``lse = log Σ_p exp(lse_p)`` and ``out = Σ_p exp(lse_p − lse) · out_p``, summed in the order given.

    Parameters
    ----------
    outs : sequence of array_like, each (..., Sq, Dv)
        Results of `attention` over each part.
    lses : sequence of array_like, each (..., Sq)
        The log-sum-exps of outs (``return_lse=True``): float32 for 16-bit outs, otherwise in the dtype of outs. −inf
        means that the row saw no key in this part. (flash-attn gives +inf there, which must be replaced: here it means
        an infinite score, and the row becomes NaN.)

    Returns
    -------
    out : ndarray, shape (..., Sq, Dv)
        In the dtype of outs; sums are computed in float64.
    lse : ndarray, shape (..., Sq)
        −inf, with out 0, for a row that saw no key in any part.

    Raises
    ------
    TypeError, ValueError
        No parts, or arrays of unsupported dtypes or of shapes that do not fit together.

    Notes
    -----
    Flash-decoding and ring attention are based on this identity, from Rabe and Staats, "Self-attention does not need
    O(n²) memory" (2021).

    Examples
    --------
    >>> import numpy as np
    >>> import selfattn as sa
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 6, 4))
    >>> parts = [sa.attention(q, k[s], v[s], return_lse=True) for s in (slice(0, 2), slice(2, 6))]
    >>> out, lse = sa.merge_states([p[0] for p in parts], [p[1] for p in parts])
    >>> bool(np.allclose(out, sa.attention(q, k, v), rtol=0, atol=1e-14))
    True
    """
    values = [floats("merge_states", f"outs[{i}]", x) for i, x in enumerate(_parts("outs", outs))]
    logs = [floats("merge_states", f"lses[{i}]", x) for i, x in enumerate(_parts("lses", lses))]
    if not values:
        raise refusal(ValueError, "merge_states", "outs", " is empty, but there must be at least one part")
    if len(values) != len(logs):
        raise refusal(ValueError, "merge_states", "outs", f" has {len(values)} parts but ", "lses", f" has {len(logs)}")
    _check(values, logs)
    out, lse = np.empty(values[0].shape, values[0].dtype), np.empty(logs[0].shape, logs[0].dtype)
    _core.merge_states(values, logs, out, lse, 0)
    return out, lse


def _lse_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype of the log-sum-exps for outs of this dtype: the computation type."""
    return dtype if dtype.itemsize > 2 else np.dtype(np.float32)


def _parts(name: str, values: Any) -> list[Any]:
    if not hasattr(values, "__iter__"):  # a single array of all parts may support DLPack only
        values = as_array("merge_states", name, values)
        if values.ndim == 0:
            raise refusal(TypeError, "merge_states", name, f" is {values!r}, but a sequence of arrays is needed")
    return list(values)


def _check(values: list[NDArray[Any]], logs: list[NDArray[Any]]) -> None:
    first = values[0]
    for i, (value, log) in enumerate(zip(values, logs, strict=True)):
        if value.shape != first.shape:
            raise refusal(
                ValueError,
                "merge_states",
                "outs",
                f"[{i}] has shape {value.shape} but ",
                "outs",
                f"[0] has {first.shape}",
            )
        if value.ndim == 0 or log.shape != value.shape[:-1]:
            raise refusal(
                ValueError,
                "merge_states",
                "lses",
                f"[{i}] has shape {log.shape}, but ",
                "outs",
                f"[{i}] {value.shape} needs {value.shape[:-1]}",
            )
        for name, array, wanted in (("outs", value, first.dtype), ("lses", log, _lse_dtype(first.dtype))):
            if array.dtype != wanted:
                raise refusal(
                    TypeError,
                    "merge_states",
                    name,
                    f"[{i}] has dtype {array.dtype} but needs {wanted}, as ",
                    "outs",
                    f"[0] is {first.dtype}",
                )
