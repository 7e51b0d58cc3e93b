"""selfattn's own call made differently: yardsticks for what an option costs and what a thread brings."""

from __future__ import annotations

from dataclasses import replace

from .peer import Own, Run
from .workload import Arrays, Workload


class WithoutOption(Own):
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


class OneThread(Own):
    """The same call with one thread."""

    name, label = "single", "selfattn on one thread"
    by_default = False

    def prepare(self, workload: Workload, arrays: Arrays, threads: int) -> Run:
        """See `Peer.prepare`."""
        return super().prepare(workload, arrays, threads=1)
