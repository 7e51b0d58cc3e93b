"""An HTTP service without a framework: POST /embed, POST /generate, GET /health, GET /metrics.

    .venv/bin/uvicorn --app-dir examples service.app:app
    cd examples && ../.venv/bin/gunicorn service.app:app

Every worker process has its own models and caches. One of its threads computes; this module only checks requests and
waits for results. gunicorn reads `examples/gunicorn.conf.py`.
"""

from __future__ import annotations

import asyncio
import codecs
import json
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

from service.checks import Generate, Problem, parse_embed, parse_generate
from service.engine import Busy, TooLong
from service.http import Answer, Disconnected, Receive, Scope, Send, read_body, result_of, send_answer, until_done
from service.metrics import KIND, Metrics
from service.settings import Settings, make_embedder, make_engine
from service.worker import Closed, Worker

log = logging.getLogger("service")


class Service:
    """The ASGI application."""

    settings: Settings
    worker: Worker
    no_embedder: str | None = None  # why there is none

    def __init__(self) -> None:
        self.metrics = Metrics()
        self.routes = {
            "/embed": ("POST", self._embed),
            "/generate": ("POST", self._generate),
            "/health": ("GET", self._health),
            "/metrics": ("GET", self._metrics),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] == "http":
            await self._serve(scope, receive, send)
        else:
            raise NotImplementedError(f"no {scope['type']} here")

    async def _live(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                try:
                    await asyncio.to_thread(self._start)
                except Exception as error:
                    log.exception("the service cannot start")
                    await send({"type": "lifespan.startup.failed", "message": str(error)})
                    return
                await send({"type": "lifespan.startup.complete"})
            else:
                await asyncio.to_thread(self.worker.close)
                await send({"type": "lifespan.shutdown.complete"})
                return

    def _start(self) -> None:
        # Not when the module is loaded: a server may fork workers after that, and a thread does not survive a fork.
        settings = self.settings = Settings.from_environment()
        try:
            embedder = make_embedder()
        except ImportError as error:
            embedder, self.no_embedder = None, str(error)
            log.warning("no /embed: %s", error)
        self.worker = Worker(make_engine(settings), embedder, settings.step_tokens, settings.max_waiting)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = time.perf_counter()
        path = scope["path"] if scope["path"] in self.routes else "other"
        try:
            answer = await self._answer(scope, receive)
            await send_answer(answer, send, head=scope["method"] == "HEAD")
            status = answer.status
        except Disconnected:
            status = 499  # other servers also count clients that left as 499
        self.metrics.count(path, status, time.perf_counter() - start)

    async def _answer(self, scope: Scope, receive: Receive) -> Answer:
        try:
            if scope["path"] not in self.routes:
                raise Problem(404, f"there are {', '.join(self.routes)}")
            method, handle = self.routes[scope["path"]]
            if scope["method"] != method and not (method == "GET" and scope["method"] == "HEAD"):
                raise Problem(405, f"{scope['path']} wants {method}")
            return await handle(await read_body(scope, receive, self.settings.read_seconds), receive)
        except Problem as problem:
            retry = {"retry_after": "1"} if problem.status == 503 else {}
            return Answer.of({"error": str(problem)}, problem.status, **retry)
        except TooLong as error:
            return Answer.of({"error": str(error)}, 400)
        except (Busy, Closed) as error:
            return Answer.of({"error": str(error)}, 503, retry_after="1")
        except Disconnected:
            raise
        except Exception:
            log.exception("%s failed", scope["path"])
            return Answer.of({"error": "an error of the service, which its log tells"}, 500)

    async def _embed(self, body: bytes, receive: Receive) -> Answer:
        request = parse_embed(body)
        if self.no_embedder is not None:
            raise Problem(503, self.no_embedder)
        found = await result_of(self.worker.embed(request.texts), receive)
        answer = {"embeddings": found.vectors.tolist()}
        if found.cut:
            answer["cut"] = found.cut  # indices of texts longer than the model reads: only their beginnings count
        return Answer.of(answer)

    async def _generate(self, body: bytes, receive: Receive) -> Answer:
        request = parse_generate(body)
        if request.stream:
            return self._stream(request, receive)
        tokens = await result_of(self.worker.generate(request.prompt, request.tokens, request.chooser()), receive)
        return Answer.of({"text": bytes(tokens).decode("utf8", "replace"), "tokens": len(tokens)})

    def _stream(self, request: Generate, receive: Receive) -> Answer:
        """Answer with a line of JSON for each piece of text, then one line with the number of tokens or the error."""
        loop, news = asyncio.get_running_loop(), asyncio.Queue[int]()

        def tell(token: int) -> None:
            loop.call_soon_threadsafe(news.put_nowait, token)

        future = self.worker.generate(request.prompt, request.tokens, request.chooser(), tell)

        async def lines() -> AsyncIterator[bytes]:
            decoder = codecs.getincrementaldecoder("utf8")("replace")
            count = 0
            try:
                async for token in until_done(future, receive, news):
                    count += 1
                    if text := decoder.decode(bytes([token]), final=count == request.tokens):
                        yield json.dumps({"text": text}).encode() + b"\n"
                last: dict[str, Any] = {"tokens": len(future.result())}
            except Disconnected:
                raise
            except Exception as error:  # the status line has already been sent
                last = {"error": str(error)}
            yield json.dumps(last).encode() + b"\n"

        return Answer(kind="application/x-ndjson", parts=lines())

    async def _metrics(self, body: bytes, receive: Receive) -> Answer:
        return Answer(self.metrics.text(self.worker).encode(), kind=KIND)

    async def _health(self, body: bytes, receive: Receive) -> Answer:
        if not self.worker.thread.is_alive():
            raise Problem(503, "the worker has stopped")
        engine = self.worker.engine
        return Answer.of(
            {
                "status": "ok",
                "embed": self.no_embedder is None,
                "running": len(engine.running),
                "waiting": len(engine.waiting),
                "free_pages": engine.caches[0].num_free_pages,
                "steps": engine.steps,
                "tokens_per_step": engine.rows / max(engine.steps, 1),
                "shared_tokens": engine.shared,
            }
        )


app = Service()
