"""The example's HTTP service under its servers: limits, the end, gunicorn's workers, and threads."""

from __future__ import annotations

import json
import os
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from places import EXAMPLES
from service_process import SECONDS, UVICORN, run_load, serving, wait_until

pytest.importorskip("uvicorn")


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
