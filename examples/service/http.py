"""The parts of HTTP that the service needs, on ASGI: bodies with limits of size and time, answers whole or in parts."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from service.checks import MAX_BODY, Problem

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

JSON = "application/json"


class Disconnected(Exception):
    """The client has disconnected: no answer is needed."""


@dataclass
class Answer:
    """A status and a body, or the parts of one that is still being made."""

    body: bytes = b""
    status: int = 200
    kind: str = JSON
    parts: AsyncIterator[bytes] | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def of(values: dict[str, Any], status: int = 200, **headers: str) -> Answer:
        return Answer(json.dumps(values).encode(), status, headers={k.replace("_", "-"): v for k, v in headers.items()})


async def read_body(scope: Scope, receive: Receive, seconds: float) -> bytes:
    """Return the whole body, or raise Problem: 413 where it is too large, 408 where it takes too long."""
    declared = dict(scope["headers"]).get(b"content-length", b"0")
    too_large = Problem(413, f"the body has more than {MAX_BODY} bytes")
    if declared.isdigit() and int(declared) > MAX_BODY:
        raise too_large  # before a byte of the body is read
    body = bytearray()

    async def read() -> bytes:
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Disconnected
            body.extend(message.get("body", b""))
            if len(body) > MAX_BODY:
                raise too_large
            if not message.get("more_body", False):
                return bytes(body)

    try:
        return await asyncio.wait_for(read(), seconds)
    except asyncio.TimeoutError:
        raise Problem(408, f"the body did not arrive within {seconds:g} seconds") from None


async def send_answer(answer: Answer, send: Send, head: bool) -> None:
    """Send an answer, without its body if `head`."""
    headers = {"content-type": answer.kind, **answer.headers}
    if answer.parts is None:
        headers["content-length"] = str(len(answer.body))
    if answer.status in (408, 413):
        headers["connection"] = "close"  # the rest of the body is never read
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": answer.status, "headers": encoded})
    if answer.parts is not None:
        async for part in answer.parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
    await send({"type": "http.response.body", "body": b"" if head else answer.body})


async def result_of(future: Future[Any], receive: Receive) -> Any:
    """Wait for a result; a client that leaves cancels it."""
    async for _ in until_done(future, receive, asyncio.Queue()):
        pass
    return future.result()


async def until_done(future: Future[Any], receive: Receive, news: asyncio.Queue[Any]) -> AsyncIterator[Any]:
    """Yield the items that arrive in `news` until the future is done; raise Disconnected if the client leaves first."""
    answer = asyncio.wrap_future(future)
    disconnected = asyncio.ensure_future(receive())  # after the body, the only event left is the end of the connection
    try:
        while not answer.done():
            arrived = asyncio.ensure_future(news.get())
            await asyncio.wait({answer, disconnected, arrived}, return_when=asyncio.FIRST_COMPLETED)
            if arrived.done():
                yield arrived.result()
                continue
            arrived.cancel()
            if disconnected.done() and not answer.done():
                raise Disconnected
        while not news.empty():
            yield news.get_nowait()
    finally:
        disconnected.cancel()
        answer.cancel()  # no effect if it is done; otherwise the request leaves the batch
        if not answer.cancelled():
            answer.exception()  # marks it as seen: callers read it from the future
