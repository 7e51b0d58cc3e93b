"""Puts load on a service with many clients, and compares every answer with an answer computed in this process.

    .venv/bin/python examples/load_service.py --clients 16 --requests 400

Texts must be equal, embeddings must agree to 1e-6. The exit code is 1 if any answer differs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from minilm import MiniLM

from service.checks import parse_generate
from service.engine import Engine
from service.settings import Settings, make_embedder, make_engine

TALE = "the old harbour sleeps while small boats drift past a lighthouse nobody remembers painting blue"
PREAMBLE = "You are a helpful harbour master. Answer briefly, name every boat, and never speak of the weather. " * 2
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Case:
    """A request and its right answer."""

    path: str
    body: dict[str, Any]
    answer: dict[str, Any]

    def wrong(self, status: int, answer: dict[str, Any]) -> str | None:
        """Return what is wrong with the service's answer."""
        if status != 200:
            return f"status {status}: {answer.get('error')}"
        if self.path == "/generate":
            return None if answer == self.answer else f"{answer['text']!r} instead of {self.answer['text']!r}"
        found, wanted = np.array(answer["embeddings"]), np.array(self.answer["embeddings"])
        if found.shape != wanted.shape:
            return f"embeddings {found.shape} instead of {wanted.shape}"
        error = np.max(abs(found - wanted))
        return None if error <= TOLERANCE else f"embeddings differ by {error:.1e}"


@dataclass
class Record:
    """What happened under load."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: {"/embed": [], "/generate": []})
    errors: list[str] = field(default_factory=list)


def make_sentences(count: int, seed: int) -> list[Case]:
    """Return requests of one sentence each for /embed."""
    rng, embedder = np.random.default_rng(seed), make_embedder()
    return [embed_case(embedder, [_sentence(rng, 8, 24)]) for _ in range(count)]


def make_cases(count: int, seed: int, embed: bool) -> list[Case]:
    """Return requests of both kinds with their answers, each computed alone."""
    rng = np.random.default_rng(seed)
    engine, embedder = make_engine(Settings()), make_embedder() if embed else None
    cases = []
    for i in range(count):
        if embedder is not None and i % 2 == 0:
            cases.append(embed_case(embedder, [_sentence(rng, 1, 60) for _ in range(rng.integers(1, 9))]))
        else:
            prompt = (PREAMBLE if rng.random() < 0.5 else "") + _sentence(rng, 1, 30)
            body = {"prompt": prompt, "tokens": int(rng.integers(1, 65)), "seed": i, "temperature": float(i % 3)}
            cases.append(generate_case(engine, body))
    return cases


def embed_case(embedder: MiniLM, texts: list[str]) -> Case:
    """Embed each text alone."""
    return Case("/embed", {"texts": texts}, {"embeddings": [embedder.embed([text])[0].tolist() for text in texts]})


def generate_case(engine: Engine, body: dict[str, Any]) -> Case:
    """Generate the text in a batch of one."""
    request = parse_generate(json.dumps(body).encode())
    future = engine.submit(request.prompt, request.tokens, request.chooser())
    while engine.busy:
        engine.step()
    return Case("/generate", body, {"text": bytes(future.result()).decode("utf8", "replace"), "tokens": request.tokens})


def _sentence(rng: np.random.Generator, least: int, most: int) -> str:
    return " ".join(rng.choice(TALE.split(), size=rng.integers(least, most + 1)))


async def client(address: tuple[str, int], cases: Sequence[Case], record: Record, delay: float) -> None:
    """Send these requests one after the other over one connection, opened after a delay."""
    await asyncio.sleep(delay)  # the first worker of a server to wake takes all connections that wait
    reader, writer = await asyncio.open_connection(*address)
    for case in cases:
        began = time.perf_counter()
        problem = case.wrong(*await ask(reader, writer, case))
        record.seconds[case.path].append(time.perf_counter() - began)
        if problem is not None:
            record.errors.append(f"{case.path}: {problem}")
    writer.close()
    await writer.wait_closed()


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, case: Case) -> tuple[int, dict[str, Any]]:
    """Return status and answer."""
    body = json.dumps(case.body).encode()
    head = f"POST {case.path} HTTP/1.1\r\nhost: service\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    await writer.drain()
    status = int((await reader.readline()).split()[1])
    length = 0
    while (line := (await reader.readline()).strip()) != b"":
        name, value = line.split(b":", 1)
        if name.lower() == b"content-length":
            length = int(value)
    return status, json.loads(await reader.readexactly(length))


async def load(address: tuple[str, int], cases: list[Case], clients: int) -> tuple[Record, float]:
    """Share the requests among the clients, which send them at the same time."""
    record = Record()
    began = time.perf_counter()
    tasks = [client(address, cases[i::clients], record, i / 100) for i in range(clients)]
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, BaseException):
            record.errors.append(f"a client failed: {result!r}")
    return record, time.perf_counter() - began


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the load tool."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=400, help="of all clients together (default: 400)")
    parser.add_argument("--distinct", type=int, default=48, help="requests that differ (default: 48)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-embed", action="store_true", help="only /generate: where MiniLM's weights are missing")
    parser.add_argument("--sentences", action="store_true", help="only /embed, one sentence a request")
    args = parser.parse_args(arguments)
    if args.sentences:
        distinct = make_sentences(args.distinct, args.seed)
    else:
        distinct = make_cases(args.distinct, args.seed, not args.no_embed)
    order = np.random.default_rng(args.seed + 1).integers(len(distinct), size=args.requests)
    record, seconds = asyncio.run(load((args.host, args.port), [distinct[i] for i in order], args.clients))
    report(record, seconds, args.clients)
    return 1 if record.errors or sum(map(len, record.seconds.values())) < args.requests else 0


def report(record: Record, seconds: float, clients: int) -> None:
    """Print the figures."""
    every = [s for kind in record.seconds.values() for s in kind]
    print(f"{len(every)} requests of {clients} clients in {seconds:.1f} s: {len(every) / seconds:.1f} per second")
    for name, times in (*record.seconds.items(), ("all", every)):
        if times:
            p50, p99 = np.percentile(times, [50, 99]) * 1000
            print(f"{name:10} {len(times):5} requests   p50 {p50:7.1f} ms   p99 {p99:7.1f} ms")
    print(f"errors and differing answers: {len(record.errors)}")
    for error in record.errors[:5]:
        print(f"  {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
