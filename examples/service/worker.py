"""The one thread that computes: it takes requests and steps the running batch."""

from __future__ import annotations

import logging
import threading
from collections import deque
from concurrent.futures import Future
from typing import Any

from generate import Chooser
from minilm import MiniLM
from nn import Array

from service.engine import Busy, Engine, settle

log = logging.getLogger("service")


class Closed(Exception):
    """The service is shutting down."""


class Worker:
    """Answers `embed` and `generate` with futures that its thread fulfils.

    Between two steps of the batch it embeds the texts of waiting requests, together, at most `max_texts` of them.
    """

    def __init__(self, engine: Engine, embedder: MiniLM | None, max_texts: int = 64, max_waiting: int = 64) -> None:
        self.engine, self.embedder = engine, embedder
        self.max_texts, self.max_waiting = max_texts, max_waiting
        self.texts: deque[tuple[list[str], Future[Array]]] = deque()
        self.changed = threading.Condition()
        self.closing = False
        self.thread = threading.Thread(target=self._run, name="worker", daemon=True)
        self.thread.start()

    def embed(self, texts: list[str]) -> Future[Array]:
        """Request the embeddings (len(texts), 384)."""
        future: Future[Array] = Future()
        with self.changed:
            self._refuse_when_closing()
            if len(self.texts) >= self.max_waiting:
                raise Busy(f"{self.max_waiting} requests wait already: try again later")
            self.texts.append((texts, future))
            self.changed.notify()
        return future

    def generate(self, prompt: Array, tokens: int, choose: Chooser) -> Future[list[int]]:
        """Request the tokens that continue a prompt."""
        with self.changed:
            self._refuse_when_closing()
            future = self.engine.submit(prompt, tokens, choose)
            self.changed.notify()
        return future

    def close(self) -> None:
        """Stop after the current step; unanswered requests get `Closed`."""
        with self.changed:
            self.closing = True
            self.changed.notify()
        self.thread.join()

    def _refuse_when_closing(self) -> None:
        if self.closing:
            raise Closed("the service shuts down")

    def _run(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.closing or self.texts or self.engine.busy)
                if self.closing:
                    break
                jobs = self._take()
            if jobs:
                self._embed(jobs)
            try:
                self.engine.step()
            except Exception as error:
                log.exception("a step failed")
                self.engine.fail_all(error)
        closed = Closed("the service shuts down")
        self.engine.fail_all(closed)
        for _, future in self.texts:
            settle(future, error=closed)

    def _take(self) -> list[tuple[list[str], Future[Array]]]:
        jobs: list[tuple[list[str], Future[Array]]] = []
        count = 0
        while self.texts and (not jobs or count + len(self.texts[0][0]) <= self.max_texts):
            jobs.append(self.texts.popleft())
            count += len(jobs[-1][0])
        return jobs

    def _embed(self, jobs: list[tuple[list[str], Future[Any]]]) -> None:
        jobs = [job for job in jobs if not job[1].cancelled()]
        if not jobs:
            return
        try:
            assert self.embedder is not None
            embeddings = self.embedder.embed([text for texts, _ in jobs for text in texts])
        except Exception as error:
            log.exception("embedding failed")
            for _, future in jobs:
                settle(future, error=error)
            return
        start = 0
        for texts, future in jobs:
            settle(future, embeddings[start : start + len(texts)])
            start += len(texts)
