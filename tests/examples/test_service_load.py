"""The example's HTTP service under load, and the tool that makes the load."""

from __future__ import annotations

import re
from typing import Any

import pytest
from service_process import WEIGHTS, Server, needs_weights, run_load

pytest.importorskip("uvicorn")


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
