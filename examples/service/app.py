"""An HTTP service without a framework: POST /embed, POST /generate, GET /health.

    .venv/bin/uvicorn --app-dir examples service.app:app
    cd examples && ../.venv/bin/gunicorn -k uvicorn_worker.UvicornWorker -w 2 service.app:app

Every worker process has its own models and caches. One of its threads computes; this module only checks and waits.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any

from service.checks import MAX_BODY, Problem, parse_embed, parse_generate
from service.engine import Busy, TooLong
from service.settings import Settings, make_embedder, make_engine
from service.worker import Closed, Worker

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

log = logging.getLogger("service")


class Disconnected(Exception):
    """The client has disconnected: no answer is needed."""


class Service:
    """The ASGI application."""

    worker: Worker
    no_embedder: str | None = None  # why there is none

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
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
        settings = Settings.from_environment()
        try:
            embedder = make_embedder()
        except ImportError as error:
            embedder, self.no_embedder = None, str(error)
            log.warning("no /embed: %s", error)
        self.worker = Worker(make_engine(settings), embedder, max_waiting=settings.max_waiting)

    async def _serve(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        routes = {
            "/embed": ("POST", self._embed),
            "/generate": ("POST", self._generate),
            "/health": ("GET", self._health),
        }
        try:
            if scope["path"] not in routes:
                raise Problem(404, f"there are {', '.join(routes)}")
            method, handle = routes[scope["path"]]
            if scope["method"] != method:
                raise Problem(405, f"{scope['path']} wants {method}")
            status, answer = 200, await handle(await _body(receive), receive)
        except Disconnected:
            return
        except Problem as problem:
            status, answer = problem.status, {"error": str(problem)}
        except TooLong as error:
            status, answer = 400, {"error": str(error)}
        except (Busy, Closed) as error:
            status, answer = 503, {"error": str(error)}
        except Exception:
            log.exception("%s failed", scope["path"])
            status, answer = 500, {"error": "an error of the service, which its log tells"}
        body = json.dumps(answer).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        if status == 503:
            headers.append((b"retry-after", b"1"))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _embed(self, body: bytes, receive: Receive) -> dict[str, Any]:
        request = parse_embed(body)
        if self.no_embedder is not None:
            raise Problem(503, self.no_embedder)
        embeddings = await _result(self.worker.embed(request.texts), receive)
        return {"embeddings": embeddings.tolist()}

    async def _generate(self, body: bytes, receive: Receive) -> dict[str, Any]:
        request = parse_generate(body)
        tokens = await _result(self.worker.generate(request.prompt, request.tokens, request.chooser()), receive)
        return {"text": bytes(tokens).decode("utf8", "replace"), "tokens": len(tokens)}

    async def _health(self, body: bytes, receive: Receive) -> dict[str, Any]:
        if not self.worker.thread.is_alive():
            raise Problem(503, "the worker has stopped")
        engine = self.worker.engine
        return {
            "status": "ok",
            "embed": self.no_embedder is None,
            "running": len(engine.running),
            "waiting": len(engine.waiting),
            "free_pages": engine.caches[0].num_free_pages,
            "steps": engine.steps,
            "tokens_per_step": engine.rows / max(engine.steps, 1),
            "shared_tokens": engine.shared,
        }


async def _body(receive: Receive) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Disconnected
        body += message.get("body", b"")
        if len(body) > MAX_BODY:
            raise Problem(413, f"the body has more than {MAX_BODY} bytes")
        if not message.get("more_body", False):
            return bytes(body)


async def _result(future: Future[Any], receive: Receive) -> Any:
    answer = asyncio.wrap_future(future)
    disconnected = asyncio.ensure_future(receive())  # after the body, only the end of the connection is received
    try:
        await asyncio.wait({answer, disconnected}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise Disconnected
        return answer.result()
    finally:
        disconnected.cancel()
        answer.cancel()  # if it is not done: the request leaves the batch


app = Service()
