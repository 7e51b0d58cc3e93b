"""The example's HTTP service: answers, refusals, and clients that leave."""

from __future__ import annotations

import json
import re
import time
from contextlib import closing
from typing import Any

import numpy as np
import pytest
from service_process import SECONDS, Server, needs_weights, wait_until

pytest.importorskip("uvicorn")


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
