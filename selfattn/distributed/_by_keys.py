"""Attention where the keys travel: each rank takes all keys in ascending order, whichever rank has them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import AttentionState
from ._call import Call
from ._link import Link
from ._options import widened
from ._rows import Run
from ._travel import Chunk, Travel

# With fewer rows than this the core chooses other kernels, whose results differ in the last bits. A shorter run gets
# rows of zeros as neighbours, so that results do not depend on how rows are spread over ranks.
FEWEST_ROWS = 64


class RunState:
    """The state of one run of a rank's rows."""

    def __init__(self, call: Call, run: Run, num_threads: int) -> None:
        self._call, self._run = call, run
        length = call.owners.length
        start = max(min(run.start, length - FEWEST_ROWS), 0)
        stop = max(run.stop, min(start + FEWEST_ROWS, length))
        self._before, self._after = run.start - start, stop - run.stop
        q = np.broadcast_to(call.q, (*call.out_shape[:-1], call.q.shape[-1]))
        q = widened(q[..., run.rows, :], self._before, self._after)
        options = {**call.options.scores(), **call.options.lengths((start, stop), (0, length))}
        self._state = AttentionState(q, kv_len=length, num_threads=num_threads, **options)

    def absorb(self, chunk: Chunk) -> None:
        """Absorb the keys of a chunk."""
        if chunk.start >= self._run.stop and self._call.options.given.get("causal"):
            return  # none of them is visible, and neither will be the later ones
        k, v = chunk.arrays
        keys = (chunk.start, chunk.stop)
        terms = self._call.options.piece(self._run, self._before, self._after, keys)
        self._state.absorb(k, v, first=chunk.start, **terms)

    def result(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return out and lse of the run's rows."""
        out, lse = self._state.result()
        rows = slice(self._before, out.shape[-2] - self._after)
        return out[..., rows, :], lse[..., rows]


def attend_by_keys(link: Link, call: Call, num_threads: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return out and lse of this rank's rows."""
    states = [RunState(call, run, num_threads) for run in call.runs]
    travel = Travel(link, call.function, call.owners, (call.k, call.v))
    for chunk in travel.chunks(AttentionState.block_keys):
        with link.moving(chunk.coming):
            for state in states:
                state.absorb(chunk)
    out = np.empty(call.out_shape, call.q.dtype)
    lse = np.empty(call.out_shape[:-1], np.float64 if call.q.dtype == np.float64 else np.float32)
    for run, state in zip(call.runs, states, strict=True):
        out[..., run.rows, :], lse[..., run.rows] = state.result()
    return out, lse
