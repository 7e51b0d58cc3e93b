"""Messages between ranks. Every wait sleeps, and ends after a time limit."""

from __future__ import annotations

import os
import pickle
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from ._messages import MessageComm
from ._relay import Relay, all_done, branches

Bytes = NDArray[np.uint8]

LARGEST = 1 << 30  # bytes of one message; counts of MPI are ints
FEW = 8  # ranks that send small messages to all others at once: one step, where trees need several
SWAP = 32000  # a tag: MPI guarantees tags up to 32767, and relays need fewer
INLINE = 1016  # bytes of a small object that travel with its size
# Questions whether a message has arrived: a few at once, while other processes may use the core, then with pauses.
YIELDS = 20
FIRST_PAUSE, LONGEST_PAUSE = 1e-5, 2e-3  # seconds

# MPI may still write to the buffers of messages that are no longer waited for: they must live as long as the process.
_unfinished: list[Any] = []


class Link:
    """A communicator of its own, so that no message of the caller's is mistaken for one of ours."""

    def __init__(self, comm: Any, timeout: float | None) -> None:
        self.timeout = timeout
        self.rank, self.size = comm.rank, comm.size
        self._broken = False
        self._pending: list[Any] = []
        self._comm, request = comm.Idup()
        self.wait("Group", [request])
        self.machines: list[Any] = self.exchange("Group", self._machine())

    def close(self) -> None:
        """Free the communicator."""
        self._comm.Free()

    def _machine(self) -> Any:
        """Return what is equal for ranks that share memory: with MPI, the lowest of these ranks."""
        if isinstance(self._comm, MessageComm):
            return self._comm.machine
        machine = self._comm.Split_type(MPI.COMM_TYPE_SHARED)
        leader = int(machine.group.Translate_ranks([0], self._comm.group)[0])
        machine.Free()
        return leader

    @contextmanager
    def flight(self, function: str) -> Iterator[None]:
        """Enclose what ranks do together: after an error, this rank's messages no longer fit to those of the others."""
        if self._broken:
            raise RuntimeError(f"{function}: an earlier call failed while messages travelled: make a new Group")
        try:
            yield
        except BaseException:
            self._broken = True
            _unfinished.extend(self._pending)
            raise

    def wait(self, function: str, requests: Sequence[Any]) -> None:
        """Wait until all these messages have been sent or received."""
        start, pause, left = time.monotonic(), FIRST_PAUSE, YIELDS
        while not all_done(function, requests):
            if left:
                left -= 1
                os.sched_yield()
                continue
            if self.timeout is not None and time.monotonic() - start > self.timeout:
                raise TimeoutError(
                    f"{function}: rank {self.rank} has waited {self.timeout:g} s for the others (timeout="
                    f"{self.timeout:g}): a rank has failed, makes no such call, or computes for longer than that"
                )
            time.sleep(pause)
            pause = min(1.3 * pause, LONGEST_PAUSE)
        done = {id(request) for request in requests}
        self._pending = [request for request in self._pending if id(request) not in done]

    @contextmanager
    def moving(self, requests: Sequence[Any]) -> Iterator[None]:
        """Let these messages travel while the caller computes: MPI moves them only while somebody asks for them."""
        is_mpi = isinstance(self._comm, MPI.Comm)
        if (is_mpi and MPI.Query_thread() < MPI.THREAD_SERIALIZED) or all_done("Group", requests):
            yield
            return
        stop = threading.Event()

        def ask() -> None:
            with suppress(ConnectionError):  # `wait` will meet it again
                while not stop.wait(LONGEST_PAUSE / 2) and not all_done("Group", requests):
                    pass

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def spread(self, buffer: Bytes, root: int, receivers: Sequence[int], place: int) -> list[Any]:
        """Start to send the buffer of rank `root` to those of the receivers; the root and the receivers call this.

        Messages of one root have ascending places, and so have those that a rank waits for at the same time.
        """
        source, targets = branches(self.rank, root, receivers, self.machines)
        relay = Relay(self._comm, [buffer[part] for part in _parts(len(buffer))], root, (source, targets), place)
        self._pending.append(relay)
        return [relay]

    def leaves(self, receivers: Sequence[int]) -> bool:
        """Whether a receiver is on another machine."""
        return any(self.machines[receiver] != self.machines[self.rank] for receiver in receivers)

    def gather(self, function: str, buffer: Bytes) -> NDArray[np.uint8]:
        """Return the buffers of all ranks, which have one size: (size, bytes)."""
        found = np.empty((self.size, len(buffer)), np.uint8)
        if self.size <= FEW:
            self.swap(function, [buffer] * self.size, list(found))
            return found
        for part in _parts(len(buffer), LARGEST // self.size):
            received = np.empty((self.size, part.stop - part.start), np.uint8)
            request = self._comm.Iallgather(buffer[part], received)
            self._pending.append(request)
            self.wait(function, [request])
            found[:, part] = received
        return found

    def swap(self, function: str, outgoing: Sequence[Bytes], incoming: Sequence[Bytes]) -> None:
        """Send a buffer to every rank and receive one from every rank."""
        requests = []
        for step in range(1, self.size):
            source, target = (self.rank - step) % self.size, (self.rank + step) % self.size
            buffer = incoming[source]
            requests += [self._comm.Irecv(buffer[part], source, SWAP) for part in _parts(len(buffer))]
            buffer = outgoing[target]
            requests += [self._comm.Isend(buffer[part], target, SWAP) for part in _parts(len(buffer))]
        self._pending += requests
        incoming[self.rank][...] = outgoing[self.rank]
        self.wait(function, requests)

    def exchange(self, function: str, mine: Any) -> list[Any]:
        """Return the objects of all ranks; small ones in one message."""
        data = pickle.dumps(mine)
        head = np.zeros(8 + INLINE, np.uint8)
        head[:8] = np.frombuffer(len(data).to_bytes(8, "little"), np.uint8)
        inline = data[:INLINE]
        head[8 : 8 + len(inline)] = np.frombuffer(inline, np.uint8)
        heads = self.gather(function, head)
        sizes = [int.from_bytes(row[:8].tobytes(), "little") for row in heads]
        rest = max(sizes) - INLINE
        rests = np.zeros((self.size, 0), np.uint8)
        if rest > 0:
            tail = np.zeros(rest, np.uint8)
            tail[: max(len(data) - INLINE, 0)] = np.frombuffer(data[INLINE:], np.uint8)
            rests = self.gather(function, tail)
        whole = np.concatenate([heads[:, 8:], rests], axis=1)
        return [pickle.loads(row[:size].tobytes()) for row, size in zip(whole, sizes, strict=True)]


def _parts(size: int, largest: int | None = None) -> list[slice]:
    most = max(LARGEST if largest is None else largest, 1)
    return [slice(first, min(first + most, size)) for first in range(0, size, most)]
