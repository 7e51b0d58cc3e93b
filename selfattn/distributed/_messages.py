"""A communicator over any transport, with the few methods of mpi4py's that a Group needs."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .._arguments import integer_in, whole_number

_Bytes = NDArray[np.uint8]
_GATHER = -1  # a tag for this purpose only


class Message(NamedTuple):
    """What a transport carries."""

    context: tuple[int, ...]  # of one Group
    source: int
    tag: int
    number: int  # of the messages with the same context, source, target and tag
    data: bytes


class MessageComm:
    """The ranks of a `Group` whose messages some other transport than MPI carries: that of Ray, of Dask, a socket.

    Parameters
    ----------
    rank, size : int
        Which of how many ranks this process is.
    send : callable
        ``send(target, message)`` carries a message to rank `target`, where it must be given to `receive`. It must not
        wait until that rank does something. Messages may overtake one another. They are tuples of integers and bytes.
    machine : str, optional
        Equal for ranks that share memory; default the name of the host. Between machines, messages travel along trees.

    Raises
    ------
    TypeError, ValueError
        `size` is not a positive integer, or `rank` is not one of 0 to size - 1.

    Examples
    --------
    A single rank sends nothing. The guide has recipes for Ray and Dask.

    >>> import numpy as np
    >>> from selfattn.distributed import Group, MessageComm
    >>> group = Group(MessageComm(0, 1, lambda target, message: None))
    >>> q, k, v = np.ones((3, 2, 10, 8), dtype=np.float32)
    >>> group.attention(q, k, v, rows=group.rows(10), causal=True).shape
    (2, 10, 8)
    """

    def __init__(
        self, rank: int, size: int, send: Callable[[int, Message], object], *, machine: str | None = None
    ) -> None:
        self.size = whole_number("MessageComm", "size", size, 1)
        self.rank = integer_in("MessageComm", "rank", rank, 0, self.size - 1)
        self.machine = socket.gethostname() if machine is None else machine
        self._send = send
        self._begin((), {})

    def _begin(self, context: tuple[int, ...], box: dict[tuple[Any, ...], bytes]) -> None:
        self._context, self._box = context, box
        self._duplicates = 0
        self._sent: Counter[tuple[int, int]] = Counter()
        self._awaited: Counter[tuple[int, int]] = Counter()

    def receive(self, message: Sequence[Any]) -> None:
        """Take a message that was sent to this rank. Any thread may call this."""
        context, source, tag, number, data = message
        self._box[tuple(context), source, tag, number] = data

    def Idup(self) -> tuple[MessageComm, Any]:
        """Return a communicator whose messages are not mixed up with those of this one."""
        self._duplicates += 1
        other = MessageComm(self.rank, self.size, self._send, machine=self.machine)
        other._begin((*self._context, self._duplicates), self._box)
        return other, _All([])

    def Isend(self, buffer: _Bytes, target: int, tag: int) -> Any:
        """Send bytes."""
        number = self._sent[target, tag]
        self._sent[target, tag] += 1
        message = Message(self._context, self.rank, tag, number, buffer.tobytes())
        self.receive(message) if target == self.rank else self._send(target, message)
        return _All([])

    def Irecv(self, buffer: _Bytes, source: int, tag: int) -> Any:
        """Receive bytes."""
        number = self._awaited[source, tag]
        self._awaited[source, tag] += 1
        return _Awaited(self._box, (self._context, source, tag, number), buffer)

    def Iallgather(self, mine: _Bytes, into: NDArray[np.uint8]) -> Any:
        """Send bytes to all ranks, and receive theirs."""
        for target in range(self.size):
            self.Isend(mine, target, _GATHER)
        return _All([self.Irecv(row, source, _GATHER) for source, row in enumerate(into)])

    def Free(self) -> None:
        """Forget what has come for this communicator."""
        for key in [key for key in list(self._box) if key[0] == self._context]:
            self._box.pop(key, None)


class _Awaited:
    """A message that may have come."""

    def __init__(self, box: dict[tuple[Any, ...], bytes], key: tuple[Any, ...], buffer: _Bytes) -> None:
        self._box, self._key, self._buffer = box, key, buffer
        self._here = False

    def Test(self) -> bool:
        if not self._here and (data := self._box.pop(self._key, None)) is not None:
            self._buffer[...] = np.frombuffer(data, np.uint8)
            self._here = True
        return self._here


class _All:
    """Several messages."""

    def __init__(self, requests: Sequence[Any]) -> None:
        self._requests = requests

    def Test(self) -> bool:
        return not [request for request in self._requests if not request.Test()]
