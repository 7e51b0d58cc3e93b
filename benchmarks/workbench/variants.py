"""Variants of selfattn's own call, to measure the cost of an option and the gain from threads."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from selfattn._bench.peer import Run
from selfattn._bench.workload import Arrays, Workload

from .cached import OwnOnCaches


class WithoutOption(OwnOnCaches):
    """The call with the workload's `baseline` instead of its options."""

    name, label = "plain", "selfattn without the option"
    by_default = False

    def why_not(self, workload: Workload) -> str:
        """See `Peer.why_not`."""
        return "" if workload.baseline is not None else "no other options are given to compare with"

    def answered(self, workload: Workload) -> Workload:
        """See `Peer.answered`."""
        assert workload.baseline is not None
        return replace(workload, options=workload.baseline, baseline=None)

    def prepare(self, workload: Workload, arrays: Arrays, threads: int) -> Run:
        """See `Peer.prepare`."""
        return super().prepare(self.answered(workload), arrays, threads)


class OneThread(OwnOnCaches):
    """The same call with one thread."""

    name, label = "single", "selfattn on one thread"
    by_default = False

    def prepare(self, workload: Workload, arrays: Arrays, threads: int) -> Run:
        """See `Peer.prepare`."""
        return super().prepare(workload, arrays, threads=1)


class NarrowHeads(OwnOnCaches):
    """The same call with narrower heads. Two widths give the time that does not grow with head_dim: the softmax.

    The widths are multiples of every unit's tile. A head of width 1 would be padded to a whole tile, and its products
    would cost as much as that tile's.
    """

    by_default = in_tables = False

    def __init__(self, head_dim: int) -> None:
        self.head_dim = head_dim
        self.name = f"heads-{head_dim}"
        self.label = f"selfattn with heads of {head_dim}"

    def why_not(self, workload: Workload) -> str:
        """See `Peer.why_not`."""
        if workload.kind == "layer":
            return "it has projections"
        return "" if min(workload.head_dim, workload.value_dim) > self.head_dim else "its heads are no wider"

    def answered(self, workload: Workload) -> Workload:
        """See `Peer.answered`."""
        return replace(workload, head_dim=self.head_dim, value_dim=self.head_dim)

    def operands(self, workload: Workload, arrays: Arrays) -> Arrays:
        """See `Peer.operands`."""
        narrow = {name: np.ascontiguousarray(arrays[name][..., : self.head_dim]) for name in "qkv"}
        return {**arrays, **narrow}

    def prepare(self, workload: Workload, arrays: Arrays, threads: int) -> Run:
        """See `Peer.prepare`."""
        return super().prepare(self.answered(workload), self.operands(workload, arrays), threads)
