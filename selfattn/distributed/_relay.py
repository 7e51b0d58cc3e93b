"""Messages from one rank to many: along a tree, so that no rank sends too many of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray


class Relay:
    """A message that a rank receives and passes on, or sends first. It moves only when somebody asks whether it has."""

    def __init__(
        self, comm: Any, buffer: NDArray[np.uint8], source: int | None, targets: Sequence[int], tag: int
    ) -> None:
        self._comm, self._message, self._targets, self._tag = comm, [buffer, MPI.BYTE], targets, tag
        self._requests = [] if source is None else [comm.Irecv(self._message, source, tag)]
        self._here = False
        self.Test()

    def Test(self) -> bool:
        """Whether the message has been received and passed on, as of `MPI.Request`."""
        if not MPI.Request.Testall(self._requests):
            return False
        if self._here:
            return True
        self._here = True
        self._requests = [self._comm.Isend(self._message, target, self._tag) for target in self._targets]
        return bool(MPI.Request.Testall(self._requests))


def all_done(function: str, requests: Sequence[Any]) -> bool:
    """Whether all these messages have been sent or received; asks for each, since asking moves them."""
    try:
        return not [request for request in requests if not request.Test()]
    except MPI.Exception as error:
        raise ConnectionError(f"{function}: MPI has lost a rank or a message: {error}") from error


def branches(rank: int, root: int, receivers: Sequence[int], machines: Sequence[int]) -> tuple[int | None, list[int]]:
    """Return whom a rank receives a message of rank `root` from, and whom it sends it to.

    On one machine the first rank that has the message gives it to all others: they copy it from its memory. Between
    machines it travels along a binomial tree. `machines` names the machine of each rank.
    """
    first = {machines[root]: root}  # of each machine
    for receiver in receivers:
        first.setdefault(machines[receiver], receiver)
    here = first.get(machines[rank])
    if rank != root and rank not in receivers:
        return None, []
    if rank != here:
        return here, []
    heads = list(first.values())
    place = heads.index(rank)
    source = None if place == 0 else heads[place - (1 << (place.bit_length() - 1))]
    targets, step = [], 1 << place.bit_length()
    while place + step < len(heads):
        targets.append(heads[place + step])
        step *= 2
    return source, targets + [other for other in receivers if machines[other] == machines[rank] and other != rank]
