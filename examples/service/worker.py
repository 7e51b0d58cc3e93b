"""The one thread that computes: it takes requests and steps the running batch."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from generate import Chooser
from minilm import MiniLM, max_tokens, model_folder
from nn import Array

from service.engine import Busy, Engine, settle

log = logging.getLogger("service")


class Closed(Exception):
    """The service is shutting down."""


class Embeddings(NamedTuple):
    """The result of a request."""

    vectors: Array  # (texts, 384)
    cut: list[int]  # indices of texts that were longer than the model reads


@dataclass(eq=False)
class Job:
    """A request's texts, of which a few are embedded in each step."""

    texts: list[str]
    future: Future[Embeddings] = field(default_factory=Future)
    tokens: list[int] = field(default_factory=list)  # number of tokens of each text that the model reads
    cut: list[int] = field(default_factory=list)
    vectors: list[Array] = field(default_factory=list)


class Worker:
    """Answers `embed` and `generate` with futures that its thread fulfils.

    Between two steps of the batch it embeds texts of waiting requests together, with at most `step_tokens` tokens in
    all. It takes one text of each request in turn, so that a request with many long texts does not hold up the others.
    """

    def __init__(self, engine: Engine, embedder: MiniLM | None, step_tokens: int = 2048, max_waiting: int = 64) -> None:
        self.engine, self.embedder = engine, embedder
        self.step_tokens, self.max_waiting = step_tokens, max_waiting
        self.most_tokens = max_tokens(model_folder()) if embedder is not None else 0
        self.jobs: deque[Job] = deque()
        self.embedded_tokens = self.cut_texts = 0  # figures for /metrics
        self.changed = threading.Condition()
        self.closing = False
        self.thread = threading.Thread(target=self._run, name="worker", daemon=True)
        self.thread.start()

    def embed(self, texts: list[str]) -> Future[Embeddings]:
        """Request the embeddings of some texts."""
        job = Job(texts)
        with self.changed:
            self._refuse_when_closing()
            if len(self.jobs) >= self.max_waiting:
                raise Busy(f"{self.max_waiting} requests wait already: try again later")
            self.jobs.append(job)
            self.changed.notify()
        return job.future

    def generate(
        self, prompt: Array, tokens: int, choose: Chooser, on_token: Callable[[int], None] | None = None
    ) -> Future[list[int]]:
        """Request the tokens that continue a prompt."""
        with self.changed:
            self._refuse_when_closing()
            future = self.engine.submit(prompt, tokens, choose, on_token)
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
                self.changed.wait_for(lambda: self.closing or self.jobs or self.engine.busy)
                if self.closing:
                    break
                jobs = list(self.jobs)
            self._embed([job for job in jobs if not job.future.cancelled()])
            with self.changed:
                self.jobs = deque(job for job in self.jobs if not job.future.done())
            try:
                self.engine.step()
            except Exception as error:
                log.exception("a step failed")
                self.engine.fail_all(error)
        closed = Closed("the service shuts down")
        self.engine.fail_all(closed)
        for job in self.jobs:
            settle(job.future, error=closed)

    def _embed(self, jobs: list[Job]) -> None:
        """Embed the texts of one step, and fulfil the jobs that have no text left."""
        if not jobs:
            return
        try:
            assert self.embedder is not None
            self._count([job for job in jobs if not job.tokens])
            chosen = self._choose(jobs)
            vectors = self.embedder.embed([job.texts[place] for job, place in chosen])
            for (job, place), vector in zip(chosen, vectors, strict=True):
                self.embedded_tokens += job.tokens[place]
                job.vectors.append(vector)
        except Exception as error:
            log.exception("embedding failed")
            for job in jobs:
                settle(job.future, error=error)
            return
        for job in jobs:
            if len(job.vectors) == len(job.texts):
                self.cut_texts += len(job.cut)
                settle(job.future, Embeddings(np.stack(job.vectors), job.cut))

    def _count(self, jobs: list[Job]) -> None:
        assert self.embedder is not None
        counts = iter(self.embedder.count_tokens([text for job in jobs for text in job.texts]))
        for job in jobs:
            lengths = [next(counts) + 2 for _ in job.texts]  # [CLS] and [SEP]
            job.cut = [i for i, length in enumerate(lengths) if length > self.most_tokens]
            job.tokens = [min(length, self.most_tokens) for length in lengths]

    def _choose(self, jobs: list[Job]) -> list[tuple[Job, int]]:
        """Return which texts to embed in a step: one of each job in turn while they fit, and at least one."""
        chosen: list[tuple[Job, int]] = []
        left = self.step_tokens
        for turn in range(max(len(job.texts) - len(job.vectors) for job in jobs)):
            for job in jobs:
                place = len(job.vectors) + turn
                if place >= len(job.texts):
                    continue
                left -= job.tokens[place]
                if left < 0 and chosen:
                    return chosen
                chosen.append((job, place))
        return chosen
