"""The example's continuous batching: no request's text depends on the others, and every page comes back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

PAGES = 64
PROMPTS = ["Hi", "The harbour " * 20, "The harbour " * 20 + "sleeps", "Boats drift past " * 6, "x" * 64, "x" * 65]


@pytest.fixture(scope="module")
def model(load_example: Any) -> Any:
    decoder = load_example("decoder")
    config = decoder.Config(layers=2, width=64, heads=4, kv_heads=2)
    return decoder.Decoder(config, decoder.random_weights(config))


@pytest.fixture
def make_engine(load_example: Any, model: Any) -> Any:
    def make(**sizes: int) -> Any:
        return load_example("service.engine").Engine(model, **{"num_pages": PAGES, **sizes})

    return make


@pytest.fixture
def engine(make_engine: Any) -> Any:
    return make_engine()


@pytest.fixture
def submit(load_example: Any) -> Any:
    def submit(engine: Any, prompt: str, tokens: int = 20, seed: int = 0) -> Any:
        chooser = load_example("generate").Chooser(1.0, seed)
        return engine.submit(load_example("decoder").encode(prompt), tokens, chooser)

    return submit


def finish(engine: Any) -> None:
    for _ in range(2000):
        if not engine.busy:
            break
        engine.step()
    assert not engine.busy
    assert [cache.num_free_pages for cache in engine.caches] == [engine.num_pages] * len(engine.caches)
    assert all(not cache.sequences for cache in engine.caches)


@pytest.fixture
def alone(make_engine: Any, submit: Any) -> Any:
    def alone(*arguments: Any) -> Any:
        engine = make_engine()
        future = submit(engine, *arguments)
        finish(engine)
        return future.result()

    return alone


def test_texts_are_those_of_the_example_without_pages(load_example: Any, model: Any, submit: Any, engine: Any) -> None:
    example = load_example("generate")
    future = submit(engine, PROMPTS[1], 30)
    finish(engine)
    prompt = example.encode(PROMPTS[1])
    assert future.result() == list(example.generate_again(model, prompt, 30, example.Chooser(1.0)))


def test_requests_that_join_and_leave_get_the_text_they_get_alone(engine: Any, submit: Any, alone: Any) -> None:
    requests = [(prompt, 5 + 7 * i, i) for i, prompt in enumerate(PROMPTS)]
    futures = []
    for request in requests:
        futures.append(submit(engine, *request))
        for _ in range(3):
            engine.step()
    assert len(engine.running) > 1
    finish(engine)
    assert [future.result() for future in futures] == [alone(*request) for request in requests]
    assert engine.rows > engine.steps  # some steps served several


def test_a_prompt_in_common_is_read_once(engine: Any, submit: Any) -> None:
    first = submit(engine, PROMPTS[1], 40)
    while engine.running == [] or engine.running[0].read < len(PROMPTS[1]):
        engine.step()
    free = engine.caches[0].num_free_pages
    second = submit(engine, PROMPTS[2], 40)
    engine.step()
    # 240 bytes in common: three chunks of 64 are shared; 54 more need 4 pages, and the other's next token perhaps one.
    assert engine.shared == 192
    assert free - engine.caches[0].num_free_pages <= 5
    finish(engine)
    assert first.done()
    assert second.done()


def test_all_of_a_prompt_in_common_leaves_a_chunk_to_read(engine: Any, submit: Any, alone: Any) -> None:
    submit(engine, "x" * 64, 40)
    engine.step()
    future = submit(engine, "x" * 64, 9, 5)
    finish(engine)
    assert engine.shared == 0
    assert future.result() == alone("x" * 64, 9, 5)


def test_the_first_may_leave_before_those_that_share_its_pages(engine: Any, submit: Any, alone: Any) -> None:
    first = submit(engine, PROMPTS[1], 5)
    while len(first_read := [r for r in engine.running if r.produced]) == 0:
        engine.step()
    assert len(first_read) == 1
    second = submit(engine, PROMPTS[2], 50)
    while not first.done():
        engine.step()
    assert not second.done()
    assert engine.shared > 0
    finish(engine)
    assert second.result() == alone(PROMPTS[2], 50)


def test_out_of_pages_requests_wait(make_engine: Any, submit: Any, alone: Any) -> None:
    engine = make_engine(num_pages=8)  # of 16 tokens
    futures = [submit(engine, "Hello there", 80, seed) for seed in range(5)]
    most = 0
    while engine.busy:
        engine.step()
        most = max(most, len(engine.running))
    assert most == 1  # 91 tokens are 6 pages: no two fit
    assert [future.result() for future in futures] == [alone("Hello there", 80, seed) for seed in range(5)]
    finish(engine)


def test_full_queues_and_impossible_lengths_are_refused(load_example: Any, make_engine: Any, submit: Any) -> None:
    service = load_example("service.engine")
    engine = make_engine(num_pages=8, max_waiting=2)
    with pytest.raises(service.TooLong, match="130 bytes together, but at most 128 fit"):
        submit(engine, "x" * 50, 80)
    submit(engine, "x" * 48, 80)
    submit(engine, "x")
    with pytest.raises(service.Busy, match="2 requests wait already"):
        submit(engine, "x")
    finish(engine)


def test_cancelled_requests_leave(engine: Any, submit: Any, alone: Any) -> None:
    futures = [submit(engine, prompt, 30, i) for i, prompt in enumerate(PROMPTS)]
    for _ in range(4):
        engine.step()
    for future in futures[::2]:
        assert future.cancel()
    engine.step()
    assert len(engine.running) == 3
    finish(engine)
    assert [f.result() for f in futures[1::2]] == [alone(p, 30, i) for i, p in enumerate(PROMPTS) if i % 2]


def test_a_cancelled_request_leaves_the_queue(make_engine: Any, submit: Any) -> None:
    engine = make_engine(max_batch=1)
    first, second, third = (submit(engine, "Hi", 10, seed) for seed in range(3))
    engine.step()
    second.cancel()
    finish(engine)
    assert first.done()
    assert third.done()


def test_a_step_that_fails_ends_its_requests_and_frees_their_pages(
    engine: Any, submit: Any, alone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    futures = [submit(engine, prompt) for prompt in PROMPTS]
    for _ in range(5):
        engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(engine.model, "norm", None)  # after the layers have appended
        with pytest.raises(TypeError):
            engine.step()
    engine.fail_all(RuntimeError("broken"))
    assert all(isinstance(future.exception(), RuntimeError) for future in futures)
    finish(engine)
    future = submit(engine, "Hi", 8)
    finish(engine)
    assert future.result() == alone("Hi", 8)


def test_a_chunk_that_shares_no_page_is_refused(make_engine: Any) -> None:
    with pytest.raises(ValueError, match="chunk 40 is not a multiple of page_size 16"):
        make_engine(chunk=40)


def test_any_order_of_events(make_engine: Any, submit: Any, alone: Any, rng: np.random.Generator) -> None:
    for _ in range(5):
        engine = make_engine(num_pages=48, max_batch=int(rng.integers(1, 6)))
        requests, futures = [], []
        for seed in range(12):
            requests.append((PROMPTS[rng.integers(len(PROMPTS))], int(rng.integers(1, 60)), seed))
            futures.append(submit(engine, *requests[-1]))
            for _ in range(rng.integers(0, 30)):
                engine.step()
            if rng.random() < 0.2:
                futures[rng.integers(len(futures))].cancel()
        finish(engine)
        for request, future in zip(requests, futures, strict=True):
            assert future.cancelled() or future.result() == alone(*request)
