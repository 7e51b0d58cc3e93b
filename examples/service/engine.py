"""Continuous batching: requests join and leave a running batch between steps, over one paged cache per layer."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from decoder import MAX_LENGTH, Decoder
from generate import Chooser
from nn import Array

import selfattn as sa


class Busy(Exception):
    """Too many requests are waiting: try again later."""


class TooLong(ValueError):
    """The request would not fit even if it ran alone."""


@dataclass(eq=False)
class Request:
    """A text to be continued; `future` gets the tokens."""

    prompt: Array
    tokens: int
    choose: Chooser
    future: Future[list[int]] = field(default_factory=Future)
    sequences: list[int] = field(default_factory=list)  # its id in each layer's cache, once it has one
    read: int = 0  # tokens whose keys and values are in the caches
    produced: list[int] = field(default_factory=list)
    on_token: Callable[[int], None] | None = None

    def add(self, token: int) -> None:
        self.produced.append(token)
        if self.on_token is not None:
            self.on_token(token)

    @property
    def length(self) -> int:
        return len(self.prompt) + self.tokens


class Engine:
    """Generates many texts at once, one token of each text per step. Only `submit` may be called from other threads.

    A prompt is read in chunks of `chunk` tokens, one chunk per step, so that a long prompt does not hold up other
    requests. If a running request has already read whole chunks of the prompt, they are shared with it. Chunks end at
    places that depend on the prompt alone. So for each request, every call computes the same numbers as if the request
    ran alone, and the text is the same.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        num_pages: int,
        page_size: int = 16,
        chunk: int = 64,
        max_batch: int = 16,
        max_waiting: int = 64,
    ) -> None:
        if chunk % page_size:
            raise ValueError(f"chunk {chunk} is not a multiple of page_size {page_size}: pages could not be shared")
        config = model.config
        self.model = model
        self.caches = [
            sa.PagedKVCache(num_pages, page_size, config.kv_heads, config.head_dim) for _ in range(config.layers)
        ]
        self.num_pages, self.page_size, self.chunk = num_pages, page_size, chunk
        self.max_batch, self.max_waiting = max_batch, max_waiting
        self.lock = threading.Lock()  # guards `waiting`, which another thread fills
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.steps = self.rows = self.shared = 0  # figures for /health

    def submit(
        self, prompt: Array, tokens: int, choose: Chooser, on_token: Callable[[int], None] | None = None
    ) -> Future[list[int]]:
        """Queue a request. Its future may be cancelled at any time; the request then leaves before the next step.

        `on_token` gets each token as it is chosen, on the thread that computes.
        """
        request = Request(prompt, tokens, choose, on_token=on_token)
        most = min(MAX_LENGTH, self.num_pages * self.page_size)
        if request.length > most:
            raise TooLong(f"prompt and tokens are {request.length} bytes together, but at most {most} fit")
        with self.lock:
            if len(self.waiting) >= self.max_waiting:
                raise Busy(f"all pages are in use, and {self.max_waiting} requests wait already: try again later")
            self.waiting.append(request)
        return request.future

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def step(self) -> None:
        """Let requests join, read one chunk of one prompt, compute one token of all others, let finished ones leave."""
        with self.lock:
            self._drop_cancelled()
            self._admit()
        reading = next((r for r in self.running if r.read < len(r.prompt)), None)
        writing = [r for r in self.running if r.produced]
        if writing:
            self._write(writing)
        if reading is not None:
            self._read_chunk(reading)
        for request in [r for r in self.running if len(r.produced) == r.tokens]:
            self._leave(request)
            settle(request.future, request.produced)

    def fail_all(self, error: BaseException) -> None:
        """End every request with this error."""
        with self.lock:
            requests = [*self.running, *self.waiting]
            self.waiting.clear()
        for request in list(self.running):
            self._leave(request)
        for request in requests:
            settle(request.future, error=error)

    def _admit(self) -> None:
        # A request joins only if the pages that running requests will not need are enough to finish it.
        while self.waiting and len(self.running) < self.max_batch:
            free = self.caches[0].num_free_pages - sum(self._pages_to_come(r) for r in self.running)
            if self._pages_to_come(self.waiting[0]) > free:
                return
            self.running.append(self.waiting.popleft())

    def _pages_to_come(self, request: Request) -> int:
        return -(-request.length // self.page_size) + (-request.read // self.page_size)

    def _read_chunk(self, request: Request) -> None:
        if not request.sequences:
            self._begin(request)
        end = min(request.read + self.chunk, len(request.prompt))
        ids = request.prompt[None, request.read : end]
        logits = self.model(ids, request.read, self.caches, [[sequence] for sequence in request.sequences])
        request.read = end
        if end == len(request.prompt):
            request.add(request.choose(logits[0, -1]))

    def _begin(self, request: Request) -> None:
        other, shared = max(
            ((r, self._shared_length(request, r)) for r in self.running if r is not request),
            key=lambda pair: pair[1],
            default=(request, 0),
        )
        if shared == 0:
            request.sequences = [cache.allocate() for cache in self.caches]
            return
        request.sequences = [cache.fork(i) for cache, i in zip(self.caches, other.sequences, strict=True)]
        for cache, sequence in zip(self.caches, request.sequences, strict=True):
            cache.truncate(sequence, shared)
        request.read = shared
        self.shared += shared

    def _shared_length(self, request: Request, other: Request) -> int:
        # At least one token of the prompt must be left to read: its logits choose the first new token.
        most = min(len(request.prompt) - 1, len(other.prompt), other.read)
        differs = request.prompt[:most] != other.prompt[:most]
        same = int(np.argmax(differs)) if differs.any() else most
        return same // self.chunk * self.chunk

    def _write(self, requests: list[Request]) -> None:
        ids = np.array([[r.produced[-1]] for r in requests])
        starts = np.array([r.read for r in requests])
        sequences = list(zip(*(r.sequences for r in requests), strict=True))
        logits = self.model(ids, starts, self.caches, sequences)
        for request, row in zip(requests, logits, strict=True):
            request.read += 1
            request.add(request.choose(row[-1]))
        self.steps += 1
        self.rows += len(requests)

    def _drop_cancelled(self) -> None:
        for request in [r for r in self.running if r.future.cancelled()]:
            self._leave(request)
        self.waiting = deque(r for r in self.waiting if not r.future.cancelled())

    def _leave(self, request: Request) -> None:
        self.running.remove(request)
        for i, sequence in enumerate(request.sequences):
            self.caches[i].free(sequence)
        request.sequences = []


def settle(future: Future[Any], result: Any = None, error: BaseException | None = None) -> None:
    """Give a future its result or error, unless it has been cancelled."""
    with suppress(InvalidStateError):
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)
