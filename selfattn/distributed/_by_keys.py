"""Attention where the keys travel: each rank takes all keys in ascending order, whichever rank has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import AttentionState
from ._call import Call
from ._link import Link
from ._options import widened
from ._rows import Run
from ._travel import Chunk, Travel, Wants

# With fewer rows than this the core chooses other kernels, whose results differ in the last bits. A shorter run gets
# rows of zeros as neighbours, so that results do not depend on how rows are spread over ranks.
FEWEST_ROWS = 64


class RunState:
    """The state of one run of a rank's rows."""

    def __init__(self, call: Call, run: Run, spans: Sequence[tuple[int, int]], num_threads: int) -> None:
        self._call, self._run = call, run
        length = call.owners.length
        start = max(min(run.start, length - FEWEST_ROWS), 0)
        stop = max(run.stop, min(start + FEWEST_ROWS, length))
        self._before, self._after = run.start - start, stop - run.stop
        q = np.broadcast_to(call.q, (*call.out_shape[:-1], call.q.shape[-1]))
        q = widened(q[..., run.rows, :], self._before, self._after)
        options = {**call.options.scores(), **call.options.lengths((start, stop), (0, length))}
        first = next((span[0] for span in spans if self.sees(span)), 0)
        self._state = AttentionState.__new__(AttentionState)
        self._state._begin(q, length, first, {**options, "num_threads": num_threads}, start)
        self._begun = False

    def sees(self, keys: tuple[int, int]) -> bool:
        """Whether a row of the run may see a key in this range of positions."""
        return self._call.options.sees((self._run.start, self._run.stop), keys)

    def absorb(self, chunk: Chunk) -> None:
        """Absorb the keys of a chunk, if a row sees any of them."""
        k, v = chunk.arrays
        keys = (chunk.start, chunk.stop)
        if not self.sees(keys):
            return
        self._begun = True
        self._state.absorb(k, v, first=chunk.start, **self._call.options.piece(keys, self._rows))

    def _rows(self, name: str) -> NDArray[Any]:
        """Return the rows of mask or bias, with rows of zeros for the neighbours."""
        return widened(self._call.options.given[name][..., self._run.rows, :], self._before, self._after)

    def result(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return out and lse of the run's rows."""
        if not self._begun:
            self._state.absorb(self._call.k[..., :0, :], self._call.v[..., :0, :])  # which tells the width of values
        out, lse = self._state.result()
        rows = slice(self._before, out.shape[-2] - self._after)
        return out[..., rows, :], lse[..., rows]


def wants_keys(call: Call) -> Wants:
    """Return which ranks want which keys: those that their rows may see."""

    def wants(rank: int, start: int, stop: int) -> bool:
        return any(call.options.sees((run.start, run.stop), (start, stop)) for run in call.owners.runs[rank])

    return wants


def attend_by_keys(link: Link, call: Call, num_threads: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return out and lse of this rank's rows."""
    travel = Travel(link, call, (call.k, call.v), AttentionState.block_keys, wants_keys(call))
    states = [RunState(call, run, travel.spans, num_threads) for run in call.runs]
    for chunk in travel.chunks():
        with link.moving(chunk.coming):
            for state in states:
                state.absorb(chunk)
    out = np.empty(call.out_shape, call.q.dtype)
    lse = np.empty(call.out_shape[:-1], np.float64 if call.q.dtype == np.float64 else np.float32)
    for run, state in zip(call.runs, states, strict=True):
        out[..., run.rows, :], lse[..., run.rows] = state.result()
    return out, lse
