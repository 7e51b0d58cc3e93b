"""Messages from one rank to many: along a tree, so that no rank sends too many of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

Ends = tuple[int | None, list[int]]  # whom a rank receives a message from, and whom it sends it to
PLACES = 16000  # more than there are rows in the chunks that travel at the same time; MPI guarantees tags up to 32767


class Relay:
    """A message that a rank receives and passes on, or sends first. It moves only when somebody asks whether it has."""

    def __init__(self, comm: Any, parts: Sequence[NDArray[np.uint8]], root: int, ends: Ends, place: int) -> None:
        source, self._targets = ends
        self._comm, self._root = comm, root
        self._parts = parts
        # A root sends in the order of places, but what others pass on may overtake it.
        self._tag = 2 * (place % PLACES)
        tag = self._tag + (source != root)
        self._requests = [] if source is None else [comm.Irecv(part, source, tag) for part in self._parts]
        self._here = False
        self.Test()

    def Test(self) -> bool:
        """Whether the message has been received and passed on, as of `MPI.Request`."""
        if not _all_here(self._requests):
            return False
        if self._here:
            return True
        self._here = True
        tag = self._tag + (self._comm.rank != self._root)
        self._requests = [self._comm.Isend(part, target, tag) for target in self._targets for part in self._parts]
        return _all_here(self._requests)


def _all_here(requests: Sequence[Any]) -> bool:
    if requests and isinstance(requests[0], MPI.Request):
        return bool(MPI.Request.Testall(requests))
    return not [request for request in requests if not request.Test()]  # asks for each, since asking moves them


def all_done(function: str, requests: Sequence[Any]) -> bool:
    """Whether all these messages have been sent or received."""
    try:
        return _all_here(requests)
    except MPI.Exception as error:
        raise ConnectionError(f"{function}: MPI has lost a rank or a message: {error}") from error


def branches(rank: int, root: int, receivers: Sequence[int], machines: Sequence[int]) -> Ends:
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
