"""A preforking server: workers forked from a master that has already computed, with requests from several clients."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import textwrap
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest

import selfattn as sa
from selfattn import reference

pytestmark = [
    pytest.mark.uncounted,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.skipif(importlib.util.find_spec("gunicorn") is None, reason="gunicorn is not installed"),
]

CLIENTS = 8
REQUESTS = 1000  # of each kind of worker

# Clients and workers make the same arrays of the same numbers.
INPUTS = """
import numpy as np

def inputs(seed, heads, q_len, kv_len, dim):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((heads, n, dim)).astype(np.float32) for n in (q_len, kv_len, kv_len)]
"""

APP = (
    INPUTS
    + """
import os
from urllib.parse import parse_qsl

import selfattn as sa

MASTER = os.getpid()
WARM = sa.attention(*inputs(0, 8, 400, 400, 32), num_threads=2)  # the master has a team of threads


def app(environ, start_response):
    values = {name: int(value) for name, value in parse_qsl(environ["QUERY_STRING"])}
    causal = bool(values.pop("causal"))
    q, k, v = inputs(**values)
    out = sa.attention(q, k, v, causal=causal, num_threads=2)
    facts = {
        "X-Forked": int(os.getpid() != MASTER),
        "X-Worker": os.getpid(),
        "X-Threads": sa.explain(q, k, v, causal=causal, num_threads=2)["threads"],
    }
    body = out.tobytes()
    headers = [("Content-Length", str(len(body))), *((name, str(value)) for name, value in facts.items())]
    start_response("200 OK", headers)
    return [body]
"""
)

CONFIG = """
preload_app = True
workers = 2
bind = "127.0.0.1:0"
timeout = 20  # a worker that hangs is replaced, which the test notices
control_socket_disable = True
"""


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[str]:
    """Run gunicorn and give its address; at the end it must stop by itself."""
    (folder / "app.py").write_text(APP)
    (folder / "config.py").write_text(textwrap.dedent(CONFIG))
    log = folder / "log"
    command = [
        sys.executable,
        "-m",
        "gunicorn",
        "--config",
        "config.py",
        "--error-logfile",
        str(log),
        *options,
        "app:app",
    ]
    server = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    try:
        yield address_in(log, server)
        server.terminate()
        assert server.wait(timeout=20) == 0, log.read_text()
    finally:
        server.kill()
        server.wait(timeout=20)


def address_in(log: Path, server: subprocess.Popen[bytes]) -> str:
    end = time.monotonic() + 30
    while time.monotonic() < end and server.poll() is None:
        found = re.search(r"Listening at: (http://\S+)", log.read_text() if log.exists() else "")
        if found:
            return found[1]
        time.sleep(0.05)
    raise AssertionError(f"gunicorn did not start: {log.read_text() if log.exists() else 'no log'}")


def requests_of(client: int) -> Iterator[dict[str, int]]:
    choose = np.random.default_rng(client)
    for i in range(REQUESTS // CLIENTS + (client < REQUESTS % CLIENTS)):
        yield {
            "seed": 1000 * client + i,
            "heads": int(choose.integers(1, 9)),
            "q_len": int(choose.choice([1, 7, 60, 150, 300])),
            "kv_len": int(choose.choice([1, 33, 200, 400])),
            "dim": int(choose.choice([8, 32, 64])),
            "causal": int(choose.integers(2)),
        }


@pytest.mark.parametrize("options", [("--worker-class", "sync"), ("--worker-class", "gthread", "--threads", "4")])
def test_gunicorn_preload(tmp_path: Path, options: tuple[str, ...], assert_accurate: Callable[..., float]) -> None:
    namespace: dict[str, Any] = {}
    exec(INPUTS, namespace)
    inputs = namespace["inputs"]
    seen: list[dict[str, int]] = []
    problems: list[str] = []

    def client(number: int, address: str) -> None:
        try:
            for values in requests_of(number):
                with urllib.request.urlopen(f"{address}/?{urlencode(values)}", timeout=15) as response:
                    body = response.read()
                    seen.append({name: int(response.headers[f"X-{name}"]) for name in ("Forked", "Worker", "Threads")})
                causal = bool(values.pop("causal"))
                q, k, v = inputs(**values)
                out = np.frombuffer(body, np.float32).reshape(q.shape)
                assert_accurate(out, reference.attention(q, k, v, causal=causal), trivial=True)
                assert np.array_equal(out, sa.attention(q, k, v, causal=causal, num_threads=1)), "different results"
        except Exception as problem:  # a client's exception would be lost in its thread
            problems.append(repr(problem))

    with serving(tmp_path, *options) as address:
        clients = [threading.Thread(target=client, args=(number, address)) for number in range(CLIENTS)]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join()
        assert problems == []
    assert len(seen) == REQUESTS
    assert {answer["Forked"] for answer in seen} == {1}
    assert len({answer["Worker"] for answer in seen}) == 2, "a worker was idle or replaced"
    assert sum(answer["Threads"] == 2 for answer in seen) > REQUESTS / 5
